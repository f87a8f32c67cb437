// Products of tiled features, and accumulators as plain matrices.
#include "correlation/correlation.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "correlation/tiles.h"

namespace ffmerge {
namespace {

// Jobs that share a block of left operands follow each other, over all partners of a layer.
std::vector<TileJob> list_jobs(const std::vector<TileLayer>& layers, const std::vector<TileProduct>& products) {
  std::vector<TileProduct> sorted = products;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& x, const auto& y) { return x.a < y.a; });
  std::vector<TileJob> jobs;
  for (size_t first = 0, last = 0; first < sorted.size(); first = last) {
    const TileLayer& a = layers[sorted[first].a];
    while (last < sorted.size() && sorted[last].a == sorted[first].a) ++last;
    for (int64_t row = 0; row < strips(a.form.width); row += kBlock) {
      for (size_t p = first; p < last; ++p) {
        const TileLayer& b = layers[sorted[p].b];
        const bool symmetric = sorted[p].a == sorted[p].b;
        for (int64_t column = symmetric ? row : 0; column < strips(b.form.width); column += kBlock) {
          jobs.push_back({&a, &b, sorted[p].accumulator, row, column, symmetric});
        }
      }
    }
  }
  return jobs;
}

int64_t take(void* counter) { return (*static_cast<std::atomic<int64_t>*>(counter))++; }

}  // namespace

int64_t correlation_accumulator_bytes(int64_t width_a, int64_t width_b) {
  return strips(width_a) * strips(width_b) * kTileFloats * static_cast<int64_t>(sizeof(float));
}

void correlation_multiply_tiles(const std::vector<TileLayer>& layers, const std::vector<TileProduct>& products,
                                bool emulated, int threads) {
  const std::vector<TileJob> jobs = list_jobs(layers, products);
  const auto count = static_cast<int64_t>(jobs.size());
  const auto run = emulated ? run_tile_jobs_emulated : run_tile_jobs_amx;
  std::atomic<int64_t> counter{0};
  parallel_for(std::min<int64_t>(std::max(threads, 1), count), threads, [&] {
    return [&](int64_t) { run(jobs.data(), count, take, &counter); };
  });
}

// Each thread takes whole strips of rows. Of a symmetric accumulator the tiles below the diagonal are not used.
void correlation_untile(const float* accumulator, int64_t width_a, int64_t width_b, bool symmetric, float* matrix,
                        int threads) {
  const int64_t strips_a = strips(width_a), strips_b = strips(width_b);
  parallel_for(strips_a, threads, [&] {
    return [&](int64_t i) {
      const int64_t rows = std::min(kStrip, width_a - i * kStrip);
      for (int64_t j = 0; j < strips_b; ++j) {
        const bool mirrored = symmetric && i > j;
        const float* tile = accumulator + (mirrored ? tile_index(j, i, strips_a, strips_b)
                                                    : tile_index(i, j, strips_a, strips_b)) * kTileFloats;
        const int64_t columns = std::min(kStrip, width_b - j * kStrip);
        for (int64_t r = 0; r < rows; ++r) {
          float* to = matrix + (i * kStrip + r) * width_b + j * kStrip;
          for (int64_t c = 0; c < columns; ++c) {
            const int64_t y = mirrored ? c : r, x = mirrored ? r : c;
            to[c] = tile[(y / 16 * 2 + x / 16) * 256 + y % 16 * 16 + x % 16];
          }
        }
      }
    };
  });
}

void correlation_tile(const float* matrix, int64_t width_a, int64_t width_b, float* accumulator, int threads) {
  const int64_t strips_a = strips(width_a), strips_b = strips(width_b);
  parallel_for(strips_a, threads, [&] {
    return [&](int64_t i) {
      for (int64_t j = 0; j < strips_b; ++j) {
        float* tile = accumulator + tile_index(i, j, strips_a, strips_b) * kTileFloats;
        for (int64_t r = 0; r < kStrip; ++r) {
          for (int64_t c = 0; c < kStrip; ++c) {
            const int64_t row = i * kStrip + r, column = j * kStrip + c;
            const bool inside = row < width_a && column < width_b;
            tile[(r / 16 * 2 + c / 16) * 256 + r % 16 * 16 + c % 16] = inside ? matrix[row * width_b + column] : 0.0f;
          }
        }
      }
    };
  });
}

}  // namespace ffmerge
