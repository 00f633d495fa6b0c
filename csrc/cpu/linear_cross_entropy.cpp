// linear_cross_entropy on the CPU, forward: 32 rows in the lanes of a panel, their words one below
// the other.
//
//   z = softcap(weight hidden + bias),  top = max_y z_y,  others = sum_{y != w} exp(z_y - top)
//   log p(w) = -log(1 + others / exp(z_w - top)),  lse = top + log(others + exp(z_w - top))
//   loss = -(1 - b) log p(w) - b mean_{y in Y, y != w} (z_y - lse)                          (D3)
//
// A task makes the logits of a block of words in fp32 and leaves exp(z - the block's own top) in
// their place: times one factor a row that is the gradient, but for the target and the bag.
#include "head.h"

namespace groundkern {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr double WORK = 32;  // multiply-adds that a logit is worth beside its product

template <class T>
struct Forward : Head<T> {
  using Base = Head<T>;
  using Base::bags, Base::blocks, Base::D, Base::level, Base::N, Base::op, Base::own, Base::panels,
      Base::PER_WORD, Base::width;

  const int64_t depth = own ? (D + PER_WORD - 1) / PER_WORD * PER_WORD : 0;
  const int threads = Base::threads(blocks, WORK + static_cast<double>(depth));
  const Buffer<T> hidden{depth * width};             // the transpose in paired panels
  const Buffer<T> copies{threads * WORDS * depth};   // of rows of weight
  const Buffer<float> scratch{threads * WORDS * LANES};
  const Buffer<float> others{blocks * width};        // sums of exp(z - the block's top)
  const Buffer<int32_t> word{blocks * width};        // the first that has the block's top
  const Buffer<double> bag{op.ids == nullptr ? 0 : blocks * width};  // sums of z

  using Base::Base;

  void run(const CrossEntropyResults& results) const {
    parallel_for(own ? panels : 0, threads, [&](int64_t panel, int) { pack(panel); });
    parallel_for(blocks, threads, [&](int64_t b, int thread) {
      T* const copy = copies.data() + thread * WORDS * depth;
      const T* const weight = own ? rows_of_weight(b, copy) : nullptr;
      const int64_t stride = weight == copy ? depth : op.weight.stride[0];
      for (int64_t panel = 0; panel < panels; ++panel) {
        block(b, panel, weight, stride, scratch.data() + thread * WORDS * LANES);
      }
    });
    parallel_for(panels, threads, [&](int64_t panel, int) { finish(panel, results); });
  }

  void pack(int64_t panel) const {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t n = panel * LANES + lane;
      put_transposed(n < N ? op.hidden.template row<T>(n) : nullptr, D, lane,
                     hidden.data() + panel * depth * LANES);
    }
  }

  // In place, or copied with zeros where the product would read past them.
  const T* rows_of_weight(int64_t b, T* copy) const {
    const int64_t count = Base::count(b);
    if (count % TALLEST == 0 && D % PER_WORD == 0) return op.weight.template row<T>(b * WORDS);
    for (int64_t y = 0; y < WORDS; ++y) {
      const T* const from = y < count ? op.weight.template row<T>(b * WORDS + y) : nullptr;
      for (int64_t d = 0; d < depth; ++d) {
        copy[y * depth + d] = from != nullptr && d < D ? from[d] : T{};
      }
    }
    return copy;
  }

  void block(int64_t b, int64_t panel, const T* weight, int64_t stride, float* scores) const {
    const int64_t first = b * WORDS, count = Base::count(b), at = b * width + panel * LANES;
    if (own) {
      const int64_t lanes = Base::lanes(panel) > HALF ? LANES : HALF;
      for (int64_t y = 0; y < count; ++y) {
        std::fill(scores + y * LANES + lanes, scores + (y + 1) * LANES, 0.0f);
      }
      Base::products.rows(whole_tiles(count), lanes, depth, weight, stride, hidden.data() + panel * depth * LANES,
                          depth, scores, WORDS, false);
    } else {
      float ones[LANES];
      std::fill(ones, ones + LANES, 1.0f);
      Base::read(b, panel, ones, scores);
    }
    const float* const bias = op.bias == nullptr ? nullptr : op.bias + first;
    level.top_words(scores, count, bias, op.softcap, op.tops + at, word.data() + at);
    std::fill(scores + count * LANES, scores + padded(count) * LANES, NOTHING);
    if (op.ids != nullptr) add_bags(b, panel, scores);
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {  // the target leaves the block
      const int64_t n = panel * LANES + l, w = op.target[n] - first;
      if (w < 0 || w >= count) continue;
      op.terms[TARGET_LESS_TOP * width + n] = scores[w * LANES + l];  // finish() takes the top off
      scores[w * LANES + l] = NOTHING;
    }
    float norm[LANES];
    for (int64_t l = 0; l < LANES; ++l) {
      norm[l] = op.tops[at + l] == NOTHING ? 0.0f : op.tops[at + l];
    }
    if (op.softcap > 0.0f) {
      level.capped_exponentials(scores, padded(count), norm, op.softcap, others.data() + at);
    } else {
      level.exponentials(scores, padded(count), norm, others.data() + at, scores);
    }
    T* const logits = Base::logits(b, panel);
    if (own) {
      Base::pair(b, scores, logits);
    } else {
      Base::words.write(scores, count, width, logits);
    }
  }

  void add_bags(int64_t b, int64_t panel, const float* z) const {
    const int64_t row = panel * LANES;
    double* const sum = bag.data() + b * width + row;
    std::fill(sum, sum + LANES, 0.0);
    bags.among(row, row + Base::lanes(panel), b,
               [&](int64_t label, int64_t i, int64_t low, int64_t high) {
      const float* const of_label = z + (label - b * WORDS) * LANES;
      for (int64_t n = low; n < high; ++n) {
        if (label != op.target[n]) sum[n - row] += of_label[n - row];
        if (op.slopes == nullptr) continue;
        op.slopes[n * op.longest + i] = cap_slope(of_label[n - row], op.softcap);
      }
    });
  }

  // Over all blocks, for the rows of a panel.
  void finish(int64_t panel, const CrossEntropyResults& results) const {
    float top[LANES];
    int64_t predicted[LANES] = {};
    double sum[LANES] = {}, of_bag[LANES] = {};
    std::fill(top, top + LANES, NOTHING);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        if (op.tops[at + l] > top[l]) {
          top[l] = op.tops[at + l];
          predicted[l] = b * WORDS + word.data()[at + l];
        }
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        const float below = op.tops[at + l] == top[l] ? 0.0f : op.tops[at + l] - top[l];
        sum[l] += others.data()[at + l] * exponential(below);
      }
      for (int64_t l = 0; l < LANES && op.ids != nullptr; ++l) of_bag[l] += bag.data()[at + l];
    }
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {
      const int64_t n = panel * LANES + l;
      results.predicted[n] = predicted[l];
      finish(n, top[l], static_cast<float>(sum[l]), of_bag[l], results);
    }
  }

  void finish(int64_t n, float top, float others, double of_bag,
              const CrossEntropyResults& results) const {
    const float target = op.terms[TARGET_LESS_TOP * width + n] - top;
    const float log_sum = std::log(others + std::exp(target));
    float log_prob = 0.0f;
    if (others != 0.0f) {  // also where it is NaN
      const float odds = std::log(others) - target;  // log of (1 - p) / p
      log_prob = -(std::max(odds, 0.0f) + std::log1p(std::exp(-std::fabs(odds))));
    }
    float loss = -log_prob;
    const int64_t labels = bags.count(n);
    if (labels > 0) {
      const double mean = of_bag / static_cast<double>(labels) - top - log_sum;
      loss = (1.0f - op.smoothing) * loss - op.smoothing * static_cast<float>(mean);
    }
    op.terms[TOP * width + n] = top;
    op.terms[TARGET_LESS_TOP * width + n] = target;
    op.terms[OTHERS * width + n] = others;
    results.loss[n] = loss;
    results.log_prob[n] = log_prob;
    results.lse[n] = top + log_sum;
  }
};

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropy& op, const CrossEntropyResults& results) {
  if (op.dtype == Dtype::bfloat16) {
    Forward<bfloat16>(op).run(results);
  } else {
    Forward<float>(op).run(results);
  }
}

}  // namespace groundkern
