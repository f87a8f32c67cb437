// The selected part of a projection P = S + Δ: what the product with Δ is added to, and what is scattered behind it.
#pragma once

#include <cstdint>

namespace ffmerge {

// Both throw std::out_of_range, before anything is written, for an index outside of the matrix.

struct Strides {
  int64_t row, column;  // in elements
};

// out[i, j] = x[rows[i], columns[j]] + residual[i, j]; a null index is i (or j), a null residual is 0.
struct Selection {
  int64_t height, width;  // of out, whose rows are contiguous
  int64_t x_height, x_width;
  const float* x;
  Strides x_strides;
  const int64_t *rows, *columns;
  const float* residual;
  Strides residual_strides;
  float* out;
  int64_t out_stride;
};
void projection_select_f32(const Selection& selection, int threads);

// out[rows[i], columns[j]] += y[i, j]; no row and no column occurs twice.
struct Scatter {
  int64_t height, width;          // of y
  int64_t out_height, out_width;
  const float* y;
  Strides y_strides;
  const int64_t *rows, *columns;
  float* out;  // rows contiguous
  int64_t out_stride;
};
void projection_scatter_f32(const Scatter& scatter, int threads);

}  // namespace ffmerge
