#include "projection/projection.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"

namespace ffmerge {
namespace {

constexpr int64_t kRows = 32;
constexpr int64_t kColumns = 128;

// Offsets of entries 0 ... count - 1 of an axis of `limit` entries, in elements.
std::vector<int64_t> offsets(const int64_t* index, int64_t count, int64_t limit, int64_t stride) {
  std::vector<int64_t> found(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = index ? index[i] : i;
    if (at < 0 || at >= limit)
      throw std::out_of_range("projection: index " + std::to_string(at) + " of an axis of " + std::to_string(limit));
    found[i] = at * stride;
  }
  return found;
}

// visit(i, end_i, j, end_j) for tiles of a matrix. A row belongs to one thread.
template <class Visit>
void for_tiles(int64_t height, int64_t width, int threads, Visit visit) {
  parallel_for((height + kRows - 1) / kRows, threads, [&] {
    return [&](int64_t group) {
      const int64_t i = group * kRows, end_i = std::min(height, i + kRows);
      for (int64_t j = 0; j < width; j += kColumns) visit(i, end_i, j, std::min(width, j + kColumns));
    };
  });
}

}  // namespace

// A tile is read in the order in which x lies, and written along rows: where x is stored by columns the cache could not
// hold a tile's lines, which are 4 KiB apart in many matrices and so compete for the same few places.
void projection_select_f32(const Selection& s, int threads) {
  const auto rows = offsets(s.rows, s.height, s.x_height, s.x_strides.row);
  const auto columns = offsets(s.columns, s.width, s.x_width, s.x_strides.column);
  const bool as_it_lies = !s.columns && s.x_strides.column == 1;
  const bool by_columns = s.x_strides.row < s.x_strides.column;
  for_tiles(s.height, s.width, threads, [&](int64_t top, int64_t end_i, int64_t left, int64_t end_j) {
    float tile[kRows][kColumns];
    if (as_it_lies) {
      // Nothing to collect.
    } else if (by_columns) {
      for (int64_t j = left; j < end_j; ++j) {
        for (int64_t i = top; i < end_i; ++i) tile[i - top][j - left] = s.x[rows[i] + columns[j]];
      }
    } else {
      for (int64_t i = top; i < end_i; ++i) {
        for (int64_t j = left; j < end_j; ++j) tile[i - top][j - left] = s.x[rows[i] + columns[j]];
      }
    }
    for (int64_t i = top; i < end_i; ++i) {
      float* out = s.out + i * s.out_stride + left;
      const float* from = as_it_lies ? s.x + rows[i] + left : tile[i - top];
      std::copy(from, from + (end_j - left), out);
      if (!s.residual) continue;
      const float* residual = s.residual + i * s.residual_strides.row + left * s.residual_strides.column;
      for (int64_t j = 0; j < end_j - left; ++j) out[j] += residual[j * s.residual_strides.column];
    }
  });
}

void projection_scatter_f32(const Scatter& s, int threads) {
  const auto rows = offsets(s.rows, s.height, s.out_height, s.out_stride);
  const auto columns = offsets(s.columns, s.width, s.out_width, 1);
  for_tiles(s.height, s.width, threads, [&](int64_t top, int64_t end_i, int64_t left, int64_t end_j) {
    for (int64_t i = top; i < end_i; ++i) {
      const float* y = s.y + i * s.y_strides.row;
      float* out = s.out + rows[i];
      for (int64_t j = left; j < end_j; ++j) out[columns[j]] += y[j * s.y_strides.column];
    }
  });
}

}  // namespace ffmerge
