// The schedule of a block of an accumulator, over 2 x 2 tiles. Compiled once for AMX and once for its emulation; no
// templates of the standard library here, since a linker may keep the copy compiled for the wrong processor.
//
// Tiles 0..3 collect a 32 x 32 tile of the result over one chunk of tokens, 4 and 5 hold the left operand, 6 and 7 the
// right one. The sum goes to a scratch tile first and is added to the accumulator during the next tile's products, so
// that the read and write of the accumulator (the bottleneck) overlaps with the matrix unit.
#pragma once

#include "correlation/tiles.h"

namespace ffmerge {
namespace {

template <class Tiles>
class BlockWorker {
 public:
  BlockWorker() { tiles_.begin(); }
  ~BlockWorker() { tiles_.end(); }

  void run(const TileJob& job) {
    const TileLayer &a = *job.a, &b = *job.b;
    const ChunkLayout layout_a(a.form), layout_b(b.form);
    const int64_t strips_a = strips(a.form.width), strips_b = strips(b.form.width);
    const int64_t last_row = least(job.row + kBlock, strips_a), last_column = least(job.column + kBlock, strips_b);
    const int64_t chunks = (a.tokens + kChunkTokens - 1) / kChunkTokens;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const char *left = a.chunks[chunk], *right = b.chunks[chunk];
      const char* next_left = a.chunks[chunk + 1 < chunks ? chunk + 1 : chunk];
      const int64_t steps = least(kChunkSteps, (a.tokens - chunk * kChunkTokens + kStep - 1) / kStep);
      for (int64_t j = job.column; j < last_column; ++j) {
        const int64_t next_column = j + 1 < last_column ? j + 1 : j;
        for (int64_t i = job.row; i < last_row && !(job.symmetric && i > j); ++i) {
          Operands o;
          o.left_high = left + layout_a.left_high + step_offset(i, 0);
          o.right_high = right + layout_b.right_high + step_offset(j, 0);
          o.left_low = left + layout_a.left_low + step_offset(i, 0);
          o.right_low = right + layout_b.right_low + step_offset(j, 0);
          o.left_flags = a.form.split ? left[layout_a.flags + i] : 0;
          o.right_flags = b.form.split ? right[layout_b.flags + j] : 0;
          // Sixteen tiles share a strip: each fetches a sixteenth of the one that comes next.
          o.soon_left = next_left + layout_a.left_high + step_offset(i, 0) + j % kBlock * kSixteenth;
          o.soon_right = right + layout_b.right_high + step_offset(next_column, 0) + i % kBlock * kSixteenth;
          multiply(o, steps, job.accumulator + tile_index(i, j, strips_a, strips_b) * kTileFloats);
        }
      }
    }
    flush();
  }

 private:
  static constexpr int64_t kSixteenth = kChunkSteps * kStepBytes / 16;
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kFloatsPerStep = kTileFloats / kChunkSteps;

  struct Operands {
    const char *left_high, *right_high, *left_low, *right_low, *soon_left, *soon_right;
    unsigned char left_flags, right_flags;
  };

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  FFMERGE_INLINE void step(const char* left, const char* right) {
    tiles_.template load<4>(left);
    tiles_.template load<6>(right);
    tiles_.template dpbf16ps<0, 4, 6>();
    tiles_.template load<7>(right + kOperandBytes);
    tiles_.template dpbf16ps<1, 4, 7>();
    tiles_.template load<5>(left + kOperandBytes);
    tiles_.template dpbf16ps<2, 5, 6>();
    tiles_.template dpbf16ps<3, 5, 7>();
  }

  // high·high, and low·high, high·low for the steps where a low part is not zero.
  FFMERGE_INLINE void multiply(const Operands& o, int64_t steps, float* accumulator) {
    const float* done = scratch_[turn_];
    turn_ ^= 1;
    tiles_.template zero<0>();
    tiles_.template zero<1>();
    tiles_.template zero<2>();
    tiles_.template zero<3>();
    for (int64_t s = 0; s < steps; ++s) {
      step(o.left_high + s * kStepBytes, o.right_high + s * kStepBytes);
      add(done, s);
      for (int64_t line = 0; line < kSixteenth / kChunkSteps; line += kLine) {
        FFMERGE_PREFETCH(o.soon_left + s * (kSixteenth / kChunkSteps) + line);
        FFMERGE_PREFETCH(o.soon_right + s * (kSixteenth / kChunkSteps) + line);
      }
    }
    for (int64_t s = steps; s < kChunkSteps; ++s) add(done, s);
    for (int64_t s = 0; s < steps && o.left_flags; ++s)
      if (o.left_flags >> s & 1) step(o.left_low + s * kStepBytes, o.right_high + s * kStepBytes);
    for (int64_t s = 0; s < steps && o.right_flags; ++s)
      if (o.right_flags >> s & 1) step(o.left_high + s * kStepBytes, o.right_low + s * kStepBytes);
    float* sum = scratch_[turn_];
    tiles_.template store<0>(sum);
    tiles_.template store<1>(sum + 256);
    tiles_.template store<2>(sum + 512);
    tiles_.template store<3>(sum + 768);
    pending_ = accumulator;
  }

  // An eighth of the previous tile's sum.
  FFMERGE_INLINE void add(const float* done, int64_t part) {
    if (!pending_) return;
    float* FFMERGE_RESTRICT to = pending_ + part * kFloatsPerStep;
    const float* FFMERGE_RESTRICT from = done + part * kFloatsPerStep;
    for (int64_t i = 0; i < kFloatsPerStep; ++i) to[i] += from[i];
  }

  void flush() {
    for (int64_t s = 0; s < kChunkSteps; ++s) add(scratch_[turn_], s);
    pending_ = nullptr;
  }

  alignas(64) float scratch_[2][kTileFloats];
  int turn_ = 0;
  float* pending_ = nullptr;
  Tiles tiles_;
};

template <class Tiles>
void run_tile_jobs(const TileJob* jobs, int64_t count, NextJob next, void* counter) {
  BlockWorker<Tiles> worker;
  for (int64_t job = next(counter); job < count; job = next(counter)) worker.run(jobs[job]);
}

}  // namespace
}  // namespace ffmerge
