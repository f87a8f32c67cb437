// The schedule on AMX-BF16.
#include <cstring>

#include "shared_ffn/tiles.h"

#if FFMERGE_X86

#include "common/target_avx512.inc"

#include "common/tiles_amx.h"
#include "shared_ffn/schedule.h"  // inside the region: its loops are compiled for this processor

namespace ffmerge {

void multiply_tiles_amx(const FFNWeight& weight, const uint16_t* packed, int64_t first, int64_t last, float* sums) {
  StripWorker<AmxTiles>(weight, first, last).run(packed, sums);
}

}  // namespace ffmerge

#include "common/target_end.inc"

#else

namespace ffmerge {

// Never called: no such level on this processor.
void multiply_tiles_amx(const FFNWeight&, const uint16_t*, int64_t, int64_t, float*) {}

}  // namespace ffmerge

#endif  // FFMERGE_X86
