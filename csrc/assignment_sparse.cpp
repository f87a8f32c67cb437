// Prices only rise, so a bound on the worth of the columns that are not in a row's list stays true, and a row of the
// matrix is read again only when the list's second best falls below that bound (lists: after Bertsekas' auction with
// epsilon scaling, 1988; end game: Jonker and Volgenant 1987, on the lists).
#include "assignment_sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <utility>

#include "assignment_kernels.h"

namespace ffmerge {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

constexpr int kWanted = 32;    // candidates asked for ...
constexpr int kCapacity = 64;  // ... and kept at most; a multiple of 16
constexpr double kEpsilonFirst = 4e-3, kEpsilonLast = 1e-5, kEpsilonStep = 0.1;  // of the range of the scores
constexpr double kEpsilonFloor = 6e-7;  // of the largest magnitude: below it float32 prices may not move
constexpr int kBidsPerRow = 200;        // more than ever seen without heavy ties
constexpr int kSelectsPerRow = 40;      // dense reads of a row, on average
constexpr int kRowBids = 4;             // augmenting-row steps per row

// The largest float not above x: listed and unlisted columns are never cheaper in float32 than in float64.
float round_down(double x) {
  const float y = static_cast<float>(x);
  return y > x ? std::nextafter(y, -std::numeric_limits<float>::infinity()) : y;
}

class SparseSolver {
 public:
  SparseSolver(const ScoreView<float>& scores, Isa isa, float low, float high, Matching& matching)
      : scores_(scores),
        d_(scores.size),
        kernels_(assignment_kernels(isa)),
        range_(static_cast<double>(high) - low),
        largest_(std::max(std::fabs(low), std::fabs(high))),
        m_(matching),
        price_(d_, 0.0f),
        lists_(d_),
        constant_(d_),
        selects_left_(static_cast<int64_t>(kSelectsPerRow) * d_),
        columns_(d_ + 16),
        values_(d_ + 16) {}

  bool run() {
    m_ = Matching(d_);
    int overflowing = 0;
    for (int i = 0; i < d_; ++i) {
      float low, high;
      kernels_.range(scores_.row(i), d_, &low, &high);
      constant_[i] = low == high;
      if (!constant_[i]) overflowing += refill(i);
    }
    if (overflowing > d_ / 4) return false;  // ties beyond what a list can hold
    if (!auction_phases()) {
      copy_prices();
      return false;
    }
    copy_prices();
    return augment_rows() && augment_shortest();
  }

 private:
  // --- candidate lists

  struct List {
    int columns[kCapacity];
    float values[kCapacity];  // sign * score
    int count;                // without padding
    double bound;             // no column left out is worth more; -inf: none is left out
  };

  struct LongList {
    std::vector<int> columns;
    std::vector<float> values;
  };

  struct Candidates {
    const int* columns;
    const float* values;
    int count;
  };

  Candidates candidates(int i) const {
    if (!long_.empty()) {
      const auto found = long_.find(i);
      if (found != long_.end()) {
        return {found->second.columns.data(), found->second.values.data(),
                static_cast<int>(found->second.columns.size())};
      }
    }
    return {lists_[i].columns, lists_[i].values, lists_[i].count};
  }

  // Reads row i again. Returns true if equal worths overflowed the list.
  bool refill(int i) {
    List& list = lists_[i];
    --selects_left_;
    float bound;
    int count = kernels_.select(scores_.row(i), scores_.sign, price_.data(), d_, kWanted, columns_.data(),
                                values_.data(), &bound);
    list.bound = count < d_ ? bound : -kInf;
    const bool overflow = count > kCapacity;
    if (overflow) {
      count = keep_best(i, count, kCapacity, &list.bound);
    }
    std::memcpy(list.columns, columns_.data(), count * sizeof(int));
    std::memcpy(list.values, values_.data(), count * sizeof(float));
    list.count = count;
    for (; count % 16; ++count) {
      list.columns[count] = 0;
      list.values[count] = -std::numeric_limits<float>::infinity();
    }
    if (!long_.empty()) long_.erase(i);
    return overflow;
  }

  // Cuts columns_ and values_ to the `keep` of largest worth, ascending. Which of equals stay differs from row to row,
  // so that rows do not all fight for the same few.
  int keep_best(int i, int count, int keep, double* bound) {
    order_.resize(count);
    for (int q = 0; q < count; ++q) {
      order_[q] = {static_cast<double>(values_[q]) - price_[columns_[q]], q};
    }
    const uint32_t salt = static_cast<uint32_t>(i) * 40503u;
    auto before = [salt](const std::pair<double, int>& a, const std::pair<double, int>& b) {
      if (a.first != b.first) return a.first > b.first;
      return ((a.second * 2654435761u) ^ salt) < ((b.second * 2654435761u) ^ salt);
    };
    std::nth_element(order_.begin(), order_.begin() + keep, order_.end(), before);
    *bound = order_[keep].first;
    std::sort(order_.begin(), order_.begin() + keep,
              [](const std::pair<double, int>& a, const std::pair<double, int>& b) { return a.second < b.second; });
    for (int q = 0; q < keep; ++q) {
      columns_[q] = columns_[order_[q].second];
      values_[q] = values_[order_[q].second];
    }
    return keep;
  }

  // A list at least twice as long as before. False if that would take too much memory.
  bool widen(int i) {
    const int before = candidates(i).count;
    const int keep = std::min(std::max(4 * kWanted, 4 * before), d_);
    long_entries_ += keep;
    if (long_entries_ > 16 * static_cast<int64_t>(d_)) return false;
    --selects_left_;
    const float* row = scores_.row(i);
    for (int j = 0; j < d_; ++j) {
      columns_[j] = j;
      values_[j] = scores_.sign * row[j];
    }
    lists_[i].bound = -kInf;
    if (keep < d_) keep_best(i, d_, keep, &lists_[i].bound);
    long_[i] = {{columns_.begin(), columns_.begin() + keep}, {values_.begin(), values_.begin() + keep}};
    return true;
  }

  // --- auction, in float32

  bool auction_phases() {
    const double floor = kEpsilonFloor * std::max<double>(largest_, range_);
    const double last = std::max(floor, kEpsilonLast * range_);
    int64_t bids_left = static_cast<int64_t>(kBidsPerRow) * d_;
    for (double epsilon = std::max(last, kEpsilonFirst * range_);; epsilon = std::max(last, kEpsilonStep * epsilon)) {
      if (!auction(static_cast<float>(epsilon), bids_left)) return false;
      if (epsilon <= last) return true;
    }
  }

  // Every row bids for its best column what it gains over the second best, plus epsilon; the row that loses it is next.
  bool auction(float epsilon, int64_t& bids_left) {
    std::fill(m_.row_of.begin(), m_.row_of.end(), -1);
    for (int start = 0; start < d_; ++start) {
      if (constant_[start]) continue;
      for (int i = start; i >= 0;) {
        if (--bids_left < 0 || selects_left_ < 0) return false;
        List& list = lists_[i];
        BestTwo two = kernels_.best_two(list.columns, list.values, padded(list.count), price_.data());
        if (two.second < list.bound) {
          refill(i);
          two = kernels_.best_two(list.columns, list.values, padded(list.count), price_.data());
        }
        price_[two.column] += two.best - two.second + epsilon;
        i = std::exchange(m_.row_of[two.column], i);
      }
    }
    return true;
  }

  static int padded(int count) { return (count + 15) / 16 * 16; }

  // --- end game, in float64: from here on every assigned row has a column of largest worth

  void copy_prices() {
    std::copy(price_.begin(), price_.end(), m_.price.begin());
    std::fill(m_.row_of.begin(), m_.row_of.end(), -1);
    std::fill(m_.column_of.begin(), m_.column_of.end(), -1);
  }

  void raise(int column, double price) {
    m_.price[column] = price;
    price_[column] = round_down(price);
  }

  struct ExactTwo {
    double best;
    double second;  // at least the second best worth of the whole row
    int column;     // of the best
    int free;       // a free column of the same worth, or -1
  };

  ExactTwo listed_two(int i) const {
    ExactTwo two{-kInf, -kInf, -1, -1};
    const Candidates list = candidates(i);
    for (int q = 0; q < list.count; ++q) {
      const int j = list.columns[q];
      const double worth = static_cast<double>(list.values[q]) - m_.price[j];
      if (worth <= two.second) continue;
      if (worth > two.best) {
        two.second = two.best;
        two.best = worth;
        two.column = j;
        two.free = -1;
      } else {
        two.second = worth;
      }
    }
    for (int q = 0; two.second == two.best && q < list.count && two.free < 0; ++q) {
      const int j = list.columns[q];
      if (static_cast<double>(list.values[q]) - m_.price[j] == two.best && m_.row_of[j] < 0) two.free = j;
    }
    return two;
  }

  // The best column of row i for certain; false if that took too much.
  bool exact_two(int i, ExactTwo& two) {
    two = listed_two(i);
    if (two.second < lists_[i].bound) {
      refill(i);
      two = listed_two(i);
      while (two.best < lists_[i].bound) {
        if (selects_left_ < 0 || !widen(i)) return false;
        two = listed_two(i);
      }
    }
    two.second = std::min(std::max(two.second, lists_[i].bound), two.best);
    return true;
  }

  // Augmenting row reduction: bids with epsilon 0. A row displaced without a rise in price waits for the next sweep.
  bool augment_rows() {
    std::vector<int> rows, waiting;
    for (int i = 0; i < d_; ++i) {
      if (!constant_[i]) rows.push_back(i);
    }
    int64_t bids_left = static_cast<int64_t>(kRowBids) * d_;
    for (int sweep = 0; sweep < 3 && !rows.empty(); ++sweep, rows.swap(waiting)) {
      waiting.clear();
      for (int start : rows) {
        for (int i = start; i >= 0;) {
          ExactTwo two;
          if (--bids_left < 0) {
            waiting.push_back(i);
            break;
          }
          if (!exact_two(i, two)) return false;
          const double gain = two.best - two.second;
          if (gain > 0) raise(two.column, m_.price[two.column] + gain);
          const int column = gain > 0 || two.free < 0 ? two.column : two.free;
          const int displaced = m_.row_of[column];
          m_.assign(i, column);
          if (displaced >= 0) m_.column_of[displaced] = -1;
          i = displaced;
          if (i >= 0 && !(gain > 1e-12 * range_)) {
            waiting.push_back(i);
            break;
          }
        }
      }
    }
    return true;
  }

  // --- shortest augmenting paths on the lists

  struct Event {
    double distance;
    int rank;  // at equal distance: free columns, then assigned ones, then bounds
    int id;    // column, or row whose bound is reached
    bool operator<(const Event& other) const {  // std::push_heap keeps the largest on top
      if (distance != other.distance) return distance > other.distance;
      if (rank != other.rank) return rank > other.rank;
      return id > other.id;
    }
  };
  enum Rank { kFree, kAssigned, kBound };

  struct Search {
    std::vector<double> distance, row_distance, row_worth;
    std::vector<int> previous, reached, closed;  // `reached`, `closed`: the number of the last search that did
    std::vector<int> columns, rows;              // closed and scanned in this search
    std::vector<Event> heap;
    int number = 0;

    explicit Search(int d)
        : distance(d), row_distance(d), row_worth(d), previous(d), reached(d, 0), closed(d, 0) {}
    void push(const Event& event) {
      heap.push_back(event);
      std::push_heap(heap.begin(), heap.end());
    }
    Event pop() {
      std::pop_heap(heap.begin(), heap.end());
      const Event event = heap.back();
      heap.pop_back();
      return event;
    }
  };

  bool augment_shortest() {
    std::vector<int> rows;
    for (int pass = 0; pass < 2; ++pass) {  // constant rows fit anywhere: they come last
      for (int i = 0; i < d_; ++i) {
        if (m_.column_of[i] < 0 && constant_[i] == pass) rows.push_back(i);
      }
    }
    if (rows.empty()) return true;
    Search search(d_);
    int64_t events_left = static_cast<int64_t>(kBidsPerRow) * d_;
    for (int start : rows) {
      if (constant_[start]) refill(start);
      if (!augment(search, start, events_left)) return false;
    }
    return true;
  }

  bool augment(Search& s, int start, int64_t& events_left) {
    ExactTwo two;
    if (!exact_two(start, two)) return false;
    ++s.number;
    s.heap.clear();
    s.columns.clear();
    s.rows.clear();
    scan(s, start, 0.0, two.best);
    for (;;) {
      const Event event = s.pop();
      if (--events_left < 0 || selects_left_ < 0) return false;
      if (event.rank == kBound) {
        if (!extend(s, event.id)) return false;
        continue;
      }
      const int column = event.id;
      if (s.closed[column] == s.number || event.distance > s.distance[column]) continue;
      s.closed[column] = s.number;
      const int row = m_.row_of[column];
      if (row < 0) {
        finish(s, start, column, event.distance);
        return true;
      }
      s.columns.push_back(column);
      const double score = static_cast<double>(scores_.sign * scores_.row(row)[column]);
      scan(s, row, event.distance, score - m_.price[column]);
    }
  }

  void scan(Search& s, int row, double distance, double worth) {
    s.rows.push_back(row);
    s.row_distance[row] = distance;
    s.row_worth[row] = worth;
    relax(s, row);
  }

  void relax(Search& s, int row) {
    const double distance = s.row_distance[row], base = distance + s.row_worth[row];
    const Candidates list = candidates(row);
    for (int q = 0; q < list.count; ++q) {
      const int j = list.columns[q];
      if (s.closed[j] == s.number) continue;
      const double through = std::max(base + m_.price[j] - static_cast<double>(list.values[q]), distance);
      if (s.reached[j] == s.number && through >= s.distance[j]) continue;
      s.reached[j] = s.number;
      s.distance[j] = through;
      s.previous[j] = row;
      s.push({through, m_.row_of[j] < 0 ? kFree : kAssigned, j});
    }
    const double bound = lists_[row].bound;
    if (bound > -kInf) s.push({base - bound, kBound, row});
  }

  // The path may use a column outside the row's list: read the row again.
  bool extend(Search& s, int row) {
    const double before = lists_[row].bound;
    if (long_.count(row)) {
      if (!widen(row)) return false;
    } else {
      refill(row);
      if (!(lists_[row].bound < before) && !widen(row)) return false;
    }
    relax(s, row);
    return true;
  }

  void finish(Search& s, int start, int end, double distance) {
    for (int column : s.columns) raise(column, m_.price[column] + (distance - s.distance[column]));
    for (int column = end;;) {
      const int row = s.previous[column];
      const int next = m_.column_of[row];
      m_.assign(row, column);
      if (row == start) break;
      column = next;
    }
  }

  const ScoreView<float>& scores_;
  const int d_;
  const AssignmentKernels& kernels_;
  const double range_;
  const float largest_;
  Matching& m_;
  std::vector<float> price_;  // m_.price rounded down
  std::vector<List> lists_;
  std::unordered_map<int, LongList> long_;  // of the few rows that need more than kCapacity candidates
  int64_t long_entries_ = 0;
  std::vector<char> constant_;  // rows without preference stay out of the auction
  int64_t selects_left_;
  std::vector<int> columns_;
  std::vector<float> values_;
  std::vector<std::pair<double, int>> order_;
};

}  // namespace

bool assignment_solve_sparse(const ScoreView<float>& scores, Isa isa, float low, float high, Matching& matching) {
  return SparseSolver(scores, isa, low, high, matching).run();
}

}  // namespace ffmerge
