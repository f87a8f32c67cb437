// The schedule on AMX-BF16. The instructions are written out: the compilers' intrinsics want literal register numbers.
#include <cstring>

#include "correlation_tiles.h"

#if FFMERGE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#include "correlation_schedule.h"  // inside the region: its loops are compiled for this processor

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
  FFMERGE_INLINE void load(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t{64}), "i"(kTile) : "memory");
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

void run_tile_jobs_amx(const TileJob* jobs, int64_t count, NextJob next, void* counter) {
  run_tile_jobs<AmxTiles>(jobs, count, next, counter);
}

}  // namespace ffmerge

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace ffmerge {

void run_tile_jobs_amx(const TileJob*, int64_t, NextJob, void*) {}  // never called: no such level on this processor

}  // namespace ffmerge

#endif  // FFMERGE_X86
