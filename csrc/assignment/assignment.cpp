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

template <class T>
ScoreRange range_of(const ScoreView<T>& scores, Isa isa) {
  ScoreRange all;
  for (int i = 0; i < scores.size; ++i) {
    T low = scores.row(i)[0], high = low;
    bool no_nan = true;
    if constexpr (std::is_same_v<T, float>) {
      no_nan = assignment_kernels(isa).range(scores.row(i), scores.size, &low, &high);
    } else {
      for (int j = 0; j < scores.size; ++j) {
        const T score = scores.row(i)[j];
        low = std::min(low, score);
        high = std::max(high, score);
        no_nan &= score == score;
      }
    }
    all.include(low, high, no_nan);
  }
  return all;
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
  if (!solve(scores, isa, matching, range)) {
    std::iota(permutation, permutation + d, 0);
    *objective = *gap = NAN;
    return;
  }
  double excess = 0;  // dual bound - objective, summed row by row: terms of equal size, most of them 0
  for (int i = 0; i < d; ++i) {
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
