// linear_cross_entropy on the CPU, forward. Logits are transposed: 32 rows in the lanes of a panel,
// the vocabulary entries one below the other.
//
//   z = softcap(weight hidden + bias),  top = max_y z_y,  others = sum_{y != w} exp(z_y - top)
//   log p(w) = -log(1 + others / exp(z_w - top)),  lse = top + log(others + exp(z_w - top))
//   loss = -(1 - b) log p(w) - b mean_{y in Y, y != w} (z_y - lse)                          (D3)
//
// A task computes the logits of a block of vocabulary entries in fp32 and stores exp(z - the
// block's top). The backward multiplies these by one factor per row to get the gradient, except at
// the target and the labels of the bag.
#include "head.h"

namespace groundkern {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr double WORK = 32;  // multiply-adds that take as long as a logit without its product

template <class T>
struct Forward : Head<T> {
  using Base = Head<T>;
  using Base::bags, Base::blocks, Base::D, Base::isa, Base::N, Base::op, Base::own, Base::panels,
      Base::PER_UNIT, Base::width;

  const int64_t depth = own ? (D + PER_UNIT - 1) / PER_UNIT * PER_UNIT : 0;
  const int threads = Base::threads(blocks, WORK + static_cast<double>(depth));
  const Buffer<T> hidden{depth * width};              // [depth, N]: the transpose in paired panels
  const Buffer<T> copies{threads * ENTRIES * depth};  // rows of weight, padded
  const Buffer<float> scratch{threads * ENTRIES * LANES};
  // [blocks, width]: a block's sum of exp(z - its top) without the target, the first entry that has
  // its top, and the sum of z over the row's bag.
  const Buffer<float> others{blocks * width};
  const Buffer<int32_t> entry{blocks * width};
  const Buffer<double> bag{op.labels.ids == nullptr ? 0 : blocks * width};

  using Base::Base;

  void run(const LinearCrossEntropy::Results& to) const {
    parallel_for(own ? panels : 0, threads, [&](int64_t panel, int) { pack(panel); });
    parallel_for(blocks, threads, [&](int64_t b, int thread) {
      T* const copy = copies.data() + thread * ENTRIES * depth;
      const T* const weight = own ? rows_of_weight(b, copy) : nullptr;
      const int64_t stride = weight == copy ? depth : op.inputs.weight.stride[0];
      for (int64_t panel = 0; panel < panels; ++panel) {
        block(b, panel, weight, stride, scratch.data() + thread * ENTRIES * LANES);
      }
    });
    parallel_for(panels, threads, [&](int64_t panel, int) { finish(panel, to); });
  }

  void pack(int64_t panel) const {
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t n = panel * LANES + lane;
      put_transposed(n < N ? op.inputs.hidden.template row<T>(n) : nullptr, D, lane,
                     hidden.data() + panel * depth * LANES);
    }
  }

  // A block's rows of weight where they are, or copied and padded with zeros if the product would
  // read past their end.
  const T* rows_of_weight(int64_t b, T* copy) const {
    const int64_t count = Base::count(b);
    const auto& weight = op.inputs.weight;
    if (count % TALLEST == 0 && D % PER_UNIT == 0) return weight.template row<T>(b * ENTRIES);
    for (int64_t y = 0; y < ENTRIES; ++y) {
      const T* const from = y < count ? weight.template row<T>(b * ENTRIES + y) : nullptr;
      for (int64_t d = 0; d < depth; ++d) {
        copy[y * depth + d] = from != nullptr && d < D ? from[d] : T{};
      }
    }
    return copy;
  }

  void block(int64_t b, int64_t panel, const T* weight, int64_t stride, float* scores) const {
    const int64_t first = b * ENTRIES, count = Base::count(b), at = b * width + panel * LANES;
    if (own) {
      const int64_t lanes = Base::lanes(panel) > HALF ? LANES : HALF;
      for (int64_t y = 0; y < count; ++y) {
        std::fill(scores + y * LANES + lanes, scores + (y + 1) * LANES, 0.0f);
      }
      Base::products.rows(whole_tiles(count), lanes, depth, weight, stride,
                          {hidden.data() + panel * depth * LANES, depth}, {scores, ENTRIES});
    } else {
      float ones[LANES];
      std::fill(ones, ones + LANES, 1.0f);
      Base::read(b, panel, ones, scores);
    }
    const float* const bias = op.inputs.bias == nullptr ? nullptr : op.inputs.bias + first;
    isa.top_entries(scores, count, bias, op.options.softcap, op.saved.tops + at, entry.data() + at);
    std::fill(scores + count * LANES, scores + padded(count) * LANES, NOTHING);
    if (op.labels.ids != nullptr) add_bags(b, panel, scores);
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {  // take the target out of the block
      const int64_t n = panel * LANES + l, w = op.labels.target[n] - first;
      if (w < 0 || w >= count) continue;
      // finish() subtracts the top
      op.saved.terms[TARGET_LESS_TOP * width + n] = scores[w * LANES + l];
      scores[w * LANES + l] = NOTHING;
    }
    float norm[LANES];
    for (int64_t l = 0; l < LANES; ++l) {
      norm[l] = op.saved.tops[at + l] == NOTHING ? 0.0f : op.saved.tops[at + l];
    }
    if (op.options.softcap > 0.0f) {
      isa.capped_exponentials(scores, padded(count), norm, op.options.softcap, others.data() + at);
    } else {
      isa.exponentials(scores, padded(count), norm, others.data() + at, scores);
    }
    T* const logits = Base::logits(b, panel);
    if (own) {
      Base::pair(b, scores, logits);
    } else {
      Base::lane_rows.write(scores, count, width, logits);
    }
  }

  void add_bags(int64_t b, int64_t panel, const float* z) const {
    const int64_t row = panel * LANES;
    double* const sum = bag.data() + b * width + row;
    std::fill(sum, sum + LANES, 0.0);
    bags.among(row, row + Base::lanes(panel), b,
               [&](int64_t label, int64_t i, int64_t low, int64_t high) {
                 const float* const of_label = z + (label - b * ENTRIES) * LANES;
                 for (int64_t n = low; n < high; ++n) {
                   if (label != op.labels.target[n]) sum[n - row] += of_label[n - row];
                   if (op.saved.slopes == nullptr) continue;
                   op.saved.slopes[n * op.labels.longest + i] =
                       cap_slope(of_label[n - row], op.options.softcap);
                 }
               });
  }

  // Combines the blocks, for the rows of a panel.
  void finish(int64_t panel, const LinearCrossEntropy::Results& to) const {
    float top[LANES];
    int64_t predicted[LANES] = {};
    double sum[LANES] = {}, of_bag[LANES] = {};
    std::fill(top, top + LANES, NOTHING);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        if (op.saved.tops[at + l] > top[l]) {
          top[l] = op.saved.tops[at + l];
          predicted[l] = b * ENTRIES + entry.data()[at + l];
        }
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        const float below = op.saved.tops[at + l] == top[l] ? 0.0f : op.saved.tops[at + l] - top[l];
        sum[l] += others.data()[at + l] * exponential(below);
      }
      for (int64_t l = 0; l < LANES && op.labels.ids != nullptr; ++l)
        of_bag[l] += bag.data()[at + l];
    }
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {
      const int64_t n = panel * LANES + l;
      to.predicted[n] = predicted[l];
      finish(n, top[l], static_cast<float>(sum[l]), of_bag[l], to);
    }
  }

  void finish(int64_t n, float top, float others, double of_bag,
              const LinearCrossEntropy::Results& to) const {
    const float target = op.saved.terms[TARGET_LESS_TOP * width + n] - top;
    const float log_sum = std::log(others + std::exp(target));
    float log_prob = 0.0f;
    if (others != 0.0f) {                            // also if it is NaN
      const float odds = std::log(others) - target;  // log of (1 - p) / p
      log_prob = -(std::max(odds, 0.0f) + std::log1p(std::exp(-std::fabs(odds))));
    }
    float loss = -log_prob;
    const int64_t labels = bags.count(n);
    if (labels > 0) {
      const double mean = of_bag / static_cast<double>(labels) - top - log_sum;
      loss = (1.0f - op.options.smoothing) * loss - op.options.smoothing * static_cast<float>(mean);
    }
    op.saved.terms[TOP * width + n] = top;
    op.saved.terms[TARGET_LESS_TOP * width + n] = target;
    op.saved.terms[OTHERS * width + n] = others;
    to.loss[n] = loss;
    to.log_prob[n] = log_prob;
    to.lse[n] = top + log_sum;
  }
};

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropy& op,
                                  const LinearCrossEntropy::Results& to) {
  if (op.inputs.dtype == Dtype::bfloat16) {
    Forward<bfloat16>(op).run(to);
  } else {
    Forward<float>(op).run(to);
  }
}

}  // namespace groundkern
