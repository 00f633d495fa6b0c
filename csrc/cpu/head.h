// What both directions of linear_cross_entropy share. Rows are in the lanes of panels, vocabulary
// entries in blocks of ENTRIES.
#pragma once

#include "lists.h"
#include "panels.h"

namespace groundkern {

inline float cap_slope(float z, float cap) {
  return cap > 0.0f ? 1.0f - (z / cap) * (z / cap) : 1.0f;
}

// log p(w) and log sum_y exp(z_y - top), from others = sum_{y != w} exp(z_y - top) and from
// target = z_w - top: neither cancels as p -> 1.
inline float target_log_prob(float others, float target) {
  if (others == 0.0f) return 0.0f;               // but not if it is NaN
  const float odds = std::log(others) - target;  // log of (1 - p) / p
  return -(std::max(odds, 0.0f) + std::log1p(std::exp(-std::fabs(odds))));
}
inline double log_of_sum(double others, float target) {
  return target == 0.0f ? std::log1p(others) : std::log(others + std::exp(double{target}));
}

// The weights t_y of a row's loss sum_y t_y (lse - z_y), where a label counts once for each time
// that it is listed.
struct RowWeights {
  double own;     // of the target, apart from what label smoothing spreads over all entries
  double label;   // of a label of the list whose own weight is 1
  double list;    // of the list
  double entry;   // of a vocabulary entry whose class weighs 1
  double spread;  // of all entries
};

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
  const Lists lists{op.labels, op.inputs.N, op.inputs.V};
  const int64_t N = op.inputs.N, V = op.inputs.V, D = op.inputs.D, width = padded(N);
  const int64_t panels = width / LANES, blocks = (V + ENTRIES - 1) / ENTRIES;
  const bool own = op.inputs.weight.data != nullptr;  // whether the products are ours
  const int64_t stride = own ? LANES : width;         // from an entry's logits to the next
  const float cap = op.options.softcap / op.options.temperature;  // |z| < cap; 0: none
  const double classes = class_sum(0, V);

  explicit Head(const LinearCrossEntropy& op) : op(op) {}

  int64_t count(int64_t block) const { return std::min(ENTRIES, V - block * ENTRIES); }
  int64_t lanes(int64_t panel) const { return std::min(LANES, N - panel * LANES); }
  int threads(int64_t tasks, double work) const {
    return useful_threads(tasks, work * static_cast<double>(V) * width, op.options.threads);
  }

  // A block's logits, or scores, of a panel of rows start at this element. With our own products
  // they are paired panels [V, LANES]; else [V, width], as another library's product writes them.
  int64_t place(int64_t block, int64_t panel) const {
    return own ? (panel * padded(V) + block * ENTRIES) * LANES
               : block * ENTRIES * width + panel * LANES;
  }
  T* logits(int64_t block, int64_t panel) const {
    return static_cast<T*>(op.saved.logits) + place(block, panel);
  }

  // scores [entries, LANES] = a block's logits times factor [LANES].
  void read(int64_t block, int64_t panel, const float* factor, float* scores) const {
    const T* const from = logits(block, panel);
    if (own && PER_UNIT == 2) {
      isa.widen(reinterpret_cast<const uint32_t*>(from), padded(count(block)), factor, scores);
    } else {
      const int64_t rows = own ? padded(count(block)) : count(block);
      lane_rows.read(from, stride, rows, factor, scores);
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

  bool smooths() const { return op.options.label_smoothing > 0.0f; }

  // The class weights from an entry on; null: 1.
  const float* class_weight(int64_t entry) const {
    return op.labels.class_weight == nullptr ? nullptr : op.labels.class_weight + entry;
  }

  // The sum of the class weights of some entries.
  double class_sum(int64_t first, int64_t count) const {
    const float* const weight = class_weight(first);
    if (!smooths() || weight == nullptr) return static_cast<double>(count);
    double sum = 0.0;
    for (int64_t y = 0; y < count; ++y) sum += weight[y];
    return sum;
  }

  RowWeights weights(int64_t n) const {
    const Lists::Rest rest = lists.rest(n);
    const double b = rest.count > 0 ? op.options.smoothing : 0.0;
    const double share = op.options.smoothing > 0.0f ? b / std::max<int64_t>(rest.count, 1) : 1.0;
    const double smoothing = op.options.label_smoothing, kept = 1.0 - smoothing;
    const double alpha = op.labels.own == nullptr ? 1.0 : op.labels.own[n];
    const double entry = smoothing / static_cast<double>(V);
    return {kept * alpha * (1.0 - b), kept * share, kept * share * rest.weight, entry,
            entry * classes};
  }
};

}  // namespace groundkern
