// The instruction set of the CPU we run on, found at run time: one binary serves every machine.
#pragma once

#include <vector>

// x86-64 with a compiler that knows every extension named below; elsewhere only the portable code exists.
#if defined(__x86_64__) && defined(__clang__)
#define FFMERGE_X86 (__clang_major__ >= 12)
#elif defined(__x86_64__) && defined(__GNUC__)
#define FFMERGE_X86 (__GNUC__ >= 11)
#else
#define FFMERGE_X86 0
#endif

namespace ffmerge {

// Ordered: each level contains the ones before it.
enum class Isa : int {
  portable = 0,
  avx2 = 1,    // AVX2, FMA, F16C
  avx512 = 2,  // + AVX-512 F, BW, DQ, VL
  amx = 3,     // + AMX-TILE, AMX-BF16, with the kernel's permission to use the tile registers
};

// "portable", "avx2", "avx512" or "amx".
const char* isa_name(Isa isa);

// The highest level that the CPU has, the operating system saves on a context switch, and this build contains.
Isa best_isa();

// Every usable level, lowest first.
std::vector<Isa> usable_isas();

}  // namespace ffmerge
