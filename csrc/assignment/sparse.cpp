// Prices only rise, so a bound on the worth of the columns that are not in a row's list stays true, and a row of the
// matrix is read again only when the list's second best falls below that bound (lists: after Bertsekas' auction with
// epsilon scaling, 1988; end game: Jonker and Volgenant 1987, on the lists).
#include "assignment/sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "assignment/cheapest.h"
#include "assignment/kernels.h"

namespace ffmerge {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

constexpr int kWanted = 32;        // candidates asked for ...
constexpr int kCapacity = 64;      // ... and kept at most; a multiple of 16
constexpr double kLargest = 1e30;  // float32 prices must not overflow

// Bids rise by epsilon of the typical gain of a row's best column over the first one not in its list.
constexpr double kEpsilonFirst = 2e-2, kEpsilonLast = 8e-4, kEpsilonStep = 0.04;
// Several times what anything but heavy ties or extreme scales was seen to take; beyond, the dense solver is faster.
constexpr int kBidsPerRow = 100;
constexpr int kSelectsPerRow = 10;  // reads of whole rows
constexpr int kEventsPerRow = 20;   // of the shortest paths
constexpr int kRowBids = 4;         // augmenting-row steps
// Rows looked at for ties, and how many best columns they may have on average: with more, the dense solver is faster.
constexpr int kSampledRows = 64;
constexpr int kTiesPerRow = 3;

// The largest float not above x. With prices rounded this way no column is worth less in float32 than in float64, and
// bounds found in float32 hold for both.
float round_down(double x) {
  const float y = static_cast<float>(x);
  return y > x ? std::nextafter(y, -std::numeric_limits<float>::infinity()) : y;
}

class SparseSolver {
 public:
  SparseSolver(const ScoreView<float>& scores, Isa isa, Matching& matching, ScoreRange& range)
      : scores_(scores),
        d_(scores.size),
        kernels_(assignment_kernels(isa)),
        m_(matching),
        range_(range),
        price_(d_, 0.0f),
        lists_(d_),
        constant_(d_),
        every_column_(d_),
        zeros_(d_, 0.0f),
        selects_left_(static_cast<int64_t>(kSelectsPerRow) * d_),
        columns_(d_ + 16),
        values_(d_ + 16) {
    std::iota(every_column_.begin(), every_column_.end(), 0);
  }

  bool run() {
    m_ = Matching(d_);
    if (!fill_lists() || !auction_phases()) return false;
    std::copy(price_.begin(), price_.end(), m_.price.begin());
    return augment_rows() && augment_shortest();
  }

 private:
  // --- candidate lists

  struct List {
    int columns[kCapacity];
    float values[kCapacity];  // sign * score
    int count = 0;            // without padding
    double bound = -kInf;     // no column left out is worth more; -inf: none is left out
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
    if (constant_[i]) return {every_column_.data(), zeros_.data(), d_};
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

  bool fill_lists() {
    int overflowing = 0, sampled = 0;
    int64_t tied = 0;
    std::vector<double> gains;
    for (int i = 0; i < d_; ++i) {
      float low, high;
      const bool no_nan = kernels_.range(scores_.row(i), d_, &low, &high);
      range_.include(low, high, no_nan);
      if (range_.largest() > kLargest) return false;
      constant_[i] = low == high;
      constant_rows_ += constant_[i];
      if (constant_[i]) continue;
      overflowing += refill(i);
      if (overflowing > d_ / 4) return false;  // ties beyond what a list can hold
      const float best = scores_.sign > 0 ? high : -low, worst = scores_.sign > 0 ? low : -high;
      if (sampled++ < kSampledRows) {
        tied += std::count(lists_[i].values, lists_[i].values + lists_[i].count, best);
        if (sampled == kSampledRows && tied >= kTiesPerRow * kSampledRows) return false;
      }
      gains.push_back(best - std::max<double>(lists_[i].bound, worst));
    }
    if (gains.empty()) return false;
    std::nth_element(gains.begin(), gains.begin() + gains.size() / 2, gains.end());
    gain_ = gains[gains.size() / 2];
    return gain_ > 0;
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
    int64_t bids_left = static_cast<int64_t>(kBidsPerRow) * d_;
    const double last = kEpsilonLast * gain_;
    for (double epsilon = kEpsilonFirst * gain_;; epsilon = std::max(last, kEpsilonStep * epsilon)) {
      if (!auction(static_cast<float>(epsilon), bids_left)) return false;
      if (epsilon <= last) return true;
    }
  }

  // Every row bids for its best column what it gains over the second best, plus epsilon; the row that loses it is next.
  bool auction(float epsilon, int64_t& bids_left) {
    std::fill(m_.row_of.begin(), m_.row_of.end(), -1);
    if (constant_rows_ > 0) cheapest_.rebuild(price_);
    for (int pass = 0; pass < 2; ++pass) {  // constant rows take what is left
      for (int start = 0; start < d_; ++start) {
        if (constant_[start] != pass) continue;
        for (int i = start; i >= 0;) {
          if (--bids_left < 0 || selects_left_ < 0) return false;
          const BestTwo two = constant_[i] ? cheapest_two() : listed_two(i);
          float& price = price_[two.column];
          const float raised = price + (two.best - two.second + epsilon);
          price = raised > price ? raised : std::nextafter(price, std::numeric_limits<float>::infinity());
          i = std::exchange(m_.row_of[two.column], i);
        }
      }
    }
    return true;
  }

  BestTwo cheapest_two() {
    const auto [first, second] = cheapest_.two(price_);
    return {-first.first, -second.first, first.second};
  }

  BestTwo listed_two(int i) {
    List& list = lists_[i];
    BestTwo two = kernels_.best_two(list.columns, list.values, padded(list.count), price_.data());
    if (two.second >= list.bound) return two;
    refill(i);
    return kernels_.best_two(list.columns, list.values, padded(list.count), price_.data());
  }

  static int padded(int count) { return (count + 15) / 16 * 16; }

  // --- end game, in float64: from here on every assigned row has a column of largest worth

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

  ExactTwo exact_listed_two(int i) const {
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
    two = exact_listed_two(i);
    if (two.second < lists_[i].bound) {
      refill(i);
      two = exact_listed_two(i);
      while (two.best < lists_[i].bound) {
        if (selects_left_ < 0 || !widen(i)) return false;
        two = exact_listed_two(i);
      }
    }
    two.second = std::min(std::max(two.second, lists_[i].bound), two.best);
    return true;
  }

  // Augmenting row reduction: bids with epsilon 0. A row displaced without a rise in price waits for the next sweep.
  bool augment_rows() {
    std::fill(m_.row_of.begin(), m_.row_of.end(), -1);
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
          if (i >= 0 && !(gain > 1e-12 * gain_)) {
            waiting.push_back(i);
            break;
          }
        }
      }
    }
    place_constant_rows();
    return true;
  }

  // The cheapest columns, as far as they are free, all at the price of the last: equally good for all these rows.
  void place_constant_rows() {
    if (constant_rows_ == 0) return;
    std::vector<int> cheapest = every_column_;
    std::stable_sort(cheapest.begin(), cheapest.end(), [this](int j, int k) {
      return std::make_pair(m_.price[j], m_.row_of[j] >= 0) < std::make_pair(m_.price[k], m_.row_of[k] >= 0);
    });
    int placed = 0;
    for (int i = 0; i < d_; ++i) {
      if (!constant_[i]) continue;
      if (m_.row_of[cheapest[placed]] >= 0) break;
      m_.assign(i, cheapest[placed++]);
    }
    for (int q = 0; q + 1 < placed; ++q) raise(cheapest[q], m_.price[cheapest[placed - 1]]);
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
    std::vector<int> columns;                    // closed in this search
    std::vector<Event> heap;
    int number = 0;
    double limit = kInf;  // the shortest distance of a free column so far
    bool constant_scanned = false;

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
    for (int i = 0; i < d_; ++i) {
      if (m_.column_of[i] < 0) rows.push_back(i);
    }
    if (rows.empty()) return true;
    Search search(d_);
    const int64_t budget = static_cast<int64_t>(kEventsPerRow) * d_;
    int64_t events_left = budget;
    for (size_t done = 0; done < rows.size(); ++done) {
      const int64_t expected = done < 16 ? 0 : (budget - events_left) * static_cast<int64_t>(rows.size() / done);
      if (expected > budget || !augment(search, rows[done], events_left)) return false;
    }
    return true;
  }

  bool augment(Search& s, int start, int64_t& events_left) {
    ExactTwo two;
    two.best = -*std::min_element(m_.price.begin(), m_.price.end());
    if (!constant_[start] && !exact_two(start, two)) return false;
    ++s.number;
    s.heap.clear();
    s.columns.clear();
    s.constant_scanned = false;
    s.limit = kInf;
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
      const double score = constant_[row] ? 0.0 : static_cast<double>(scores_.sign * scores_.row(row)[column]);
      scan(s, row, event.distance, score - m_.price[column]);
    }
  }

  void scan(Search& s, int row, double distance, double worth) {
    if (constant_[row] && std::exchange(s.constant_scanned, true)) return;  // a second one finds nothing shorter
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
      if (through >= s.limit || (s.reached[j] == s.number && through >= s.distance[j])) continue;
      s.reached[j] = s.number;
      s.distance[j] = through;
      s.previous[j] = row;
      const bool free = m_.row_of[j] < 0;
      if (free) s.limit = through;
      s.push({through, free ? kFree : kAssigned, j});
    }
    const double unlisted = base - lists_[row].bound;
    if (unlisted < s.limit) s.push({unlisted, kBound, row});
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
  Matching& m_;
  ScoreRange& range_;
  std::vector<float> price_;  // m_.price rounded down
  std::vector<List> lists_;
  std::unordered_map<int, LongList> long_;  // of the few rows that need more than kCapacity candidates
  int64_t long_entries_ = 0;
  double gain_ = 0;                // scale of epsilon
  std::vector<char> constant_;     // rows without preference: their candidates are all columns, at score 0
  int constant_rows_ = 0;
  std::vector<int> every_column_;
  std::vector<float> zeros_;
  CheapestColumns<float> cheapest_;
  int64_t selects_left_;
  std::vector<int> columns_;
  std::vector<float> values_;
  std::vector<std::pair<double, int>> order_;
};

}  // namespace

bool assignment_solve_sparse(const ScoreView<float>& scores, Isa isa, Matching& matching, ScoreRange& range) {
  return SparseSolver(scores, isa, matching, range).run();
}

}  // namespace ffmerge
