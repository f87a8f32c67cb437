// The schedule on emulated tiles: slow, runs anywhere, bit for bit what AMX-BF16 gives. For tests.
#include "common/tiles_emulated.h"
#include "shared_ffn/schedule.h"

namespace ffmerge {

void multiply_tiles_emulated(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last,
                             float* sums) {
  StripWorker<EmulatedTiles>(weight, first, last).run(packed, sums);
}

}  // namespace ffmerge
