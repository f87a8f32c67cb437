// Exact linear assignment of float32 and float64 matrices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu.h"

namespace ffmerge {

// How the matrices of a batch lie in memory, in elements.
struct AssignmentShape {
  int64_t batch;
  int d;
  ptrdiff_t batch_stride;
  ptrdiff_t row_stride;
  bool transposed;  // the contiguous dimension is the first one: rows of the problem are columns in memory
};

// For each matrix the permutation [d] with the largest (minimize: smallest) sum of scores[i, permutation[i]], that sum,
// and how far it can be from the optimum at most, as a fraction of max(|sum|, largest |score|): LP duality, in float64.
// Matrices are shared among `threads`; results do not depend on it, nor on `isa`. Of a
// matrix with NaN or Inf the sum and the gap are NaN.
template <class T>
void assignment_solve(const T* scores, const AssignmentShape& shape, bool minimize, Isa isa, int threads,
                      int64_t* permutation, double* objective, double* gap);

}  // namespace ffmerge
