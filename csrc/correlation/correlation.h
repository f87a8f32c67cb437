// Streaming second moments of features: packing with statistics, products of packed features in tiles, and sketches.
//
// Two forms of packed features. Rows: [tokens, width] float32, multiplied elsewhere by a GEMM of torch.
// Tiles: bfloat16 in the operand forms of AMX, in chunks of 256 tokens (tiles.h).
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu.h"
#include "common/dtype.h"

namespace ffmerge {

// Features of one layer, one batch, and where their sums go.
struct Features {
  const void* x;       // [tokens, width], rows `stride` elements apart
  Dtype dtype;
  int64_t tokens, width, stride;
  Activation activation;
  const float* pivot;  // [width], subtracted after the activation
  double* sum;         // [width] += Σ v  of the packed values v
  double* sumsq;       // [width] += Σ v²
};

// Rows [tokens, width]; `rounded`: to bfloat16 values, and the sums are those of the rounded.
void correlation_pack_rows(const Features& features, bool rounded, float* out, Isa isa, int threads);

// A sketch of one layer: token t is added with its sign to row (first + t) % count, and to the layer's sums.
struct Ring {
  float* rows;         // [count, width]
  int64_t count;       // 4 or more
  int64_t first;       // row of token 0
  const float* signs;  // [tokens] of +1 and -1
  const int64_t* at;   // [tokens] row of `features` of each token; null: 0, 1, ...
};

void correlation_accumulate_ring(const Features& features, const Ring& ring, Isa isa, int threads);

// What a layer's chunks hold. A layer that is only ever the left side of a pair needs no right form, and so on.
struct TileForm {
  int64_t width;
  bool left, right;  // of a pair (a, b), a is the left side: C[i, j] = Σ_t a[t, i] b[t, j]
  bool split;        // also the low parts: value = high + low, where bfloat16 is not exact
};

constexpr int64_t kChunkTokens = 256;

int64_t correlation_chunk_bytes(const TileForm& form);

// Appends to chunks that hold `filled` tokens already; `chunks` has room for filled + features.tokens. 64-byte aligned.
void correlation_pack_tiles(const Features& features, const TileForm& form, int64_t filled, char* const* chunks,
                            Isa isa, int threads);

struct TileLayer {
  TileForm form;
  int64_t tokens;
  const char* const* chunks;
};

struct TileProduct {
  float* accumulator;  // tiles of a pair, strips(a) · strips(b) · 4 KiB, 64-byte aligned
  int a, b;            // layers; a == b: only tiles on and above the diagonal
};

int64_t correlation_accumulator_bytes(int64_t width_a, int64_t width_b);

// accumulator += aᵀ b for all products. `emulated` runs the same schedule without AMX, bit for bit.
void correlation_multiply_tiles(const std::vector<TileLayer>& layers, const std::vector<TileProduct>& products,
                                bool emulated, int threads);

// Tiles to a row-major matrix [width_a, width_b] and back; `symmetric`: the lower half is the mirrored upper one.
void correlation_untile(const float* accumulator, int64_t width_a, int64_t width_b, bool symmetric, float* matrix,
                        int threads);
void correlation_tile(const float* matrix, int64_t width_a, int64_t width_b, float* accumulator, int threads);

}  // namespace ffmerge
