// What both directions of linear_cross_entropy share: rows in panels of lanes, words in blocks.
#pragma once

#include "panels.h"

namespace groundkern {

// The bags with their labels ascending, so that those in a block of words stand together.
class Bags {
 public:
  explicit Bags(const LinearCrossEntropy& op) : op(op) {
    if (op.ids == nullptr) return;
    labels.assign(op.ids, op.ids + op.offsets[op.bags]);
    blocks.assign(op.bags * per_bag, false);
    for (int64_t g = 0; g < op.bags; ++g) {
      std::sort(labels.begin() + op.offsets[g], labels.begin() + op.offsets[g + 1]);
      for (int64_t i = op.offsets[g]; i < op.offsets[g + 1]; ++i) {
        blocks[g * per_bag + labels[i] / WORDS] = true;
      }
    }
  }

  // visit(label, its place in the bag, rows low to high that have it) for every label in a block.
  template <class Visit>
  void among(int64_t first, int64_t last, int64_t block, const Visit& visit) const {
    if (op.ids == nullptr) return;
    for (int64_t low = first, high; low < last; low = high) {
      const int64_t g = op.index[low];
      for (high = low + 1; high < last && op.index[high] == g;) ++high;
      if (g < 0 || !blocks[g * per_bag + block]) continue;
      const int64_t* const begin = labels.data() + op.offsets[g];
      const int64_t* const end = labels.data() + op.offsets[g + 1];
      const int64_t* i = std::lower_bound(begin, end, block * WORDS);
      for (; i != end && *i < (block + 1) * WORDS; ++i) visit(*i, i - begin, low, high);
    }
  }

  // Labels of row n but its own.
  int64_t count(int64_t n) const {
    if (op.ids == nullptr || op.index[n] < 0) return 0;
    const auto first = labels.begin() + op.offsets[op.index[n]];
    const auto last = labels.begin() + op.offsets[op.index[n] + 1];
    const auto [low, high] = std::equal_range(first, last, op.target[n]);
    return (last - first) - (high - low);
  }

 private:
  const LinearCrossEntropy& op;
  const int64_t per_bag = (op.V + WORDS - 1) / WORDS;
  std::vector<int64_t> labels;
  std::vector<bool> blocks;  // [bags, per_bag]: which hold a label
};

inline float cap_slope(float z, float softcap) {
  return softcap > 0.0f ? 1.0f - (z / softcap) * (z / softcap) : 1.0f;
}

template <class T>
const Words<T>& words_of(const Level& level) {
  if constexpr (std::is_same_v<T, float>) {
    return level.words;
  } else {
    return level.words_bfloat16;
  }
}

template <class T>
struct Head {
  static constexpr int64_t PER_WORD = Products<T>::PER_WORD;

  const LinearCrossEntropy& op;
  const Level& level = groundkern::level();
  const Words<T>& words = words_of<T>(level);
  const Products<T> products{level};
  const Bags bags{op};
  const int64_t N = op.N, V = op.V, D = op.D, width = padded(N);
  const int64_t panels = width / LANES, blocks = (V + WORDS - 1) / WORDS;
  const bool own = op.weight.data != nullptr;  // products, and so the panels of the logits

  explicit Head(const LinearCrossEntropy& op) : op(op) {}

  int64_t count(int64_t block) const { return std::min(WORDS, V - block * WORDS); }
  int64_t lanes(int64_t panel) const { return std::min(LANES, N - panel * LANES); }
  int threads(int64_t tasks, double work) const {
    return useful_threads(tasks, work * static_cast<double>(V) * width, op.threads);
  }

  // Rows of `own` logits are paired panels over all words; of others, as the library's product has
  // them: [V, width].
  T* logits(int64_t block, int64_t panel) const {
    T* const data = static_cast<T*>(op.logits);
    if (own) return data + (panel * padded(V) + block * WORDS) * LANES;
    return data + block * WORDS * width + panel * LANES;
  }

  // A block's logits times factor [LANES]; rows to a whole panel are zeros.
  void read(int64_t block, int64_t panel, const float* factor, float* scores) const {
    const T* const from = logits(block, panel);
    if (own && PER_WORD == 2) {
      level.widen(reinterpret_cast<const uint32_t*>(from), padded(count(block)), factor, scores);
    } else {
      words.read(from, own ? LANES : width, own ? padded(count(block)) : count(block), factor, scores);
    }
  }

  // Scores of a block into a paired panel.
  void pair(int64_t block, const float* scores, T* to) const {
    if (PER_WORD == 2) {
      level.narrow(scores, padded(count(block)), nullptr, reinterpret_cast<uint32_t*>(to));
    } else {
      words.write(scores, padded(count(block)), LANES, to);
    }
  }
};

}  // namespace groundkern
