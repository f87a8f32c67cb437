// Two phases, each shared among threads by outputs: the hidden features, then the result. Weights are read where they
// lie; nothing is packed, so no copy of them exists that could be out of date.
#include "shared_ffn/shared_ffn.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "common/team.h"
#include "shared_ffn/kernels.h"
#include "shared_ffn/tiles.h"

namespace ffmerge {
namespace {

namespace portable {
#include "common/float_math.inc"
}

constexpr int64_t kLine = 16;         // floats of a cache line
constexpr int64_t kPiece = 32 * kElements;  // of elementwise work

// Numbers, 64-byte aligned, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new T[count + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = memory_.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
};

struct Machine {
  const FFNKernels& kernels;
  MultiplyTiles multiply_tiles;
};

// The inputs of a weight, float32.
class FloatInputs {
 public:
  FloatInputs(const FFNWeight& weight, int64_t tokens) : pitch_(pitch(weight.inputs)), values_(tokens * pitch_) {}

  // values: `count` inputs from `first` on, of token t.
  void put(int64_t t, int64_t first, const float* values, int64_t count) {
    std::copy_n(values, count, values_.data() + t * pitch_ + first);
  }

  // Outputs of a piece of work: any multiple of the rows that a kernel takes at once, or a stretch of memory that is
  // worth reading where outputs are columns.
  static int64_t chunk(const FFNWeight& weight, int threads) {
    if (!weight.transposed) return 48;
    const int64_t share = (weight.outputs + threads - 1) / threads;
    return std::min<int64_t>(512, (share + kLine - 1) / kLine * kLine);
  }

  // out [tokens, last - first]; behind it there is room for as much again.
  void multiply(const Machine& machine, const FFN& ffn, const FFNWeight& weight, int64_t tokens, int64_t first,
                int64_t last, float* out) const {
    machine.kernels.multiply(weight, ffn.dtype, values_.data(), pitch_, tokens, first, last, out);
  }

 private:
  // A line longer than they need, for rows at powers of two would share one set of the cache.
  static int64_t pitch(int64_t width) { return (width + kLine - 1) / kLine * kLine + kLine; }

  int64_t pitch_;
  Buffer<float> values_;
};

// The inputs of a weight, rounded to bfloat16 and packed for a matrix unit.
class TileInputs {
 public:
  TileInputs(const FFNWeight& weight, int64_t)
      : transposed_(weight.transposed), packed_(tile_steps(weight.inputs) * kTileOperand) {
    std::fill_n(packed_.data(), tile_steps(weight.inputs) * kTileOperand, uint16_t{0});
  }

  void put(int64_t t, int64_t first, const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      packed_.data()[packed_index(transposed_, t, first + i)] = portable::rounded_bits(values[i]) >> 16;
  }

  static int64_t chunk(const FFNWeight&, int) { return kTileStrips * kTileOutputs; }

  void multiply(const Machine& machine, const FFN&, const FFNWeight& weight, int64_t tokens, int64_t first,
                int64_t last, float* out) const {
    alignas(64) float sums[kTileStrips * kTileSums];
    machine.multiply_tiles(weight, packed_.data(), first, last, sums);
    const auto* bias = static_cast<const Bfloat16*>(weight.bias);
    const int64_t count = last - first;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < count; ++n) {
        const int64_t i = n % kTileOutputs;
        const float* strip = sums + n / kTileOutputs * kTileSums;
        out[t * count + n] = strip[transposed_ ? t * kTileOutputs + i : i * kTileTokens + t] +
                             (bias ? portable::to_float(bias[first + n]) : 0.0f);
      }
    }
  }

 private:
  bool transposed_;
  Buffer<uint16_t> packed_;
};

// use(first, last) for chunks of the outputs of a weight.
template <class Use>
void over_outputs(const FFNWeight& weight, int64_t size, int threads, Use use) {
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

// Inputs: how the inputs of a weight are kept, and multiplied with it.
template <class Inputs>
void decode(const Machine& machine, const FFN& ffn, const void* x, int64_t tokens, int64_t x_stride, void* y,
            int threads) {
  const FFNKernels& kernels = machine.kernels;
  const int64_t width = ffn.up.inputs, outputs = ffn.down.outputs;
  Inputs inputs(ffn.up, tokens), hidden(ffn.down, tokens);
  Buffer<float> token(width);
  for (int64_t t = 0; t < tokens; ++t) {
    kernels.load(offset(x, t * x_stride, ffn.dtype), ffn.dtype, token.data(), width);
    inputs.put(t, 0, token.data(), width);
  }

  over_outputs(ffn.up, Inputs::chunk(ffn.up, threads), threads, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    Buffer<float> up(2 * tokens * count), gate(ffn.gate.data ? 2 * tokens * count : 0);
    inputs.multiply(machine, ffn, ffn.up, tokens, first, last, up.data());
    if (ffn.gate.data) inputs.multiply(machine, ffn, ffn.gate, tokens, first, last, gate.data());
    kernels.activate(ffn.activation, up.data(), ffn.gate.data ? gate.data() : nullptr, tokens * count);
    for (int64_t t = 0; t < tokens; ++t) hidden.put(t, first, up.data() + t * count, count);
  });

  over_outputs(ffn.down, Inputs::chunk(ffn.down, threads), threads, [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    Buffer<float> sums(2 * tokens * count);
    hidden.multiply(machine, ffn, ffn.down, tokens, first, last, sums.data());
    for (int64_t t = 0; t < tokens; ++t)
      kernels.store(sums.data() + t * count, offset(y, t * outputs + first, ffn.dtype), ffn.dtype, count);
  });
}

}  // namespace

void shared_ffn_decode(const FFN& ffn, const void* x, int64_t tokens, int64_t x_stride, void* y, Isa isa, Tiles tiles,
                       int threads) {
  const bool alike = !ffn.gate.data || ffn.gate.transposed == ffn.up.transposed;
  if (tiles != Tiles::none && ffn.dtype == Dtype::bfloat16 && tokens <= kTileTokens && alike) {
    const auto multiply = tiles == Tiles::amx ? multiply_tiles_amx : multiply_tiles_emulated;
    decode<TileInputs>({shared_ffn_kernels(isa), multiply}, ffn, x, tokens, x_stride, y, threads);
  } else {
    decode<FloatInputs>({shared_ffn_kernels(isa), nullptr}, ffn, x, tokens, x_stride, y, threads);
  }
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
