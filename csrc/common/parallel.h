// Work shared by a few threads. Which thread takes which item is open; results must not depend on it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace ffmerge {

// Starts up to `threads - 1` threads of run(1), run(2), ...: fewer where the system has no more. Ends when all have.
class Helpers {
 public:
  template <class Run>
  Helpers(int threads, Run run) {
    try {
      threads_.reserve(std::max(threads - 1, 0));
      for (int thread = 1; thread < threads; ++thread) threads_.emplace_back(run, thread);
    } catch (const std::system_error&) {
      // The others do its work.
    }
  }
  ~Helpers() {
    for (std::thread& helper : threads_) helper.join();
  }

 private:
  std::vector<std::thread> threads_;
};

// Calls make_worker() once per thread and its result with 0, 1, ..., count - 1, each index once. The calling thread
// works too. The first exception ends the work of its thread and is thrown again here.
template <class MakeWorker>
void parallel_for(int64_t count, int threads, MakeWorker make_worker) {
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
  std::atomic<int64_t> next{0};
  std::vector<std::exception_ptr> errors(std::max(threads, 1));
  auto run = [&](int thread) {
    try {
      auto worker = make_worker();
      for (int64_t item = next++; item < count; item = next++) worker(item);
    } catch (...) {
      errors[thread] = std::current_exception();
    }
  };
  {
    const Helpers helpers(threads, run);
    if (threads > 0) run(0);
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace ffmerge
