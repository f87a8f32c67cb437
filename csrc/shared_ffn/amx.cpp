// The schedule on AMX-BF16.
#include <cstring>

#include "shared_ffn/tiles.h"

#if FFMERGE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#include "common/tiles_amx.h"
#include "shared_ffn/schedule.h"  // inside the region: its loops are compiled for this processor

namespace ffmerge {

void multiply_tiles_amx(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last, float* sums) {
  StripWorker<AmxTiles>(weight, first, last).run(packed, sums);
}

}  // namespace ffmerge

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace ffmerge {

// Never called: no such level on this processor.
void multiply_tiles_amx(const FFNWeight&, const uint16_t*, int64_t, int64_t, float*) {}

}  // namespace ffmerge

#endif  // FFMERGE_X86
