// Shortest augmenting paths on the whole matrix: small problems, ties, extreme scales, and float64 scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "common/cpu.h"

namespace ffmerge {

// A d x d matrix whose rows are contiguous; `sign` is 1, or -1 to minimise.
template <class T>
struct ScoreView {
  const T* data;
  ptrdiff_t row_stride;
  int size;
  T sign;

  const T* row(int i) const { return data + i * row_stride; }
};

// Smallest and largest score. NaN counts as Inf.
struct ScoreRange {
  double low = std::numeric_limits<double>::infinity(), high = -low;

  void include(double row_low, double row_high, bool no_nan) {
    low = no_nan ? std::min(low, row_low) : -std::numeric_limits<double>::infinity();
    high = std::max(high, row_high);
  }
  double largest() const { return std::max(std::fabs(low), std::fabs(high)); }
};

// Prices of the columns and a partial assignment (-1: none) in which every assigned row has a column of largest worth,
// worth being sign * score - price. Complete, it is optimal, whatever the prices.
struct Matching {
  std::vector<double> price;
  std::vector<int> column_of, row_of;

  explicit Matching(int d) : price(d, 0.0), column_of(d, -1), row_of(d, -1) {}
  void assign(int row, int column) {
    column_of[row] = column;
    row_of[column] = row;
  }
};

// The largest worth in row i: what the row adds to the dual bound.
template <class T>
double assignment_best_worth(const ScoreView<T>& scores, int i, const double* price, Isa isa);

// From prices 0: rows greedily, then by augmenting rows, then by one shortest path each (Jonker and Volgenant 1987,
// without the column reduction, which suffers from scales that differ between rows). O(d) extra memory.
template <class T>
void assignment_solve_dense(const ScoreView<T>& scores, Isa isa, Matching& matching);

}  // namespace ffmerge
