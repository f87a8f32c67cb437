#include "assignment.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "assignment_dense.h"
#include "assignment_kernels.h"
#include "assignment_sparse.h"
#include "common/parallel.h"

namespace ffmerge {
namespace {

// Below this size the whole matrix is in the cache and lists do not pay (measured; float32).
constexpr int kDenseUpTo = 80;

struct Range {
  double low, high;
  double largest() const { return std::max(std::fabs(low), std::fabs(high)); }
};

template <class T>
Range range(const ScoreView<T>& scores, Isa isa) {
  Range all{INFINITY, -INFINITY};
  for (int i = 0; i < scores.size; ++i) {
    T low, high;
    if constexpr (std::is_same_v<T, float>) {
      assignment_kernels(isa).range(scores.row(i), scores.size, &low, &high);
    } else {
      const auto [a, b] = std::minmax_element(scores.row(i), scores.row(i) + scores.size);
      low = *a;
      high = *b;
    }
    all.low = std::min<double>(all.low, low);
    all.high = std::max<double>(all.high, high);
  }
  if (scores.sign < 0) all = {-all.high, -all.low};
  return all;
}

template <class T>
bool solve_sparse(const ScoreView<T>& scores, Isa isa, const Range& range, Matching& matching) {
  if constexpr (std::is_same_v<T, float>) {
    if (scores.size <= kDenseUpTo || range.largest() > kSparseLargest || range.low == range.high) return false;
    return assignment_solve_sparse(scores, isa, matching);
  } else {
    return false;
  }
}

template <class T>
void solve_one(const ScoreView<T>& scores, bool transposed, Isa isa, int64_t* permutation, double* objective,
               double* gap) {
  const int d = scores.size;
  *objective = *gap = 0;
  if (d == 0) return;
  const Range scores_range = range(scores, isa);
  Matching matching(d);
  if (!solve_sparse(scores, isa, scores_range, matching)) {
    assignment_solve_dense(scores, isa, matching);
  }
  double excess = 0;  // dual bound - objective, summed row by row: terms of equal size, most of them 0
  for (int i = 0; i < d; ++i) {
    const int j = matching.column_of[i];
    const double score = static_cast<double>(scores.row(i)[j]);
    excess += assignment_best_worth(scores, i, matching.price.data(), isa) - (scores.sign * score - matching.price[j]);
  }
  const std::vector<int>& columns = transposed ? matching.row_of : matching.column_of;
  for (int i = 0; i < d; ++i) {
    permutation[i] = columns[i];
    *objective += static_cast<double>(transposed ? scores.row(columns[i])[i] : scores.row(i)[columns[i]]);
  }
  const double scale = std::max(std::fabs(*objective), scores_range.largest());
  *gap = scale > 0 ? std::max(excess, 0.0) / scale : 0.0;
}

}  // namespace

template <class T>
void assignment_solve(const T* scores, const AssignmentShape& shape, bool minimize, Isa isa, int threads,
                      int64_t* permutation, double* objective, double* gap) {
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
