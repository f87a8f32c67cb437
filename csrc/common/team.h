// The threads of a call that takes less time than starting threads does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace ffmerge {

// Calls work(data) on up to `threads` threads, the caller's among them. They are those of the OpenMP runtime that the
// process has loaded, torch's: they wait awake between torch's own calls and ours. Without one, new threads.
// `work` must not throw. Where OpenMP cannot start its threads it ends the process itself.
void run_team(int threads, void (*work)(void*), void* data);

// work(0), ..., work(count - 1), each once, by a team. After an exception no more are begun, and one of those thrown is
// thrown again here. Results must not depend on who does what.
template <class Work>
void team_for(int64_t count, int threads, Work work) {
  struct Shared {
    Work& work;
    const int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};
  } shared{work, count};
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
  run_team(
      threads,
      [](void* data) {
        Shared& mine = *static_cast<Shared*>(data);
        try {
          for (int64_t item = mine.next++; item < mine.count; item = mine.next++) mine.work(item);
        } catch (...) {
          mine.next = mine.count;
          if (!mine.failed.exchange(true)) mine.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

}  // namespace ffmerge
