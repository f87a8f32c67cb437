// A feed-forward network for few tokens: y = down(act(up x)), or down(act(gate x) · up x), read once from memory; and
// the activation of many tokens with its gradient, each in one pass.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "common/dtype.h"

namespace ffmerge {

// A weight of the FFN's dtype, where it lies: rows of inputs, one for each output, or transposed, a row of outputs for
// each input. Rows are `stride` elements apart. bias: [outputs], or null.
struct FFNWeight {
  const void* data;
  const void* bias;
  int64_t outputs, inputs, stride;
  bool transposed;
};

struct FFN {
  FFNWeight up, gate, down;  // gate.data is null in a plain FFN
  Dtype dtype;
  Activation activation;
};

// The matrix unit, for bfloat16 and up to 16 tokens. `emulated` runs the same schedule without one, bit for bit.
enum class Tiles : int { none = 0, amx = 1, emulated = 2 };

// y [tokens, down.outputs] of x [tokens, up.inputs], rows `x_stride` apart; both in the FFN's dtype. Sums and activation
// are float32, and so are the hidden features, except on a matrix unit, which takes bfloat16.
void shared_ffn_decode(const FFN& ffn, const void* x, int64_t tokens, int64_t x_stride, void* y, Isa isa, Tiles tiles,
                       int threads);

// hidden = act(up), or act(gate) · up if gate is not null. All [count] of one dtype; hidden may be one of the others.
void shared_ffn_activate(Activation activation, Dtype dtype, const void* up, const void* gate, void* hidden,
                         int64_t count, Isa isa, int threads);

// From d_hidden and the pre-activations: d_up, d_gate (gated only) and, unless null, hidden, which backward needs for
// the gradient of down. Outputs may be the memory of any input.
void shared_ffn_activate_backward(Activation activation, Dtype dtype, const void* d_hidden, const void* up,
                                  const void* gate, void* d_up, void* d_gate, void* hidden, int64_t count, Isa isa,
                                  int threads);

}  // namespace ffmerge
