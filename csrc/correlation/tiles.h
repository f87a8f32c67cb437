// Memory layout of tiled features and accumulators. Shared by packing, multiplying and untiling.
//
// A strip is 32 features, a step is 32 tokens; together 2 KiB of bfloat16, as two AMX operands of 1 KiB:
//   right form (B, "VNNI"): per half of the strip, row p = tokens 2p and 2p+1 interleaved, one dword per feature;
//   left form (A):          per half of the strip, row f = feature f, one dword per token pair: the transposed dwords.
// A chunk is 8 steps of all strips: [left high][right high][left low][right low][flags], each part [strip][step].
// Bit s of flags[strip]: step s has a low part that is not zero; without the bit its memory is not even written.
#pragma once

#include <cstdint>

#include "common/inline.h"
#include "correlation/correlation.h"

namespace ffmerge {

constexpr int64_t kStrip = 32;
constexpr int64_t kStep = 32;
constexpr int64_t kChunkSteps = kChunkTokens / kStep;
constexpr int64_t kOperandBytes = 1024;  // one AMX tile: 16 rows of 64 bytes
constexpr int64_t kStepBytes = 2 * kOperandBytes;
constexpr int64_t kTileFloats = 32 * 32;  // a tile of an accumulator: 2 x 2 AMX tiles, each 16 x 16
constexpr int64_t kBlock = 16;            // a block of an accumulator: 16 x 16 tiles = 1 MiB, stays in the L2 cache

inline int64_t strips(int64_t width) { return (width + kStrip - 1) / kStrip; }

struct ChunkLayout {
  int64_t left_high = 0, right_high = 0, left_low = 0, right_low = 0, flags = 0, bytes = 0;

  explicit ChunkLayout(const TileForm& form) {
    const int64_t part = strips(form.width) * kChunkSteps * kStepBytes;
    right_high = left_high + (form.left ? part : 0);
    left_low = right_high + (form.right ? part : 0);
    right_low = left_low + (form.left && form.split ? part : 0);
    flags = right_low + (form.right && form.split ? part : 0);
    bytes = (flags + strips(form.width) + 63) / 64 * 64;
  }
};

inline int64_t step_offset(int64_t strip, int64_t step) { return (strip * kChunkSteps + step) * kStepBytes; }

// Position of tile (i, j) in an accumulator, in tiles: blocks row by row, inside a block column by column.
inline int64_t tile_index(int64_t i, int64_t j, int64_t strips_a, int64_t strips_b) {
  const int64_t row = i / kBlock * kBlock;
  const int64_t height = strips_a - row < kBlock ? strips_a - row : kBlock;
  return row * strips_b + j / kBlock * kBlock * height + j % kBlock * height + i % kBlock;
}

// One block of one product.
struct TileJob {
  const TileLayer *a, *b;
  float* accumulator;
  int64_t row, column;  // first strips
  bool symmetric;
};

// Runs jobs until `next(counter)` is `count` or more. One per thread; compiled once per kind of tiles.
using NextJob = int64_t (*)(void* counter);
void run_tile_jobs_amx(const TileJob* jobs, int64_t count, NextJob next, void* counter);
void run_tile_jobs_emulated(const TileJob* jobs, int64_t count, NextJob next, void* counter);

}  // namespace ffmerge
