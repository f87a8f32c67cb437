#include "assignment/kernels.h"

#include <algorithm>
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

// --- portable

bool range_portable(const float* row, int d, float* low, float* high) {
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

int select_portable(const float* row, float sign, const float* price, int d, int wanted, int* columns, float* values,
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

BestTwo best_two_portable(const int* columns, const float* values, int count, const float* price) {
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

double best_portable(const float* row, float sign, const double* price, int d) {
  double best = -std::numeric_limits<double>::infinity();
  for (int j = 0; j < d; ++j) best = std::max(best, static_cast<double>(sign * row[j]) - price[j]);
  return best;
}

#if FFMERGE_X86

// --- AVX2: eight columns at a time; fmsub(row, sign, price) rounds once, as the product is exact

#define FFMERGE_AVX2 __attribute__((target("avx2,fma")))

FFMERGE_AVX2 inline float reduce_max(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

FFMERGE_AVX2 inline float reduce_min(__m256 x) {
  __m128 y = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_min_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_min_ss(y, _mm_movehdup_ps(y)));
}

FFMERGE_AVX2 bool range_avx2(const float* row, int d, float* low, float* high) {
  __m256 a0 = _mm256_set1_ps(kInf), a1 = a0, b0 = _mm256_set1_ps(-kInf), b1 = b0, nans = _mm256_setzero_ps();
  int j = 0;
  for (; j + 16 <= d; j += 16) {
    const __m256 x = _mm256_loadu_ps(row + j), y = _mm256_loadu_ps(row + j + 8);
    a0 = _mm256_min_ps(x, a0);
    a1 = _mm256_min_ps(y, a1);
    b0 = _mm256_max_ps(x, b0);
    b1 = _mm256_max_ps(y, b1);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(x, y, _CMP_UNORD_Q));
  }
  float rest_low, rest_high;
  const bool rest = range_portable(row + j, d - j, &rest_low, &rest_high);
  *low = std::min(rest_low, reduce_min(_mm256_min_ps(a0, a1)));
  *high = std::max(rest_high, reduce_max(_mm256_max_ps(b0, b1)));
  return rest && _mm256_movemask_ps(nans) == 0;
}

FFMERGE_AVX2 inline int count_above_avx2(const __m256* top, float t) {
  const __m256 tv = _mm256_set1_ps(t);
  int count = 0;
  for (int g = 0; g < kGroups / 8; ++g) {
    count += __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(top[g], tv, _CMP_GE_OQ)));
  }
  return count;
}

FFMERGE_AVX2 int select_avx2(const float* row, float sign, const float* price, int d, int wanted, int* columns,
                             float* values, float* bound) {
  const __m256 sv = _mm256_set1_ps(sign);
  __m256 top[kGroups / 8];
  for (__m256& t : top) t = _mm256_set1_ps(-kInf);
  for (int j = 0; j + kGroups <= d; j += kGroups) {
    for (int g = 0; g < kGroups / 8; ++g) {
      const __m256 worth =
          _mm256_fmsub_ps(_mm256_loadu_ps(row + j + 8 * g), sv, _mm256_loadu_ps(price + j + 8 * g));
      top[g] = _mm256_max_ps(worth, top[g]);
    }
  }
  __m256 low = top[0], high = top[0];
  for (int g = 1; g < kGroups / 8; ++g) {
    low = _mm256_min_ps(low, top[g]);
    high = _mm256_max_ps(high, top[g]);
  }
  struct CountAbove {
    const __m256* top;
    FFMERGE_AVX2 int operator()(float t) const { return count_above_avx2(top, t); }
  };
  *bound = threshold(reduce_min(low), reduce_max(high), wanted, CountAbove{top});
  const __m256 tv = _mm256_set1_ps(*bound);
  int found = 0, j = 0;
  for (; j + 32 <= d; j += 32) {
    unsigned hits = 0;
    for (int g = 0; g < 4; ++g) {
      const __m256 worth =
          _mm256_fmsub_ps(_mm256_loadu_ps(row + j + 8 * g), sv, _mm256_loadu_ps(price + j + 8 * g));
      hits |= static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(worth, tv, _CMP_GE_OQ))) << (8 * g);
    }
    for (; hits; hits &= hits - 1) {
      const int column = j + __builtin_ctz(hits);
      columns[found] = column;
      values[found++] = sign * row[column];
    }
  }
  return select_tail(row, sign, price, j, d, *bound, found, columns, values);
}

FFMERGE_AVX2 BestTwo best_two_avx2(const int* columns, const float* values, int count, const float* price) {
  __m256 best = _mm256_set1_ps(-kInf), second = best;
  __m256i at = _mm256_set1_epi32(-1);
  for (int q = 0; q < count; q += 8) {
    const __m256i column = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + q));
    const __m256 worth = _mm256_sub_ps(_mm256_loadu_ps(values + q), _mm256_i32gather_ps(price, column, 4));
    second = _mm256_max_ps(second, _mm256_min_ps(worth, best));
    const __m256 better = _mm256_cmp_ps(worth, best, _CMP_GT_OQ);
    best = _mm256_max_ps(worth, best);
    at = _mm256_blendv_epi8(at, column, _mm256_castps_si256(better));
  }
  const float top = reduce_max(best);
  alignas(32) float lane_best[8], lane_second[8];
  alignas(32) int lane_at[8];
  _mm256_store_ps(lane_best, best);
  _mm256_store_ps(lane_second, second);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane_at), at);
  unsigned ties = _mm256_movemask_ps(_mm256_cmp_ps(best, _mm256_set1_ps(top), _CMP_EQ_OQ));
  int winner = __builtin_ctz(ties);
  for (ties &= ties - 1; ties; ties &= ties - 1) {
    const int lane = __builtin_ctz(ties);
    if (lane_at[lane] < lane_at[winner]) winner = lane;
  }
  lane_best[winner] = lane_second[winner];
  return {top, reduce_max(_mm256_load_ps(lane_best)), lane_at[winner]};
}

FFMERGE_AVX2 double best_avx2(const float* row, float sign, const double* price, int d) {
  const __m256d sv = _mm256_set1_pd(sign);
  __m256d top[4];
  for (__m256d& t : top) t = _mm256_set1_pd(-std::numeric_limits<double>::infinity());
  int j = 0;
  for (; j + 16 <= d; j += 16) {
    for (int g = 0; g < 4; ++g) {
      const __m256d score = _mm256_cvtps_pd(_mm_loadu_ps(row + j + 4 * g));
      top[g] = _mm256_max_pd(_mm256_fmsub_pd(score, sv, _mm256_loadu_pd(price + j + 4 * g)), top[g]);
    }
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, _mm256_max_pd(_mm256_max_pd(top[0], top[1]), _mm256_max_pd(top[2], top[3])));
  return std::max({lanes[0], lanes[1], lanes[2], lanes[3], best_portable(row + j, sign, price + j, d - j)});
}

// --- AVX-512: sixteen columns at a time, hits written by compress instead of one by one

#define FFMERGE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))

FFMERGE_AVX512 bool range_avx512(const float* row, int d, float* low, float* high) {
  __m512 a0 = _mm512_set1_ps(kInf), a1 = a0, b0 = _mm512_set1_ps(-kInf), b1 = b0;
  unsigned nans = 0;
  int j = 0;
  for (; j + 32 <= d; j += 32) {
    const __m512 x = _mm512_loadu_ps(row + j), y = _mm512_loadu_ps(row + j + 16);
    a0 = _mm512_min_ps(x, a0);
    a1 = _mm512_min_ps(y, a1);
    b0 = _mm512_max_ps(x, b0);
    b1 = _mm512_max_ps(y, b1);
    nans |= _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q);
  }
  float rest_low, rest_high;
  const bool rest = range_portable(row + j, d - j, &rest_low, &rest_high);
  *low = std::min(rest_low, _mm512_reduce_min_ps(_mm512_min_ps(a0, a1)));
  *high = std::max(rest_high, _mm512_reduce_max_ps(_mm512_max_ps(b0, b1)));
  return rest && nans == 0;
}

FFMERGE_AVX512 inline int count_above_avx512(const __m512* top, float t) {
  const __m512 tv = _mm512_set1_ps(t);
  int count = 0;
  for (int g = 0; g < kGroups / 16; ++g) {
    count += __builtin_popcount(_mm512_cmp_ps_mask(top[g], tv, _CMP_GE_OQ));
  }
  return count;
}

FFMERGE_AVX512 int select_avx512(const float* row, float sign, const float* price, int d, int wanted, int* columns,
                                 float* values, float* bound) {
  const __m512 sv = _mm512_set1_ps(sign);
  __m512 top[kGroups / 16];
  for (__m512& t : top) t = _mm512_set1_ps(-kInf);
  for (int j = 0; j + kGroups <= d; j += kGroups) {
    for (int g = 0; g < kGroups / 16; ++g) {
      const __m512 worth =
          _mm512_fmsub_ps(_mm512_loadu_ps(row + j + 16 * g), sv, _mm512_loadu_ps(price + j + 16 * g));
      top[g] = _mm512_max_ps(worth, top[g]);
    }
  }
  __m512 low = top[0], high = top[0];
  for (int g = 1; g < kGroups / 16; ++g) {
    low = _mm512_min_ps(low, top[g]);
    high = _mm512_max_ps(high, top[g]);
  }
  struct CountAbove {
    const __m512* top;
    FFMERGE_AVX512 int operator()(float t) const { return count_above_avx512(top, t); }
  };
  *bound = threshold(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), wanted, CountAbove{top});
  const __m512 tv = _mm512_set1_ps(*bound);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int found = 0, j = 0;
  for (; j + 16 <= d; j += 16) {
    const __m512 score = _mm512_loadu_ps(row + j);
    const __m512 worth = _mm512_fmsub_ps(score, sv, _mm512_loadu_ps(price + j));
    const __mmask16 hits = _mm512_cmp_ps_mask(worth, tv, _CMP_GE_OQ);
    if (!hits) continue;
    _mm512_mask_compressstoreu_ps(values + found, hits, _mm512_mul_ps(score, sv));
    _mm512_mask_compressstoreu_epi32(columns + found, hits, _mm512_add_epi32(lane, _mm512_set1_epi32(j)));
    found += __builtin_popcount(hits);
  }
  return select_tail(row, sign, price, j, d, *bound, found, columns, values);
}

FFMERGE_AVX512 BestTwo best_two_avx512(const int* columns, const float* values, int count, const float* price) {
  __m512 best = _mm512_set1_ps(-kInf), second = best;
  __m512i at = _mm512_set1_epi32(-1);
  for (int q = 0; q < count; q += 16) {
    const __m512i column = _mm512_loadu_si512(columns + q);
    const __m512 worth = _mm512_sub_ps(_mm512_loadu_ps(values + q), _mm512_i32gather_ps(column, price, 4));
    second = _mm512_max_ps(second, _mm512_min_ps(worth, best));
    at = _mm512_mask_mov_epi32(at, _mm512_cmp_ps_mask(worth, best, _CMP_GT_OQ), column);
    best = _mm512_max_ps(worth, best);
  }
  const float top = _mm512_reduce_max_ps(best);
  const __mmask16 ties = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ);
  const int column = _mm512_mask_reduce_min_epi32(ties, at);
  const __mmask16 winner = _mm512_mask_cmpeq_epi32_mask(ties, at, _mm512_set1_epi32(column));
  return {top, _mm512_reduce_max_ps(_mm512_mask_mov_ps(best, winner, second)), column};
}

FFMERGE_AVX512 double best_avx512(const float* row, float sign, const double* price, int d) {
  const __m512d sv = _mm512_set1_pd(sign);
  __m512d top[4];
  for (__m512d& t : top) t = _mm512_set1_pd(-std::numeric_limits<double>::infinity());
  int j = 0;
  for (; j + 32 <= d; j += 32) {
    for (int g = 0; g < 4; ++g) {
      const __m512d score = _mm512_cvtps_pd(_mm256_loadu_ps(row + j + 8 * g));
      top[g] = _mm512_max_pd(_mm512_fmsub_pd(score, sv, _mm512_loadu_pd(price + j + 8 * g)), top[g]);
    }
  }
  const __m512d all = _mm512_max_pd(_mm512_max_pd(top[0], top[1]), _mm512_max_pd(top[2], top[3]));
  return std::max(_mm512_reduce_max_pd(all), best_portable(row + j, sign, price + j, d - j));
}

#endif  // FFMERGE_X86

}  // namespace

const AssignmentKernels& assignment_kernels(Isa isa) {
  static const AssignmentKernels portable{range_portable, select_portable, best_two_portable, best_portable};
#if FFMERGE_X86
  static const AssignmentKernels avx2{range_avx2, select_avx2, best_two_avx2, best_avx2};
  static const AssignmentKernels avx512{range_avx512, select_avx512, best_two_avx512, best_avx512};
  if (isa >= Isa::avx512) return avx512;
  if (isa == Isa::avx2) return avx2;
#endif
  return portable;
}

}  // namespace ffmerge
