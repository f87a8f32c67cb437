// Large pages for large results: fresh memory then costs a page fault per 2 MiB instead of one per 4 KiB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ffmerge {

// Advice about memory that is about to be written; elsewhere than on Linux, and where pages are there already, nothing.
inline void prefer_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096, kHuge = uintptr_t{1} << 21;
  const auto first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (last > first && last - first >= kHuge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(start), static_cast<void>(bytes);
#endif
}

}  // namespace ffmerge
