// The schedule on AMX-BF16.
#include <cstring>

#include "correlation/tiles.h"

#if FFMERGE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#include "common/tiles_amx.h"
#include "correlation/schedule.h"  // inside the region: its loops are compiled for this processor

namespace ffmerge {

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
