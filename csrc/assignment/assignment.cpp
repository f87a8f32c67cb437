#include "assignment/assignment.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "assignment/dense.h"
#include "assignment/kernels.h"
#include "assignment/sparse.h"
#include "common/parallel.h"

namespace ffmerge {
namespace {

// Below this size the whole matrix is in the cache and lists do not pay (measured; float32).
constexpr int kDenseUpTo = 80;

// Scores in a batch below which starting a thread costs more than it saves.
constexpr int64_t kThreadsFrom = 1 << 14;

static_assert(kDenseUpTo >= kSparseSmallest);

// Smallest and largest score of a row. False if there is a NaN.
template <class T>
bool range_of_row(const ScoreView<T>& scores, int i, Isa isa, T& low, T& high) {
  const T* row = scores.row(i);
  if constexpr (std::is_same_v<T, float>) {
    return assignment_kernels(isa).range(row, scores.size, &low, &high);
  } else {
    bool no_nan = true;
    low = high = row[0];
    for (int j = 0; j < scores.size; ++j) {
      low = std::min(low, row[j]);
      high = std::max(high, row[j]);
      no_nan &= row[j] == row[j];
    }
    return no_nan;
  }
}

template <class T>
ScoreRange range_of(const ScoreView<T>& scores, Isa isa) {
  ScoreRange all;
  for (int i = 0; i < scores.size; ++i) {
    T low, high;
    const bool no_nan = range_of_row(scores, i, isa, low, high);
    all.include(low, high, no_nan);
  }
  return all;
}

// The first column of a row that holds `score`, which it does. Whole blocks are compared at once.
template <class T>
int column_with(const T* row, int d, T score) {
  constexpr int kBlock = 32;
  int j = 0;
  for (; j + kBlock <= d; j += kBlock) {
    int hits = 0;
    for (int k = 0; k < kBlock; ++k) hits += row[j + k] == score;
    if (hits > 0) break;
  }
  return static_cast<int>(std::find(row + j, row + d, score) - row);
}

// Each row takes its best column: optimal if no two want the same, and then the matrix was read once. Stops at the
// first conflict, which in other problems comes after about sqrt(d) rows.
template <class T>
bool solve_without_conflict(const ScoreView<T>& scores, Isa isa, Matching& matching, ScoreRange& range) {
  for (int i = 0; i < scores.size; ++i) {
    T low, high;
    if (!range_of_row(scores, i, isa, low, high) || !std::isfinite(low) || !std::isfinite(high)) return false;
    const int column = column_with(scores.row(i), scores.size, scores.sign > 0 ? high : low);
    if (matching.row_of[column] >= 0) return false;
    matching.assign(i, column);
    range.include(low, high, true);
  }
  return true;
}

// False: not solved, and the scores are not finite.
template <class T>
bool solve(const ScoreView<T>& scores, Isa isa, Matching& matching, ScoreRange& range) {
  if constexpr (std::is_same_v<T, float>) {
    if (scores.size > kDenseUpTo && assignment_solve_sparse(scores, isa, matching, range)) return true;
  }
  range = range_of(scores, isa);
  if (!std::isfinite(range.largest())) return false;
  assignment_solve_dense(scores, isa, matching);
  return true;
}

template <class T>
void solve_one(const ScoreView<T>& scores, bool transposed, Isa isa, int64_t* permutation, double* objective,
               double* gap) {
  const int d = scores.size;
  *objective = *gap = 0;
  if (d == 0) return;
  Matching matching(d);
  ScoreRange range;
  const bool easy = solve_without_conflict(scores, isa, matching, range);
  if (!easy) {
    matching = Matching(d);
    range = ScoreRange();
    if (!solve(scores, isa, matching, range)) {
      std::iota(permutation, permutation + d, 0);
      *objective = *gap = NAN;
      return;
    }
  }
  double excess = 0;  // dual bound - objective, summed row by row: terms of equal size, most of them 0
  for (int i = 0; i < d && !easy; ++i) {
    const int j = matching.column_of[i];
    const double score = static_cast<double>(scores.sign * scores.row(i)[j]);
    excess += assignment_best_worth(scores, i, matching.price.data(), isa) - (score - matching.price[j]);
  }
  const std::vector<int>& columns = transposed ? matching.row_of : matching.column_of;
  for (int i = 0; i < d; ++i) {
    permutation[i] = columns[i];
    *objective += static_cast<double>(transposed ? scores.row(columns[i])[i] : scores.row(i)[columns[i]]);
  }
  const double scale = std::max(std::fabs(*objective), range.largest());
  *gap = scale > 0 ? std::max(excess, 0.0) / scale : 0.0;
}

}  // namespace

template <class T>
void assignment_solve(const T* scores, const AssignmentShape& shape, bool minimize, Isa isa, int threads,
                      int64_t* permutation, double* objective, double* gap) {
  if (shape.batch * shape.d * shape.d < kThreadsFrom) threads = 1;
  parallel_for(shape.batch, threads, [&] {
    return [&](int64_t b) {
      const ScoreView<T> view{scores + b * shape.batch_stride, shape.row_stride, shape.d, T(minimize ? -1 : 1)};
      solve_one(view, shape.transposed, isa, permutation + b * shape.d, objective + b, gap + b);
    };
  });
}

template void assignment_solve(const float*, const AssignmentShape&, bool, Isa, int, int64_t*, double*, double*);
template void assignment_solve(const double*, const AssignmentShape&, bool, Isa, int, int64_t*, double*, double*);

}  // namespace ffmerge
