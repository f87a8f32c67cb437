// Two phases, each shared among threads by outputs: the hidden features, then the result. Weights are read where they
// lie; nothing is packed, so no copy of them exists that could be out of date.
#include "shared_ffn.h"

#include <algorithm>
#include <memory>

#include "common/team.h"
#include "shared_ffn_kernels.h"

namespace ffmerge {
namespace {

constexpr int64_t kLine = 16;         // floats of a cache line
constexpr int64_t kRowChunk = 48;     // outputs of a piece of work: any multiple of the rows that a kernel takes at once,
constexpr int64_t kColumnChunk = 512; // or a stretch of memory that is worth reading where outputs are columns
constexpr int64_t kPiece = 32 * kElements;  // of elementwise work

// Floats, 64-byte aligned, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new float[count + kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* data() { return data_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* data_;
};

// Rows of activations: a line longer than they need, for rows at powers of two would share one set of the cache.
int64_t pitch(int64_t width) { return (width + kLine - 1) / kLine * kLine + kLine; }

int64_t chunk_size(const FFNWeight& weight, int threads) {
  if (!weight.transposed) return kRowChunk;
  const int64_t share = (weight.outputs + threads - 1) / threads;
  return std::min(kColumnChunk, (share + kLine - 1) / kLine * kLine);
}

// use(first, last) for chunks of the outputs of a weight.
template <class Use>
void over_outputs(const FFNWeight& weight, int threads, Use use) {
  const int64_t size = chunk_size(weight, std::max(threads, 1));
  team_for((weight.outputs + size - 1) / size, threads, [&](int64_t chunk) {
    use(chunk * size, std::min(chunk * size + size, weight.outputs));
  });
}

// use(first, count, bytes before first) for pieces of `count` elements that fit FFNKernels.
template <class Use>
void over_elements(int64_t count, int threads, Use use) {
  team_for((count + kPiece - 1) / kPiece, threads, [&](int64_t piece) {
    const int64_t end = std::min(piece * kPiece + kPiece, count);
    for (int64_t first = piece * kPiece; first < end; first += kElements) use(first, std::min(kElements, end - first));
  });
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const void* offset(const void* base, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

void* offset(void* base, int64_t elements, Dtype dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

}  // namespace

void shared_ffn_decode(const FFN& ffn, const void* x, int64_t tokens, int64_t x_stride, void* y, Isa isa, int threads) {
  const FFNKernels& kernels = shared_ffn_kernels(isa);
  const int64_t width = ffn.up.inputs, d_ff = ffn.up.outputs, outputs = ffn.down.outputs;
  const int64_t x_pitch = pitch(width), hidden_pitch = pitch(d_ff);
  Buffer inputs(tokens * x_pitch), hidden(tokens * hidden_pitch);
  for (int64_t t = 0; t < tokens; ++t)
    kernels.load(offset(x, t * x_stride, ffn.dtype), ffn.dtype, inputs.data() + t * x_pitch, width);

  over_outputs(ffn.up, threads, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    Buffer up(2 * tokens * count), gate(ffn.gate.data ? 2 * tokens * count : 0);
    kernels.multiply(ffn.up, ffn.dtype, inputs.data(), x_pitch, tokens, first, last, up.data());
    if (ffn.gate.data)
      kernels.multiply(ffn.gate, ffn.dtype, inputs.data(), x_pitch, tokens, first, last, gate.data());
    kernels.activate(ffn.activation, up.data(), ffn.gate.data ? gate.data() : nullptr, tokens * count);
    for (int64_t t = 0; t < tokens; ++t)
      std::copy_n(up.data() + t * count, count, hidden.data() + t * hidden_pitch + first);
  });

  over_outputs(ffn.down, threads, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    Buffer sums(2 * tokens * count);
    kernels.multiply(ffn.down, ffn.dtype, hidden.data(), hidden_pitch, tokens, first, last, sums.data());
    for (int64_t t = 0; t < tokens; ++t)
      kernels.store(sums.data() + t * count, offset(y, t * outputs + first, ffn.dtype), ffn.dtype, count);
  });
}

void shared_ffn_activate(Activation activation, Dtype dtype, const void* up, const void* gate, void* hidden,
                         int64_t count, Isa isa, int threads) {
  const FFNKernels& kernels = shared_ffn_kernels(isa);
  over_elements(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float values[kElements], gates[kElements];
    kernels.load(offset(up, first, dtype), dtype, values, n);
    if (gate) kernels.load(offset(gate, first, dtype), dtype, gates, n);
    kernels.activate(activation, values, gate ? gates : nullptr, n);
    kernels.store(values, offset(hidden, first, dtype), dtype, n);
  });
}

void shared_ffn_activate_backward(Activation activation, Dtype dtype, const void* d_hidden, const void* up,
                                  const void* gate, void* d_up, void* d_gate, void* hidden, int64_t count, Isa isa,
                                  int threads) {
  const FFNKernels& kernels = shared_ffn_kernels(isa);
  over_elements(count, threads, [&](int64_t first, int64_t n) {
    alignas(64) float d[kElements], u[kElements], g[kElements], out_u[kElements], out_g[kElements], h[kElements];
    kernels.load(offset(d_hidden, first, dtype), dtype, d, n);
    kernels.load(offset(up, first, dtype), dtype, u, n);
    if (gate) kernels.load(offset(gate, first, dtype), dtype, g, n);
    kernels.activate_backward(activation, d, u, gate ? g : nullptr, out_u, out_g, h, n);
    kernels.store(out_u, offset(d_up, first, dtype), dtype, n);
    if (gate) kernels.store(out_g, offset(d_gate, first, dtype), dtype, n);
    if (hidden) kernels.store(h, offset(hidden, first, dtype), dtype, n);
  });
}

}  // namespace ffmerge
