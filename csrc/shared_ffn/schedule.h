// The schedule of shared_ffn_tiles.h. Compiled once for AMX and once for its emulation; no templates of the standard
// library here, since a linker may keep the copy compiled for the wrong processor.
//
// Tiles 0..3 collect the sums of four strips over all steps; 4 holds the inputs of a step, 5 to 7 take turns with the
// weight.
#pragma once

#include "common/inline.h"
#include "shared_ffn/tiles.h"

namespace ffmerge {
namespace {

template <class Tiles>
class StripWorker {
 public:
  StripWorker(const FFNWeight& weight, int64_t first, int64_t last)
      : weight_(weight), data_(static_cast<const uint16_t*>(weight.data)), first_(first), last_(last) {
    tiles_.begin();
  }
  ~StripWorker() { tiles_.end(); }

  void run(const uint16_t* packed, float* sums) {
    tiles_.template zero<0>();
    tiles_.template zero<1>();
    tiles_.template zero<2>();
    tiles_.template zero<3>();
    for (int64_t k = 0; k < weight_.inputs; k += kTileStep, packed += kTileOperand) {
      tiles_.template load<4>(packed);
      multiply<0, 5>(k);
      multiply<1, 6>(k);
      multiply<2, 7>(k);
      multiply<3, 5>(k);
    }
    store<0>(sums);
    store<1>(sums);
    store<2>(sums);
    store<3>(sums);
  }

 private:
  static constexpr int64_t kAhead = 256;  // inputs from memory to cache before they are needed: 8 lines of a row

  int64_t left(int strip) const { return last_ - first_ - strip * kTileOutputs; }

  template <int kStrip, int kOperand>
  FFMERGE_INLINE void multiply(int64_t k) {
    if (left(kStrip) <= 0) return;
    if (weight_.transposed) {
      interleave(kStrip, k);
      tiles_.template load<kOperand>(scratch_[kStrip]);
      tiles_.template dpbf16ps<kStrip, 4, kOperand>();
      return;
    }
    const uint16_t* rows = data_ + (first_ + kStrip * kTileOutputs) * weight_.stride + k;
    if (left(kStrip) >= kTileOutputs && weight_.inputs - k >= kTileStep) {
      for (int row = 0; row < kTileOutputs; ++row) FFMERGE_PREFETCH(rows + row * weight_.stride + kAhead);
      tiles_.template load<kOperand>(rows, weight_.stride * 2);
    } else {
      copy_tail(kStrip, k, rows);
      tiles_.template load<kOperand>(scratch_[kStrip]);
    }
    tiles_.template dpbf16ps<kStrip, kOperand, 4>();
  }

  // A tile of which a part is outside of the matrix: there it is 0, for 0 times what lies in memory may be NaN.
  void copy_tail(int strip, int64_t k, const uint16_t* rows) {
    for (int64_t row = 0; row < kTileOutputs; ++row) {
      for (int64_t i = 0; i < kTileStep; ++i) {
        const bool inside = row < left(strip) && k + i < weight_.inputs;
        scratch_[strip][row * kTileStep + i] = inside ? rows[row * weight_.stride + i] : 0;
      }
    }
  }

  // Rows of outputs: two neighbours become one row of pairs.
  FFMERGE_INLINE void interleave(int strip, int64_t k) {
    const uint16_t* column = data_ + first_ + strip * kTileOutputs;
    const int64_t outputs = left(strip) < kTileOutputs ? left(strip) : kTileOutputs;
    uint16_t* to = scratch_[strip];
    for (int64_t pair = 0; pair < kTileStep / 2; ++pair, to += kTileStep) {
      const int64_t even = k + 2 * pair, odd = even + 1;
      const uint16_t *a = column + even * weight_.stride, *b = a + weight_.stride;
      FFMERGE_PREFETCH(a + kTileStep * weight_.stride);
      FFMERGE_PREFETCH(b + kTileStep * weight_.stride);
      if (outputs == kTileOutputs && odd < weight_.inputs) {
        for (int n = 0; n < kTileOutputs; ++n) to[2 * n] = a[n], to[2 * n + 1] = b[n];
      } else {
        for (int n = 0; n < kTileOutputs; ++n) {
          to[2 * n] = n < outputs && even < weight_.inputs ? a[n] : 0;
          to[2 * n + 1] = n < outputs && odd < weight_.inputs ? b[n] : 0;
        }
      }
    }
  }

  template <int kStrip>
  void store(float* sums) {
    if (left(kStrip) > 0) tiles_.template store<kStrip>(sums + kStrip * kTileSums);
  }

  Tiles tiles_;
  const FFNWeight& weight_;
  const uint16_t* data_;
  const int64_t first_, last_;
  alignas(64) uint16_t scratch_[kTileStrips][kTileOperand];
};

}  // namespace
}  // namespace ffmerge
