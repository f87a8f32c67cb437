// Packing of features with their statistics, compiled for every instruction set.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // nobody watches floating-point traps; with them, no select is vectorised
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/parallel.h"
#include "correlation/correlation.h"
#include "correlation/tiles.h"

#if FFMERGE_X86
#include <emmintrin.h>
#endif

namespace ffmerge {
namespace {

constexpr int64_t kRingTokens = 256;  // a block: its tokens share visits to the sums in the same way in any call

namespace portable {
#include "correlation/pack.inc"
}

#if FFMERGE_X86

#include "common/target_avx2.inc"
namespace avx2 {
#include "correlation/pack.inc"
}
#include "common/target_end.inc"

#include "common/target_avx512.inc"
namespace avx512 {
#include "correlation/pack.inc"
}
#include "common/target_end.inc"

#endif  // FFMERGE_X86

using PackRows = void (*)(const Features&, bool, float*, int64_t, int64_t);
using PackTiles = void (*)(const Features&, const TileForm&, int64_t, char* const*, int64_t, int64_t);
using AccumulateRing = void (*)(const Features&, const Ring&, int64_t, int64_t);

struct Functions {
  PackRows rows;
  PackTiles tiles;
  AccumulateRing ring;
};

Functions functions_for([[maybe_unused]] Isa isa) {
#if FFMERGE_X86
  if (isa >= Isa::avx512) return {avx512::pack_rows, avx512::pack_tiles, avx512::accumulate_ring};
  if (isa == Isa::avx2) return {avx2::pack_rows, avx2::pack_tiles, avx2::accumulate_ring};
#endif
  return {portable::pack_rows, portable::pack_tiles, portable::accumulate_ring};
}

// Each thread takes whole columns, so that sums do not depend on the number of threads.
template <class Pack>
void over_strips(int64_t width, int threads, Pack pack) {
  const int64_t count = strips(width);
  const int64_t parts = std::min<int64_t>(std::max(threads, 1), count);
  parallel_for(parts, threads, [&] {
    return [&](int64_t part) { pack(part * count / parts, (part + 1) * count / parts); };
  });
}

}  // namespace

void correlation_pack_rows(const Features& features, bool rounded, float* out, Isa isa, int threads) {
  const PackRows pack = functions_for(isa).rows;
  over_strips(features.width, threads, [&](int64_t first, int64_t last) { pack(features, rounded, out, first, last); });
}

void correlation_pack_tiles(const Features& features, const TileForm& form, int64_t filled, char* const* chunks,
                            Isa isa, int threads) {
  const PackTiles pack = functions_for(isa).tiles;
  over_strips(features.width, threads,
              [&](int64_t first, int64_t last) { pack(features, form, filled, chunks, first, last); });
}

void correlation_accumulate_ring(const Features& features, const Ring& ring, Isa isa, int threads) {
  const AccumulateRing accumulate = functions_for(isa).ring;
  over_strips(features.width, threads, [&](int64_t first, int64_t last) { accumulate(features, ring, first, last); });
}

int64_t correlation_chunk_bytes(const TileForm& form) { return ChunkLayout(form).bytes; }

}  // namespace ffmerge
