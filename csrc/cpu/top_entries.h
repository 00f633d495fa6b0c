// The likeliest vocabulary entries of each row of linear_cross_entropy: by score, and by id where
// scores are equal. Every thread keeps its own best, and the best of those are the same for every
// number of threads.
#pragma once

#include <algorithm>
#include <limits>

#include "panels.h"

namespace groundkern {

class TopEntries {
 public:
  struct Entry {
    float score = -std::numeric_limits<float>::infinity();
    int32_t id = std::numeric_limits<int32_t>::max();  // that of no entry

    bool above(const Entry& other) const {
      return score > other.score || (score == other.score && id < other.id);
    }
  };

  TopEntries(int threads, int64_t width, int64_t k)
      : threads(k > 0 ? threads : 0), width(width), k(k), best(this->threads * width * k) {
    std::fill(best.data(), best.data() + this->threads * width * k, Entry{});
  }

  // Adds the scores [count, LANES] of the entries from `first` on, whose largest are top [LANES],
  // to the lists of the rows from `row` on.
  void add(int thread, int64_t row, int64_t lanes, int64_t first, int64_t count,
           const float* scores, const float* top) const {
    for (int64_t l = 0; l < lanes; ++l) {
      Entry* const list = at(thread, row + l);
      if (!(top[l] >= list[k - 1].score)) continue;
      for (int64_t y = 0; y < count; ++y) {
        insert({scores[y * LANES + l], static_cast<int32_t>(first + y)}, list);
      }
    }
  }

  // The k best entries of a row, best first; those that do not exist are Entry{}.
  const Entry* merged(int64_t row) const {
    for (int thread = 1; thread < threads; ++thread) {
      for (int64_t i = 0; i < k; ++i) insert(at(thread, row)[i], at(0, row));
    }
    return at(0, row);
  }

 private:
  const int threads;
  const int64_t width, k;
  const Buffer<Entry> best;  // [threads, width, k]

  Entry* at(int thread, int64_t row) const { return best.data() + (thread * width + row) * k; }

  void insert(const Entry& one, Entry* list) const {
    if (!one.above(list[k - 1])) return;
    int64_t i = k - 1;
    for (; i > 0 && one.above(list[i - 1]); --i) list[i] = list[i - 1];
    list[i] = one;
  }
};

}  // namespace groundkern
