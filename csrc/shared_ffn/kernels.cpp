// The FFN's loops, compiled for every instruction set.
#if defined(__GNUC__) && !defined(__clang__)
// Nobody watches floating-point traps; with them, no select is vectorised. Threading jumps through the clamps of exp
// would make several selects of each.
#pragma GCC optimize("no-trapping-math", "no-thread-jumps")
#endif

#include "shared_ffn/kernels.h"

#include <cstring>

#include "common/inline.h"

#if FFMERGE_X86
#include <immintrin.h>
#endif

namespace ffmerge {
namespace {

namespace portable {
#include "common/float_math.inc"

constexpr int kLanes = 4, kRows = 2;

struct Vec {
  float v[kLanes];
};

template <class Lane>
inline Vec make(Lane lane) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = lane(i);
  return out;
}

inline Vec zero() { return {}; }
inline Vec broadcast(float x) {
  return make([=](int) { return x; });
}
template <class T>
inline Vec load(const T* from) {
  return make([=](int i) { return to_float(from[i]); });
}
inline void store(float* to, Vec x) { std::memcpy(to, x.v, sizeof(x.v)); }
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline float sum_of(Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); }

#include "shared_ffn/kernels.inc"
}  // namespace portable

#if FFMERGE_X86

#include "common/target_avx2.inc"
namespace avx2 {
#include "common/float_math.inc"

constexpr int kLanes = 8, kRows = 3;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const Bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum_of(Vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

#include "shared_ffn/kernels.inc"
}  // namespace avx2
#include "common/target_end.inc"

#include "common/target_avx512.inc"
namespace avx512 {
#include "common/float_math.inc"

constexpr int kLanes = 16, kRows = 6;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const Bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }

#include "shared_ffn/kernels.inc"
}  // namespace avx512
#include "common/target_end.inc"

#endif  // FFMERGE_X86

}  // namespace

const FFNKernels& shared_ffn_kernels([[maybe_unused]] Isa isa) {
#if FFMERGE_X86
  if (isa >= Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace ffmerge
