#include "common/cpu.h"

#if FFMERGE_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffmerge {
namespace {

#if FFMERGE_X86

// __builtin_cpu_supports also reads XCR0, so an extension whose registers the system does not save counts as absent.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(__linux__)
// Linux gives a process the 8 KB of tile state only on request; without it the first tile instruction is a SIGILL.
bool request_tile_state() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}
#else
bool request_tile_state() { return false; }
#endif

bool has_amx() {
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && request_tile_state();
}

Isa detect() {
  __builtin_cpu_init();
  if (!has_avx2()) return Isa::portable;
  if (!has_avx512()) return Isa::avx2;
  return has_amx() ? Isa::amx : Isa::avx512;
}

#else

Isa detect() { return Isa::portable; }

#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      break;
  }
  return "portable";
}

Isa best_isa() {
  static const Isa best = detect();  // permission for the tile registers is asked for once per process
  return best;
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas;
  for (int level = 0; level <= static_cast<int>(best_isa()); ++level) isas.push_back(static_cast<Isa>(level));
  return isas;
}

}  // namespace ffmerge
