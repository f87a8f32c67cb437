// Tile registers of AMX-BF16, all of 16 rows of 64 bytes. To be included inside a target region. The instructions are
// written out: the compilers' intrinsics want literal register numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace ffmerge {
namespace {

struct AmxTiles {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

  void begin() {
    Config config;
    std::memset(&config, 0, sizeof(config));
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  void end() { asm volatile("tilerelease"); }

  template <int kTile>
  FFMERGE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  FFMERGE_INLINE void load(const void* from, int64_t stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  FFMERGE_INLINE void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  FFMERGE_INLINE void dpbf16ps() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }
};

}  // namespace
}  // namespace ffmerge
