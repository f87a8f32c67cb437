#include "assignment/kernels.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <limits>

#if FFMERGE_X86
#include <immintrin.h>
#endif

namespace ffmerge {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kGroups = 64;  // select() takes the largest worth of each class of columns j mod 64 ...
constexpr int kHalvings = 24;  // ... and halves an interval until about `wanted` of these 64 lie above the threshold

// The largest threshold found with at least `wanted` group maxima above it; `count_above` is the only vector part.
template <class CountAbove>
float threshold(float low, float high, int wanted, CountAbove count_above) {
  for (int halving = 0; halving < kHalvings; ++halving) {
    const float middle = 0.5f * low + 0.5f * high;
    if (!(middle > low && middle < high)) break;
    const int above = count_above(middle);
    if (above < wanted) {
      high = middle;
      continue;
    }
    low = middle;
    if (above <= wanted + wanted / 8) break;
  }
  return low;
}

int select_tail(const float* row, float sign, const float* price, int first, int d, float bound, int found,
                int* columns, float* values) {
  for (int j = first; j < d; ++j) {
    const float value = sign * row[j];
    if (value - price[j] >= bound) {
      columns[found] = j;
      values[found++] = value;
    }
  }
  return found;
}

namespace portable {

bool range(const float* row, int d, float* low, float* high) {
  float a = kInf, b = -kInf;
  int nans = 0;
  for (int j = 0; j < d; ++j) {
    a = row[j] < a ? row[j] : a;
    b = row[j] > b ? row[j] : b;
    nans += row[j] != row[j];
  }
  *low = a;
  *high = b;
  return nans == 0;
}

int select(const float* row, float sign, const float* price, int d, int wanted, int* columns, float* values,
           float* bound) {
  float top[kGroups];
  std::fill(top, top + kGroups, -kInf);
  for (int j = 0; j + kGroups <= d; j += kGroups) {
    for (int g = 0; g < kGroups; ++g) {
      const float worth = sign * row[j + g] - price[j + g];
      top[g] = worth > top[g] ? worth : top[g];
    }
  }
  *bound = threshold(*std::min_element(top, top + kGroups), *std::max_element(top, top + kGroups), wanted,
                     [&](float t) { return std::count_if(top, top + kGroups, [t](float x) { return x >= t; }); });
  return select_tail(row, sign, price, 0, d, *bound, 0, columns, values);
}

BestTwo best_two(const int* columns, const float* values, int count, const float* price) {
  BestTwo two{-kInf, -kInf, -1};
  for (int q = 0; q < count; ++q) {
    const float worth = values[q] - price[columns[q]];
    if (worth > two.best) {
      two.second = two.best;
      two.best = worth;
      two.column = columns[q];
    } else if (worth > two.second) {
      two.second = worth;
    }
  }
  return two;
}

double best(const float* row, float sign, const double* price, int d) {
  double best = -std::numeric_limits<double>::infinity();
  for (int j = 0; j < d; ++j) best = std::max(best, static_cast<double>(sign * row[j]) - price[j]);
  return best;
}

const AssignmentKernels kernels{range, select, best_two, best};

}  // namespace portable

#if FFMERGE_X86

// Eight columns at a time.
#include "common/target_avx2.inc"
namespace avx2 {

constexpr int kLanes = 8;
using Vec = __m256;
using Ints = __m256i;
using Wide = __m256d;
using Mask = __m256;

inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Wide set(double x) { return _mm256_set1_pd(x); }
inline Ints set(int x) { return _mm256_set1_epi32(x); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Wide load(const double* from) { return _mm256_loadu_pd(from); }
inline Ints load(const int* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Wide load_wide(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
inline Vec gather(const float* from, Ints at) { return _mm256_i32gather_ps(from, at, 4); }

inline Vec subtract(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Wide multiply_subtract(Wide a, Wide b, Wide c) { return _mm256_fmsub_pd(a, b, c); }
inline Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec most(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Wide most(Wide a, Wide b) { return _mm256_max_pd(a, b); }

inline Mask above(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline Mask at_least(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask unordered(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
inline Mask equal(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
inline uint32_t bits(Mask mask) { return _mm256_movemask_ps(mask); }
inline Vec blend(Vec a, Vec b, Mask mask) { return _mm256_blendv_ps(a, b, mask); }
inline Ints blend(Ints a, Ints b, Mask mask) { return _mm256_blendv_epi8(a, b, _mm256_castps_si256(mask)); }

inline float least_of(Vec x) {
  __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_min_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_min_ss(y, _mm_movehdup_ps(y)));
}
inline float most_of(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline double most_of(Wide x) {
  const __m128d y = _mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(_mm_max_sd(y, _mm_unpackhi_pd(y, y)));
}
inline int least_of(Ints x) {
  __m128i y = _mm_min_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_min_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

// The columns first + (set bits of hits), one by one.
inline int append(uint32_t hits, const float* row, float sign, int first, int* columns, float* values, int found) {
  for (; hits; hits &= hits - 1) {
    const int column = first + __builtin_ctz(hits);
    columns[found] = column;
    values[found++] = sign * row[column];
  }
  return found;
}

#include "assignment/kernels.inc"
}  // namespace avx2
#include "common/target_end.inc"

// Sixteen columns at a time, hits written by compress instead of one by one.
#include "common/target_avx512.inc"
namespace avx512 {

constexpr int kLanes = 16;
using Vec = __m512;
using Ints = __m512i;
using Wide = __m512d;
using Mask = __mmask16;

inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Wide set(double x) { return _mm512_set1_pd(x); }
inline Ints set(int x) { return _mm512_set1_epi32(x); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Wide load(const double* from) { return _mm512_loadu_pd(from); }
inline Ints load(const int* from) { return _mm512_loadu_si512(from); }
inline Wide load_wide(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
inline Vec gather(const float* from, Ints at) { return _mm512_i32gather_ps(at, from, 4); }

inline Vec subtract(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline Wide multiply_subtract(Wide a, Wide b, Wide c) { return _mm512_fmsub_pd(a, b, c); }
inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec most(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Wide most(Wide a, Wide b) { return _mm512_max_pd(a, b); }

inline Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask unordered(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline Mask equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline uint32_t bits(Mask mask) { return mask; }
inline Vec blend(Vec a, Vec b, Mask mask) { return _mm512_mask_mov_ps(a, mask, b); }
inline Ints blend(Ints a, Ints b, Mask mask) { return _mm512_mask_mov_epi32(a, mask, b); }

inline float least_of(Vec x) { return _mm512_reduce_min_ps(x); }
inline float most_of(Vec x) { return _mm512_reduce_max_ps(x); }
inline double most_of(Wide x) { return _mm512_reduce_max_pd(x); }
inline int least_of(Ints x) { return _mm512_reduce_min_epi32(x); }

inline int append(uint32_t hits, const float* row, float sign, int first, int* columns, float* values, int found) {
  const Ints lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; hits; hits >>= kLanes, first += kLanes) {
    const Mask some = static_cast<Mask>(hits);
    // Stored whole, into the room behind: on AMD a masked compress to memory takes longer than the rest of the loop.
    _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(some, _mm512_mul_ps(load(row + first), set(sign))));
    _mm512_storeu_si512(columns + found, _mm512_maskz_compress_epi32(some, _mm512_add_epi32(lane, set(first))));
    found += __builtin_popcount(some);
  }
  return found;
}

#include "assignment/kernels.inc"
}  // namespace avx512
#include "common/target_end.inc"

#endif  // FFMERGE_X86

}  // namespace

const AssignmentKernels& assignment_kernels([[maybe_unused]] Isa isa) {
#if FFMERGE_X86
  if (isa >= Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace ffmerge
