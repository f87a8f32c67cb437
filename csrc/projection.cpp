#include "projection.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"

namespace ffmerge {
namespace {

// A tile is few columns wide: down the columns of a matrix whose rows are 4 KiB apart, L1 has room for eight lines.
constexpr int64_t kRows = 32;
constexpr int64_t kColumns = 16;

// Offsets of entries 0 ... count - 1 of an axis, in elements.
std::vector<int64_t> offsets(const int64_t* index, int64_t count, int64_t stride) {
  std::vector<int64_t> found(count);
  for (int64_t i = 0; i < count; ++i) found[i] = (index ? index[i] : i) * stride;
  return found;
}

// visit(i, first, last) for rows in groups of kRows, each group tile by tile. A row belongs to one thread.
template <class Visit>
void for_tiles(int64_t height, int64_t width, int threads, Visit visit) {
  parallel_for((height + kRows - 1) / kRows, threads, [&] {
    return [&](int64_t group) {
      const int64_t last_row = std::min(height, (group + 1) * kRows);
      for (int64_t first = 0; first < width; first += kColumns) {
        const int64_t last = std::min(width, first + kColumns);
        for (int64_t i = group * kRows; i < last_row; ++i) visit(i, first, last);
      }
    };
  });
}

}  // namespace

void projection_select_f32(const Selection& s, int threads) {
  const auto rows = offsets(s.rows, s.height, s.x_strides.row);
  const auto columns = offsets(s.columns, s.width, s.x_strides.column);
  const bool plain = !s.columns && s.x_strides.column == 1;
  for_tiles(s.height, s.width, threads, [&](int64_t i, int64_t first, int64_t last) {
    const float* x = s.x + rows[i];
    float* out = s.out + i * s.out_stride;
    if (plain) {
      std::copy(x + first, x + last, out + first);
    } else {
      for (int64_t j = first; j < last; ++j) out[j] = x[columns[j]];
    }
    if (!s.residual) return;
    const float* residual = s.residual + i * s.residual_strides.row;
    for (int64_t j = first; j < last; ++j) out[j] += residual[j * s.residual_strides.column];
  });
}

void projection_scatter_f32(const Scatter& s, int threads) {
  const auto rows = offsets(s.rows, s.height, s.out_stride);
  const auto columns = offsets(s.columns, s.width, 1);
  for_tiles(s.height, s.width, threads, [&](int64_t i, int64_t first, int64_t last) {
    const float* y = s.y + i * s.y_strides.row;
    float* out = s.out + rows[i];
    for (int64_t j = first; j < last; ++j) out[columns[j]] += y[j * s.y_strides.column];
  });
}

}  // namespace ffmerge
