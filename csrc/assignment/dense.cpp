#include "assignment/dense.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "assignment/kernels.h"

#if FFMERGE_X86
#include <immintrin.h>
#endif

namespace ffmerge {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// --- the two inner loops

// Lengthens paths by row i: through column j the distance is price - score - offset, kept where it is shorter than
// before. Returns the smallest distance of all columns. Closed columns have price and distance +inf.
template <class T>
double relax_portable(const T* row, T sign, const double* price, int d, double offset, double nearest, int i,
                      double* distance, int* previous) {
  double smallest = kInf;
  for (int j = 0; j < d; ++j) {
    double through = price[j] - static_cast<double>(sign * row[j]) - offset;
    through = through < nearest ? nearest : through;  // rounding must not lead back
    if (through < distance[j]) {
      distance[j] = through;
      previous[j] = i;
    }
    smallest = distance[j] < smallest ? distance[j] : smallest;
  }
  return smallest;
}

#if FFMERGE_X86

// Four columns at a time. The product with the sign is exact: fmsub rounds as the plain loop does.
__attribute__((target("avx2,fma"))) double relax_avx2(const float* row, float sign, const double* price, int d,
                                                      double offset, double nearest, int i, double* distance,
                                                      int* previous) {
  const __m256d minus_sign = _mm256_set1_pd(-sign), offsets = _mm256_set1_pd(offset), floor = _mm256_set1_pd(nearest);
  const __m128i index = _mm_set1_epi32(i);
  const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  __m256d smallest = _mm256_set1_pd(kInf);
  int j = 0;
  for (; j + 4 <= d; j += 4) {
    const __m256d score = _mm256_cvtps_pd(_mm_loadu_ps(row + j));
    const __m256d raw = _mm256_sub_pd(_mm256_fmadd_pd(score, minus_sign, _mm256_loadu_pd(price + j)), offsets);
    const __m256d through = _mm256_max_pd(raw, floor), before = _mm256_loadu_pd(distance + j);
    const __m256d shorter = _mm256_cmp_pd(through, before, _CMP_LT_OQ);
    const __m256d after = _mm256_min_pd(through, before);
    smallest = _mm256_min_pd(after, smallest);
    _mm256_storeu_pd(distance + j, after);
    const __m128i mask =
        _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(_mm256_castpd_si256(shorter), low_halves));
    __m128i* rows = reinterpret_cast<__m128i*>(previous + j);
    _mm_storeu_si128(rows, _mm_blendv_epi8(_mm_loadu_si128(rows), index, mask));  // a masked store is slow on AMD
  }
  alignas(32) double lanes[4];
  _mm256_store_pd(lanes, smallest);
  const double rest = relax_portable(row + j, sign, price + j, d - j, offset, nearest, i, distance + j, previous + j);
  return std::min({lanes[0], lanes[1], lanes[2], lanes[3], rest});
}

#endif

template <class T>
double relax(Isa isa, const T* row, T sign, const double* price, int d, double offset, double nearest, int i,
             double* distance, int* previous) {
#if FFMERGE_X86
  if constexpr (std::is_same_v<T, float>) {
    if (isa >= Isa::avx2) return relax_avx2(row, sign, price, d, offset, nearest, i, distance, previous);
  }
#endif
  return relax_portable(row, sign, price, d, offset, nearest, i, distance, previous);
}

template <class T>
class DenseSolver {
 public:
  DenseSolver(const ScoreView<T>& scores, Isa isa, Matching& matching)
      : scores_(scores), d_(scores.size), isa_(isa), m_(matching) {}

  void run() {
    std::vector<int> rows = take_free_best();
    for (int sweep = 0; sweep < 2 && !rows.empty(); ++sweep) rows = augment_rows(rows);
    if (rows.empty()) return;
    distance_.resize(d_);
    previous_.resize(d_);
    for (int row : rows) augment_shortest(row);
  }

 private:
  double worth(const T* row, int j) const { return static_cast<double>(scores_.sign * row[j]) - m_.price[j]; }

  // Each row, in order, takes the lowest free column among its best. Equal scores throughout: the identity.
  std::vector<int> take_free_best() {
    std::vector<int> left;
    for (int i = 0; i < d_; ++i) {
      const T* row = scores_.row(i);
      const double best = assignment_best_worth(scores_, i, m_.price.data(), isa_);
      int column = 0;
      while (column < d_ && (m_.row_of[column] >= 0 || worth(row, column) != best)) ++column;
      if (column < d_) {
        m_.assign(i, column);
      } else {
        left.push_back(i);
      }
    }
    return left;
  }

  // Jonker and Volgenant's augmenting row reduction: a row takes its best column, raising the price to its second best.
  std::vector<int> augment_rows(const std::vector<int>& rows) {
    std::vector<int> left;
    int64_t budget = 4 * static_cast<int64_t>(d_);
    for (int i : rows) {
      while (i >= 0) {
        const T* row = scores_.row(i);
        double best = -kInf, second = -kInf;
        int column = -1, other = -1;
        for (int j = 0; j < d_; ++j) {
          const double w = worth(row, j);
          if (w > second) {
            if (w > best) {
              second = best;
              other = column;
              best = w;
              column = j;
            } else {
              second = w;
              other = j;
            }
          }
        }
        const double before = m_.price[column];
        if (other >= 0) m_.price[column] += best - second;
        const bool rises = m_.price[column] > before;
        if (!rises && m_.row_of[column] >= 0 && other >= 0) column = other;
        const int displaced = m_.row_of[column];
        m_.assign(i, column);
        if (displaced >= 0) m_.column_of[displaced] = -1;
        i = displaced;
        if (displaced >= 0 && (!rises || --budget < 0)) {
          left.push_back(displaced);
          break;
        }
      }
    }
    return left;
  }

  // Dijkstra from one row over reduced costs; columns at equal distance are scanned together, a free one ends it.
  void augment_shortest(int start) {
    std::fill(distance_.begin(), distance_.end(), kInf);
    open_price_ = m_.price;
    closed_.clear();
    reached_.clear();
    double nearest = -kInf;
    double next = scan(start, 0.0, nearest);
    int end = -1;
    for (size_t q = 0;; ++q) {
      if (q == closed_.size() || next == nearest) {
        nearest = next;
        end = close_nearest(nearest);
        if (end >= 0) break;
      }
      const int column = closed_[q];
      const int row = m_.row_of[column];
      next = scan(row, -worth(scores_.row(row), column) - nearest, nearest);
    }
    for (size_t q = 0; q < closed_.size(); ++q) m_.price[closed_[q]] += nearest - reached_[q];
    for (int column = end;;) {
      const int row = previous_[column];
      const int before = m_.column_of[row];
      m_.assign(row, column);
      if (row == start) break;
      column = before;
    }
  }

  double scan(int row, double offset, double nearest) {
    return relax(isa_, scores_.row(row), scores_.sign, open_price_.data(), d_, offset, nearest, row, distance_.data(),
                 previous_.data());
  }

  // Closes the columns at this distance, in order, until one is free: returns that, else -1.
  int close_nearest(double nearest) {
    constexpr int kBlock = 16;
    for (int first = 0; first < d_; first += kBlock) {
      const int last = std::min(first + kBlock, d_);
      int hits = 0;
      for (int j = first; j < last; ++j) hits += distance_[j] == nearest;
      for (int j = first; hits > 0; ++j) {
        if (distance_[j] != nearest) continue;
        --hits;
        if (m_.row_of[j] < 0) return j;
        open_price_[j] = distance_[j] = kInf;
        closed_.push_back(j);
        reached_.push_back(nearest);
      }
    }
    return -1;
  }

  const ScoreView<T>& scores_;
  const int d_;
  const Isa isa_;
  Matching& m_;
  std::vector<double> distance_, open_price_;  // of each column; +inf once it is closed
  std::vector<int> previous_;                  // the row before a column
  std::vector<int> closed_;                    // columns in the order of scanning
  std::vector<double> reached_;                // and their distances
};

}  // namespace

template <class T>
double assignment_best_worth(const ScoreView<T>& scores, int i, const double* price, Isa isa) {
  if constexpr (std::is_same_v<T, float>) {
    return assignment_kernels(isa).best(scores.row(i), scores.sign, price, scores.size);
  } else {
    double best = -kInf;
    for (int j = 0; j < scores.size; ++j) best = std::max(best, scores.sign * scores.row(i)[j] - price[j]);
    return best;
  }
}

template <class T>
void assignment_solve_dense(const ScoreView<T>& scores, Isa isa, Matching& matching) {
  matching = Matching(scores.size);
  DenseSolver<T>(scores, isa, matching).run();
}

template double assignment_best_worth(const ScoreView<float>&, int, const double*, Isa);
template double assignment_best_worth(const ScoreView<double>&, int, const double*, Isa);
template void assignment_solve_dense(const ScoreView<float>&, Isa, Matching&);
template void assignment_solve_dense(const ScoreView<double>&, Isa, Matching&);

}  // namespace ffmerge
