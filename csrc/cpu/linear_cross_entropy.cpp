// linear_cross_entropy on the CPU: everything but the matrix products, one row of logits a thread.
//
//   z = softcap(logits),  top = max_y z_y,  others = sum_{y != w} exp(z_y - top)
//   log p(w) = -log(1 + others / exp(z_w - top)),  lse = top + log(others + exp(z_w - top))
//   loss = -(1 - b) log p(w) - b mean_{y in Y, y != w} (z_y - lse)                          (D3)
//
// The gradient at the target is made of `others`: p - 1 would cancel as p -> 1. The bag's logits
// are read from the row, which is in cache: a few hundred loads against V.
#include <type_traits>

#include "panels.h"

namespace groundkern {
namespace {

GROUNDKERN_INLINE float capped(float logit, float softcap) {
  return softcap > 0.0f ? softcap * hyperbolic_tangent(logit / softcap) : logit;
}

// The labels of a row's bag that are not its own, and their capped logits.
struct Bag {
  int64_t count = 0;
  std::vector<int64_t> label;
  std::vector<float> z;

  explicit Bag(int64_t longest) : label(longest), z(longest) {}

  template <class T>
  void take(const LinearCrossEntropy& op, int64_t n, const T* logits) {
    count = 0;
    if (op.ids == nullptr || op.index[n] < 0) return;
    for (int64_t i = op.offsets[op.index[n]]; i < op.offsets[op.index[n] + 1]; ++i) {
      if (op.ids[i] == op.target[n]) continue;
      label[count] = op.ids[i];
      z[count++] = capped(to_float(logits[op.ids[i]]), op.softcap);
    }
  }
};

// What a row's gradient is made of.
struct Row {
  float top;
  float target;  // z_w - top
  float others;
  float sum;        // others + exp(z_w - top)
  float smoothing;  // 0 where the bag holds nothing else
};

float slope(float z, float softcap) {
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
Row forward_row(const Words<T>& words, const LinearCrossEntropy& op, const CrossEntropyRows& rows,
                int64_t n, const T* logits, Bag& bag, const RowTerms& terms) {
  const int64_t V = op.logits.size[1], w = op.target[n];
  const RowSums sums = words.sums(logits, V, op.softcap, w, terms);
  Row row{};
  row.top = sums.top;
  row.target = capped(to_float(logits[w]), op.softcap) - sums.top;
  row.others = static_cast<float>(sums.others);
  row.sum = row.others + std::exp(row.target);
  const float log_sum = std::log(row.sum);
  float log_prob = 0.0f;
  if (row.others != 0.0f) {  // also where it is NaN
    const float odds = std::log(row.others) - row.target;  // log of (1 - p) / p
    log_prob = -(std::max(odds, 0.0f) + std::log1p(std::exp(-std::fabs(odds))));
  }
  float loss = -log_prob;
  bag.take(op, n, logits);
  if (bag.count > 0) {
    double sum = 0.0;
    for (int64_t i = 0; i < bag.count; ++i) sum += bag.z[i] - sums.top;
    const float mean = static_cast<float>(sum / static_cast<double>(bag.count)) - log_sum;
    row.smoothing = op.smoothing;
    loss = (1.0f - row.smoothing) * loss - row.smoothing * mean;
  }
  rows.loss[n] = loss;
  rows.log_prob[n] = log_prob;
  rows.lse[n] = sums.top + log_sum;
  rows.predicted[n] = sums.word;
  return row;
}

template <class T>
void backward_row(const Words<T>& words, const LinearCrossEntropy& op, const CrossEntropyRows& rows,
                  int64_t n, const Row& row, const Bag& bag, const RowTerms& terms, T* logits) {
  const int64_t w = op.target[n];
  const float dloss = rows.dloss != nullptr ? rows.dloss[n] : 0.0f;
  const float dlog_prob = rows.dlog_prob != nullptr ? rows.dlog_prob[n] : 0.0f;
  const float dlse = rows.dlse != nullptr ? rows.dlse[n] : 0.0f;
  const float z_target = capped(to_float(logits[w]), op.softcap);
  const float factor = (dloss - dlog_prob + dlse) / row.sum;
  words.store(terms, op.logits.size[1], row.top, factor, logits);

  const float b = row.smoothing;
  const float p_target = std::exp(row.target) / row.sum;
  const float dtarget = (dlog_prob - dloss * (1.0f - b)) * (row.others / row.sum) +
                        (dloss * b + dlse) * p_target;
  logits[w] = from_float<T>(dtarget * slope(z_target, op.softcap));
  const float share = bag.count > 0 ? dloss * b / static_cast<float>(bag.count) : 0.0f;
  for (int64_t i = 0; i < bag.count; ++i) {
    T& dz = logits[bag.label[i]];
    dz = from_float<T>(to_float(dz) - share * slope(bag.z[i], op.softcap));
  }
}

template <class T>
void run(const LinearCrossEntropy& op, const CrossEntropyRows& rows) {
  constexpr double WORK = 32;  // multiply-adds that a logit is worth
  const int64_t N = op.logits.size[0], V = op.logits.size[1];
  const bool backward = rows.dloss != nullptr || rows.dlog_prob != nullptr || rows.dlse != nullptr;
  const int threads = useful_threads(N, WORK * static_cast<double>(N) * V, op.threads);
  const Words<T>& words = words_of<T>(level());
  std::vector<Bag> bags(threads, Bag(op.longest));
  const int64_t blocks = (V + WORDS - 1) / WORDS, share = blocks * (WORDS + 1);
  const Buffer<float> scratch(backward ? threads * share : 0);
  parallel_for(N, threads, [&](int64_t n, int thread) {
    T* const logits = op.logits.row<T>(n);
    float* const value = backward ? scratch.data() + thread * share : nullptr;
    const RowTerms terms{value, value + (backward ? blocks * WORDS : 0)};
    const Row row = forward_row(words, op, rows, n, logits, bags[thread], terms);
    if (backward) backward_row(words, op, rows, n, row, bags[thread], terms, logits);
  });
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& op, const CrossEntropyRows& rows) {
  if (op.dtype == Dtype::bfloat16) {
    run<bfloat16>(op, rows);
  } else {
    run<float>(op, rows);
  }
}

}  // namespace groundkern
