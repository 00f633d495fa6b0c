// linear_cross_entropy on the CPU: everything but the matrix products, one row of logits a thread.
//
//   z = softcap(logits),  top = max_y z_y,  others = sum_{y != w} exp(z_y - top)
//   log p(w) = -log(1 + others / exp(z_w - top)),  lse = top + log(others + exp(z_w - top))
//   loss = -(1 - b) log p(w) - b mean_{y in Y, y != w} (z_y - lse)                          (D3)
//
// The gradient at the target is made of `others`: p - 1 would cancel as p -> 1. The bag's logits
// are read from the row, which is in cache: a few hundred loads against V.
#include "../rows.h"

namespace groundkern {
namespace {

constexpr int64_t WORDS = 512;  // logits that are widened and capped at a time

// tanh to 2 ulp (Cephes), branch-free.
GROUNDKERN_INLINE float hyperbolic_tangent(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

GROUNDKERN_INLINE float capped(float logit, float softcap) {
  return softcap > 0.0f ? softcap * hyperbolic_tangent(logit / softcap) : logit;
}

// z [count] = softcap(logits [count])
template <class T>
GROUNDKERN_INLINE void load_words(const T* logits, int64_t count, float softcap, float* z) {
  if (softcap > 0.0f) {
    for (int64_t y = 0; y < count; ++y) {
      z[y] = softcap * hyperbolic_tangent(to_float(logits[y]) / softcap);
    }
  } else {
    for (int64_t y = 0; y < count; ++y) z[y] = to_float(logits[y]);
  }
}

struct Largest {
  float value;
  int64_t word;  // the first of its words
};

template <class T>
CLONES Largest largest(const T* logits, int64_t V, float softcap) {
  float z[WORDS];
  Largest top{-std::numeric_limits<float>::infinity(), 0};
  for (int64_t first = 0; first < V; first += WORDS) {
    const int64_t count = std::min(WORDS, V - first);
    load_words(logits + first, count, softcap, z);
    float maximum = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : maximum)
    for (int64_t y = 0; y < count; ++y) maximum = std::max(maximum, z[y]);
    if (maximum > top.value) {
      int64_t y = 0;
      while (y < count - 1 && z[y] != maximum) ++y;
      top = {maximum, first + y};
    }
  }
  return top;
}

// sum_y exp(z_y - top) over the words but one
template <class T>
CLONES double sum_of_others(const T* logits, int64_t V, float softcap, float top, int64_t target) {
  float z[WORDS];
  double total = 0.0;
  for (int64_t first = 0; first < V; first += WORDS) {
    const int64_t count = std::min(WORDS, V - first);
    load_words(logits + first, count, softcap, z);
    if (target >= first && target < first + count) {
      z[target - first] = -std::numeric_limits<float>::infinity();
    }
    for (int64_t y = 0; y < count; ++y) z[y] = exponential(z[y] - top);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t y = 0; y < count; ++y) sum += z[y];
    total += sum;
  }
  return total;
}

// logits [V] = factor exp(z - top), times the cap's slope
template <class T>
CLONES void store_probabilities(T* logits, int64_t V, float softcap, float top, float factor) {
  float z[WORDS];
  const float per_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  for (int64_t first = 0; first < V; first += WORDS) {
    const int64_t count = std::min(WORDS, V - first);
    load_words(logits + first, count, softcap, z);
    for (int64_t y = 0; y < count; ++y) {
      const float t = z[y] * per_softcap;
      const float dz = factor * exponential(z[y] - top) * (1.0f - t * t);
      logits[first + y] = from_float<T>(dz);
    }
  }
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
Row forward_row(const LinearCrossEntropy& op, const CrossEntropyRows& rows, int64_t n,
                const T* logits, Bag& bag) {
  const int64_t V = op.logits.size[1], w = op.target[n];
  const Largest top = largest(logits, V, op.softcap);
  Row row{};
  row.top = top.value;
  row.target = capped(to_float(logits[w]), op.softcap) - top.value;
  row.others = static_cast<float>(sum_of_others(logits, V, op.softcap, top.value, w));
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
    for (int64_t i = 0; i < bag.count; ++i) sum += bag.z[i] - top.value;
    const float mean = static_cast<float>(sum / static_cast<double>(bag.count)) - log_sum;
    row.smoothing = op.smoothing;
    loss = (1.0f - row.smoothing) * loss - row.smoothing * mean;
  }
  rows.loss[n] = loss;
  rows.log_prob[n] = log_prob;
  rows.lse[n] = top.value + log_sum;
  rows.predicted[n] = top.word;
  return row;
}

template <class T>
void backward_row(const LinearCrossEntropy& op, const CrossEntropyRows& rows, int64_t n,
                  const Row& row, const Bag& bag, T* logits) {
  const int64_t w = op.target[n];
  const float dloss = rows.dloss != nullptr ? rows.dloss[n] : 0.0f;
  const float dlog_prob = rows.dlog_prob != nullptr ? rows.dlog_prob[n] : 0.0f;
  const float dlse = rows.dlse != nullptr ? rows.dlse[n] : 0.0f;
  const float z_target = capped(to_float(logits[w]), op.softcap);
  const float factor = (dloss - dlog_prob + dlse) / row.sum;
  store_probabilities(logits, op.logits.size[1], op.softcap, row.top, factor);

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
  std::vector<Bag> bags(threads, Bag(op.longest));
  parallel_for(N, threads, [&](int64_t n, int thread) {
    T* const logits = op.logits.row<T>(n);
    const Row row = forward_row(op, rows, n, logits, bags[thread]);
    if (backward) backward_row(op, rows, n, row, bags[thread], logits);
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
