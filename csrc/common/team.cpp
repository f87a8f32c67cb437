#include "common/team.h"

#include "common/parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace ffmerge {
namespace {

using Parallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The entry that GCC's `#pragma omp parallel` calls; LLVM's and Intel's runtimes have it too.
Parallel find_openmp() {
#if defined(__linux__)
  if (void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel")) return reinterpret_cast<Parallel>(found);
  if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD))
    return reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
#endif
  return nullptr;
}

}  // namespace

void run_team(int threads, void (*work)(void*), void* data) {
  if (threads <= 1) return work(data);
  static const Parallel parallel = find_openmp();
  if (parallel) return parallel(work, data, static_cast<unsigned>(threads), 0);
  const Helpers helpers(threads, [=](int) { work(data); });
  work(data);
}

}  // namespace ffmerge
