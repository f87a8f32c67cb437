#include "assignment_dense.h"

#include <algorithm>
#include <limits>

namespace ffmerge {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// --- the two inner loops, plain: compiled once for any CPU and once for AVX2, on which the compiler vectorises them

#if defined(__GNUC__)
#define FFMERGE_INLINE inline __attribute__((always_inline))
#else
#define FFMERGE_INLINE inline
#endif

// Paths to every column through row i: distance = price - score - offset, kept where it is shorter. Closed columns have
// distance -inf, which nothing beats.
template <class T>
FFMERGE_INLINE void relax_loop(const T* row, T sign, const double* price, int d, double offset, double nearest, int i,
                               double* distance, int* previous) {
  for (int j = 0; j < d; ++j) {
    const double raw = price[j] - static_cast<double>(sign * row[j]) - offset;
    const double through = raw < nearest ? nearest : raw;  // rounding must not lead back
    const bool shorter = through < distance[j];
    distance[j] = shorter ? through : distance[j];
    previous[j] = shorter ? i : previous[j];
  }
}

constexpr int kLanes = 8;

// The smallest distance of an open column.
FFMERGE_INLINE double nearest_loop(const double* distance, int d) {
  double lane[kLanes];
  std::fill(lane, lane + kLanes, kInf);
  int j = 0;
  for (; j + kLanes <= d; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const double x = distance[j + l] == -kInf ? kInf : distance[j + l];
      lane[l] = x < lane[l] ? x : lane[l];
    }
  }
  for (; j < d; ++j) {
    if (distance[j] != -kInf) lane[0] = std::min(lane[0], distance[j]);
  }
  return *std::min_element(lane, lane + kLanes);
}

template <class T>
struct Loops {
  void (*relax)(const T*, T, const double*, int, double, double, int, double*, int*);
  double (*nearest)(const double*, int);
};

template <class T>
void relax_portable(const T* row, T sign, const double* price, int d, double offset, double nearest, int i,
                    double* distance, int* previous) {
  relax_loop(row, sign, price, d, offset, nearest, i, distance, previous);
}

double nearest_portable(const double* distance, int d) { return nearest_loop(distance, d); }

#if FFMERGE_X86
template <class T>
__attribute__((target("avx2,fma"))) void relax_avx2(const T* row, T sign, const double* price, int d, double offset,
                                                    double nearest, int i, double* distance, int* previous) {
  relax_loop(row, sign, price, d, offset, nearest, i, distance, previous);
}

__attribute__((target("avx2,fma"))) double nearest_avx2(const double* distance, int d) {
  return nearest_loop(distance, d);
}
#endif

template <class T>
Loops<T> loops(Isa isa) {
#if FFMERGE_X86
  if (isa >= Isa::avx2) return {relax_avx2<T>, nearest_avx2};
#endif
  return {relax_portable<T>, nearest_portable};
}

template <class T>
class DenseSolver {
 public:
  DenseSolver(const ScoreView<T>& scores, Isa isa, Matching& matching)
      : scores_(scores), d_(scores.size), m_(matching), loops_(loops<T>(isa)) {}

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

  // Each free row, in order, takes the lowest free column among its best. Equal scores throughout: the identity.
  std::vector<int> take_free_best() {
    std::vector<int> left;
    for (int i = 0; i < d_; ++i) {
      if (m_.column_of[i] >= 0) continue;
      const T* row = scores_.row(i);
      double best = -kInf;
      int free = -1;
      for (int j = 0; j < d_; ++j) {
        const double w = worth(row, j);
        if (w > best) {
          best = w;
          free = m_.row_of[j] < 0 ? j : -1;
        } else if (w == best && free < 0 && m_.row_of[j] < 0) {
          free = j;
        }
      }
      if (free >= 0) {
        m_.assign(i, free);
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
    queue_.clear();
    reached_.clear();
    double nearest = -kInf;
    int end = scan(start, 0.0, nearest);
    for (size_t next = 0; end < 0; ++next) {
      if (next == queue_.size()) {
        nearest = loops_.nearest(distance_.data(), d_);
        end = close_nearest(nearest);
        if (end >= 0) break;
      }
      const int column = queue_[next];
      const int row = m_.row_of[column];
      end = scan(row, -worth(scores_.row(row), column) - nearest, nearest);
    }
    for (size_t q = 0; q < queue_.size(); ++q) m_.price[queue_[q]] += nearest - reached_[q];
    for (int column = end;;) {
      const int row = previous_[column];
      const int next = m_.column_of[row];
      m_.assign(row, column);
      if (row == start) break;
      column = next;
    }
  }

  // Returns a free column at the distance reached so far, or -1.
  int scan(int row, double offset, double nearest) {
    loops_.relax(scores_.row(row), scores_.sign, m_.price.data(), d_, offset, nearest, row, distance_.data(),
                 previous_.data());
    return nearest == -kInf ? -1 : close_nearest(nearest);
  }

  int close_nearest(double nearest) {
    for (int j = 0; j < d_; ++j) {
      if (distance_[j] != nearest) continue;
      if (m_.row_of[j] < 0) return j;
      distance_[j] = -kInf;
      queue_.push_back(j);
      reached_.push_back(nearest);
    }
    return -1;
  }

  const ScoreView<T>& scores_;
  const int d_;
  Matching& m_;
  const Loops<T> loops_;
  std::vector<double> distance_;  // from the start to each column; -inf: closed
  std::vector<int> previous_;     // the row before a column
  std::vector<int> queue_;        // closed columns, in the order of scanning
  std::vector<double> reached_;   // and their distances
};

}  // namespace

template <class T>
void assignment_start_dense(const ScoreView<T>& scores, Matching& matching) {
  const int d = scores.size;
  matching = Matching(d);
  std::fill(matching.price.begin(), matching.price.end(), -kInf);
  for (int i = 0; i < d; ++i) {
    const T* row = scores.row(i);
    for (int j = 0; j < d; ++j) {
      const double score = static_cast<double>(scores.sign * row[j]);
      matching.price[j] = score > matching.price[j] ? score : matching.price[j];
    }
  }
}

template <class T>
void assignment_complete_dense(const ScoreView<T>& scores, Isa isa, Matching& matching) {
  DenseSolver<T>(scores, isa, matching).run();
}

template void assignment_start_dense(const ScoreView<float>&, Matching&);
template void assignment_start_dense(const ScoreView<double>&, Matching&);
template void assignment_complete_dense(const ScoreView<float>&, Isa, Matching&);
template void assignment_complete_dense(const ScoreView<double>&, Isa, Matching&);

}  // namespace ffmerge
