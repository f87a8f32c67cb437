// The products of the FFN on a matrix unit: bfloat16, up to 16 tokens, weights where they lie.
//
// A step is 32 inputs. Beside nn.Linear's rows of inputs, a tile of the weight is 16 rows of a step as they are in
// memory, and the tokens' inputs are packed as the other operand: [step][16 pairs of inputs][16 tokens][2]. Beside rows
// of outputs, the inputs are the left operand, [step][16 tokens][32 inputs], and pairs of rows of the weight are
// interleaved on the way. Only the inputs are ever packed: they are few, and no copy of a weight can be out of date.
#pragma once

#include "shared_ffn/shared_ffn.h"

namespace ffmerge {

constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileOutputs = 16;
constexpr int64_t kTileStrips = 4;  // of 16 outputs, at once
constexpr int64_t kTileStep = 32;
constexpr int64_t kTileOperand = 512;  // bfloat16 of a packed step
constexpr int64_t kTileSums = kTileTokens * kTileOutputs;

inline int64_t tile_steps(int64_t inputs) { return (inputs + kTileStep - 1) / kTileStep; }

// Where the input k of token t lies in the packed inputs.
inline int64_t packed_index(bool transposed, int64_t t, int64_t k) {
  const int64_t i = k % kTileStep;
  return k / kTileStep * kTileOperand + (transposed ? t * kTileStep + i : i / 2 * kTileStep + 2 * t + i % 2);
}

// sums [strip][16 outputs][16 tokens] (transposed weights: [strip][16 tokens][16 outputs]) = x · weightᵀ for the
// outputs first ... last, at most 4 strips. packed: all inputs, 0 where there is none. What lies beyond `last` is not
// written or 0. Compiled once per kind of tiles.
using MultiplyTiles = void (*)(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last,
                               float* sums);
void multiply_tiles_amx(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last, float* sums);
void multiply_tiles_emulated(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last,
                             float* sums);

}  // namespace ffmerge
