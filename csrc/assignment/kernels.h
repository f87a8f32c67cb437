// The inner loops of the assignment solvers, one set per instruction set; every set gives bit-identical results.
#pragma once

#include "common/cpu.h"

namespace ffmerge {

struct BestTwo {
  float best;
  float second;
  int column;  // of the best; the lowest one among equals
};

// `sign` is 1, or -1 to minimise: sign * score is exact. The worth of a column to a row is sign * score - price.
struct AssignmentKernels {
  // Smallest and largest of row[0 .. d). False if there is a NaN, which they do not show.
  bool (*range)(const float* row, int d, float* low, float* high);

  // The columns of largest worth, ascending, with sign * score: at least `wanted` (<= 32), normally less than half as
  // many again. Every column left out is worth less than *bound, in exact arithmetic too. Needs d >= 64; room for d + 16.
  int (*select)(const float* row, float sign, const float* price, int d, int wanted, int* columns, float* values,
                float* bound);

  // Best and second best worth in a list; `count` is a multiple of 16, padding has the value -inf.
  BestTwo (*best_two)(const int* columns, const float* values, int count, const float* price);

  // Largest worth in a whole row, in float64.
  double (*best)(const float* row, float sign, const double* price, int d);
};

const AssignmentKernels& assignment_kernels(Isa isa);

}  // namespace ffmerge
