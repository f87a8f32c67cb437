// What standard C++ has no word for.
#pragma once

#if defined(__GNUC__)
#define FFMERGE_INLINE inline __attribute__((always_inline))
#define FFMERGE_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define FFMERGE_RESTRICT __restrict__
#else
#define FFMERGE_INLINE inline
#define FFMERGE_PREFETCH(address) static_cast<void>(address)
#define FFMERGE_RESTRICT
#endif
