// The schedule on emulated tiles: slow, runs anywhere, bit for bit what AMX-BF16 gives. For tests.
#include "common/tiles_emulated.h"
#include "correlation/schedule.h"

namespace ffmerge {

void run_tile_jobs_emulated(const TileJob* jobs, int64_t count, NextJob next, void* counter) {
  run_tile_jobs<EmulatedTiles>(jobs, count, next, counter);
}

}  // namespace ffmerge
