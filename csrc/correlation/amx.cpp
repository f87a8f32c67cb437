// The schedule on AMX-BF16.
#include <cstring>

#include "correlation/tiles.h"

#if FFMERGE_X86

#include "common/target_avx512.inc"

#include "common/tiles_amx.h"
#include "correlation/schedule.h"  // inside the region: its loops are compiled for this processor

namespace ffmerge {

void run_tile_jobs_amx(const TileJob* jobs, int64_t count, NextJob next, void* counter) {
  run_tile_jobs<AmxTiles>(jobs, count, next, counter);
}

}  // namespace ffmerge

#include "common/target_end.inc"

#else

namespace ffmerge {

void run_tile_jobs_amx(const TileJob*, int64_t, NextJob, void*) {}  // never called: no such level on this processor

}  // namespace ffmerge

#endif  // FFMERGE_X86
