// What both directions of linear_cross_entropy share. Rows are in the lanes of panels, vocabulary
// entries in blocks of ENTRIES.
#pragma once

#include "panels.h"

namespace groundkern {

// The bags with their labels sorted, so that those in a block of vocabulary entries are contiguous.
class Bags {
 public:
  Bags(const LinearCrossEntropy::Labels& given, int64_t V)
      : given(given), per_bag((V + ENTRIES - 1) / ENTRIES) {
    if (given.ids == nullptr) return;
    labels.assign(given.ids, given.ids + given.offsets[given.bags]);
    blocks.assign(given.bags * per_bag, false);
    for (int64_t g = 0; g < given.bags; ++g) {
      std::sort(labels.begin() + given.offsets[g], labels.begin() + given.offsets[g + 1]);
      for (int64_t i = given.offsets[g]; i < given.offsets[g + 1]; ++i) {
        blocks[g * per_bag + labels[i] / ENTRIES] = true;
      }
    }
  }

  // Calls visit(label, place in the bag, low, high) for every label in a block of a bag that the
  // rows [low, high) of [first, last) have.
  template <class Visit>
  void among(int64_t first, int64_t last, int64_t block, const Visit& visit) const {
    if (given.ids == nullptr) return;
    for (int64_t low = first, high; low < last; low = high) {
      const int64_t g = given.index[low];
      for (high = low + 1; high < last && given.index[high] == g;) ++high;
      if (g < 0 || !blocks[g * per_bag + block]) continue;
      const int64_t* const begin = labels.data() + given.offsets[g];
      const int64_t* const end = labels.data() + given.offsets[g + 1];
      const int64_t* i = std::lower_bound(begin, end, block * ENTRIES);
      for (; i != end && *i < (block + 1) * ENTRIES; ++i) visit(*i, i - begin, low, high);
    }
  }

  // The number of labels in row n's bag other than its target.
  int64_t count(int64_t n) const {
    if (given.ids == nullptr || given.index[n] < 0) return 0;
    const auto first = labels.begin() + given.offsets[given.index[n]];
    const auto last = labels.begin() + given.offsets[given.index[n] + 1];
    const auto [low, high] = std::equal_range(first, last, given.target[n]);
    return (last - first) - (high - low);
  }

 private:
  const LinearCrossEntropy::Labels& given;
  const int64_t per_bag;
  std::vector<int64_t> labels;
  std::vector<bool> blocks;  // [bags, per_bag]: whether the bag has a label in the block
};

inline float cap_slope(float z, float softcap) {
  return softcap > 0.0f ? 1.0f - (z / softcap) * (z / softcap) : 1.0f;
}

template <class T>
const LaneRows<T>& lane_rows_of(const Isa& isa) {
  if constexpr (std::is_same_v<T, float>) {
    return isa.lane_rows;
  } else {
    return isa.lane_rows_bfloat16;
  }
}

// T: the type of the logits and of the products' operands.
template <class T>
struct Head {
  static constexpr int64_t PER_UNIT = Products<T>::PER_UNIT;

  const LinearCrossEntropy& op;
  const Isa& isa = groundkern::chosen_isa();
  const LaneRows<T>& lane_rows = lane_rows_of<T>(isa);
  const Products<T> products{isa};
  const Bags bags{op.labels, op.inputs.V};
  const int64_t N = op.inputs.N, V = op.inputs.V, D = op.inputs.D, width = padded(N);
  const int64_t panels = width / LANES, blocks = (V + ENTRIES - 1) / ENTRIES;
  const bool own = op.inputs.weight.data != nullptr;  // whether the products are ours

  explicit Head(const LinearCrossEntropy& op) : op(op) {}

  int64_t count(int64_t block) const { return std::min(ENTRIES, V - block * ENTRIES); }
  int64_t lanes(int64_t panel) const { return std::min(LANES, N - panel * LANES); }
  int threads(int64_t tasks, double work) const {
    return useful_threads(tasks, work * static_cast<double>(V) * width, op.options.threads);
  }

  // A block's logits of a panel of rows. With our own products the logits are paired panels
  // [V, LANES]; else [V, width], as another library's product writes them.
  T* logits(int64_t block, int64_t panel) const {
    T* const data = static_cast<T*>(op.saved.logits);
    if (own) return data + (panel * padded(V) + block * ENTRIES) * LANES;
    return data + block * ENTRIES * width + panel * LANES;
  }

  // scores [entries, LANES] = a block's logits times factor [LANES].
  void read(int64_t block, int64_t panel, const float* factor, float* scores) const {
    const T* const from = logits(block, panel);
    if (own && PER_UNIT == 2) {
      isa.widen(reinterpret_cast<const uint32_t*>(from), padded(count(block)), factor, scores);
    } else {
      const int64_t rows = own ? padded(count(block)) : count(block);
      lane_rows.read(from, own ? LANES : width, rows, factor, scores);
    }
  }

  // Stores a block's scores [entries, LANES] as a paired panel.
  void pair(int64_t block, const float* scores, T* to) const {
    if (PER_UNIT == 2) {
      isa.narrow(scores, padded(count(block)), nullptr, reinterpret_cast<uint32_t*>(to));
    } else {
      lane_rows.write(scores, padded(count(block)), LANES, to);
    }
  }
};

}  // namespace groundkern
