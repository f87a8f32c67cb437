// The inner loops of the FFN, one set per instruction set. float32 throughout; other types are converted on the way.
#pragma once

#include "shared_ffn/shared_ffn.h"

namespace ffmerge {

constexpr int64_t kElements = 512;  // of elementwise kernels: a piece that stays in the first cache while it is worked on

struct FFNKernels {
  // out [tokens, last - first] = x [tokens, inputs] · weightᵀ + bias, for the outputs first ... last.
  // Behind out there is room for as much again.
  void (*multiply)(const FFNWeight& weight, Dtype dtype, const float* x, int64_t x_stride, int64_t tokens,
                   int64_t first, int64_t last, float* out);
  // values = act(values), or act(gate) · values.
  void (*activate)(Activation activation, float* values, const float* gate, int64_t count);
  // Elementwise, see shared_ffn.h; count <= kElements and everything in float32.
  void (*activate_backward)(Activation activation, const float* d_hidden, const float* up, const float* gate,
                            float* d_up, float* d_gate, float* hidden, int64_t count);
  void (*load)(const void* from, Dtype dtype, float* to, int64_t count);
  void (*store)(const float* from, void* to, Dtype dtype, int64_t count);
};

const FFNKernels& shared_ffn_kernels(Isa isa);

}  // namespace ffmerge
