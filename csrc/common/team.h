// The threads of a call that takes less time than starting threads does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ffmerge {

// Calls work(data) on up to `threads` threads, the caller's among them. They are those of the OpenMP runtime that the
// process has loaded, torch's: they wait awake between torch's own calls and ours. Without one, new threads.
void run_team(int threads, void (*work)(void*), void* data);

// work(0), ..., work(count - 1), each once, by a team. No exceptions; results must not depend on who does what.
template <class Work>
void team_for(int64_t count, int threads, Work work) {
  struct Shared {
    Work& work;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } shared{work, count};
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
  run_team(
      threads,
      [](void* data) {
        Shared& mine = *static_cast<Shared*>(data);
        for (int64_t item = mine.next++; item < mine.count; item = mine.next++) mine.work(item);
      },
      &shared);
}

}  // namespace ffmerge
