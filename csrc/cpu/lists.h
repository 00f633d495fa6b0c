// The lists of labels that the rows of linear_cross_entropy share (bags) or have to themselves
// (soft targets), sorted, so that the labels in a block of vocabulary entries are contiguous.
#pragma once

#include <algorithm>
#include <vector>

#include "../ops.h"

namespace groundkern {

class Lists {
 public:
  struct Label {
    int64_t id;
    float weight;
  };
  // The labels of a row's list other than its target: their number and their weights' sum.
  struct Rest {
    int64_t count;
    double weight;
  };

  Lists(const LinearCrossEntropy::Labels& given, int64_t N, int64_t V)
      : given(given), per_list((V + ENTRIES - 1) / ENTRIES) {
    if (given.ids == nullptr) return;
    labels.resize(given.offsets[given.lists]);
    blocks.assign(given.lists * per_list, false);
    std::vector<bool> sorted(given.lists, false);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t g = given.index[n];
      if (g >= 0 && !sorted[g]) sort(g);
      if (g >= 0) sorted[g] = true;
    }
  }

  // Calls visit(label, place in the list, low, high) for every label in a block of a list that the
  // rows [low, high) of [first, last) have, if it weighs anything.
  template <class Visit>
  void among(int64_t first, int64_t last, int64_t block, const Visit& visit) const {
    if (given.ids == nullptr) return;
    for (int64_t low = first, high; low < last; low = high) {
      const int64_t g = given.index[low];
      for (high = low + 1; high < last && given.index[high] == g;) ++high;
      if (g < 0 || !blocks[g * per_list + block]) continue;
      const Label* const begin = labels.data() + given.offsets[g];
      const Label* const end = labels.data() + given.offsets[g + 1];
      const Label* i = std::lower_bound(begin, end, Label{block * ENTRIES, 0.0f}, before);
      for (; i != end && i->id < (block + 1) * ENTRIES; ++i) {
        if (i->weight != 0.0f) visit(*i, i - begin, low, high);
      }
    }
  }

  Rest rest(int64_t n) const {
    if (given.ids == nullptr || given.index[n] < 0) return {0, 0.0};
    const auto first = labels.begin() + given.offsets[given.index[n]];
    const auto last = labels.begin() + given.offsets[given.index[n] + 1];
    const auto [low, high] = std::equal_range(first, last, Label{given.target[n], 0.0f}, before);
    const int64_t count = (last - first) - (high - low);
    if (given.weights == nullptr) return {count, static_cast<double>(count)};
    double weight = 0.0;
    for (auto i = first; i != last; ++i) weight += i->id == given.target[n] ? 0.0 : i->weight;
    return {count, weight};
  }

 private:
  const LinearCrossEntropy::Labels& given;
  const int64_t per_list;
  std::vector<Label> labels;
  std::vector<bool> blocks;  // [lists, per_list]: whether the list has a label in the block

  static bool before(const Label& a, const Label& b) { return a.id < b.id; }

  void sort(int64_t g) {
    for (int64_t i = given.offsets[g]; i < given.offsets[g + 1]; ++i) {
      labels[i] = {given.ids[i], given.weights == nullptr ? 1.0f : given.weights[i]};
      blocks[g * per_list + given.ids[i] / ENTRIES] = true;
    }
    std::sort(labels.begin() + given.offsets[g], labels.begin() + given.offsets[g + 1], before);
  }
};

}  // namespace groundkern
