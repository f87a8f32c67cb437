// A heap of columns by price.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace ffmerge {

// The two cheapest columns, for rows without preference. Prices only rise, so that stored ones are lower bounds.
template <class Price>
class CheapestColumns {
 public:
  using Entry = std::pair<Price, int>;

  void rebuild(const std::vector<Price>& price) {
    heap_.resize(price.size());
    for (size_t j = 0; j < price.size(); ++j) heap_[j] = {price[j], static_cast<int>(j)};
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  std::pair<Entry, Entry> two(const std::vector<Price>& price) {
    const Entry first = pop(price), second = pop(price);
    push(first);
    push(second);
    return {first, second};
  }

 private:
  void push(const Entry& entry) {
    heap_.push_back(entry);
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  Entry pop(const std::vector<Price>& price) {
    for (;;) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      const Entry entry = heap_.back();
      heap_.pop_back();
      if (entry.first == price[entry.second]) return entry;
      push({price[entry.second], entry.second});
    }
  }

  std::vector<Entry> heap_;
};

}  // namespace ffmerge
