// linear_cross_entropy on the CPU, forward. Logits are transposed: 32 rows in the lanes of a panel,
// the vocabulary entries one below the other.
//
//   z = softcap(weight hidden + bias) / temperature,  top = max_y z_y
//   others = sum_{y != w} exp(z_y - top),  sum = others + exp(z_w - top)
//   log p(w) = -log(1 + others / exp(z_w - top)),  lse = top + log(sum)
//   loss = -t_w log p(w) + sum_{y != w} t_y (lse - z_y) + z_loss lse^2                     (D3)
//   entropy = log(sum) - sum_y p_y (z_y - top)
//
// A task computes the logits of a block of vocabulary entries in fp32 and stores exp(z - the
// block's top). The backward multiplies these by one factor per row to get the gradient, except at
// the target and the labels of the row's list.
#include "head.h"
#include "top_entries.h"

namespace groundkern {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr double WORK = 32;  // multiply-adds that take as long as a logit without its product

// What the blocks of a panel's row add up to.
struct Sums {
  float top = NOTHING;
  int64_t predicted = 0;
  double others = 0.0;  // of exp(z - top), without the target, as in the next
  double moment = 0.0;  // of exp(z - top) (z - top)
  double list = 0.0;    // of the weights of the list's labels times z
  double spread = 0.0;  // of the class weights of all entries times (z - top)
};

template <class T>
struct Forward : Head<T> {
  using Base = Head<T>;
  using Base::blocks, Base::D, Base::isa, Base::lists, Base::N, Base::op, Base::own, Base::panels,
      Base::PER_UNIT, Base::width;

  const LinearCrossEntropy::Results& to;
  const int64_t depth = own ? (D + PER_UNIT - 1) / PER_UNIT * PER_UNIT : 0;
  const int threads = Base::threads(blocks, WORK + static_cast<double>(depth));
  const Buffer<T> hidden{depth * width};              // [depth, N]: the transpose in paired panels
  const Buffer<T> copies{threads * ENTRIES * depth};  // rows of weight, padded
  const Buffer<float> scratch{threads * ENTRIES * LANES};
  // [blocks, width]: the first entry that has the block's top; with that top, the sums of `Sums`
  // over the block; and where they are asked for, else without elements.
  const Buffer<int32_t> entry{blocks * width};
  const Buffer<float> others{blocks * width};
  const Buffer<float> moment{to.entropy == nullptr ? 0 : blocks * width};
  const Buffer<float> spread{Base::smooths() ? blocks * width : 0};
  const Buffer<double> list{op.labels.ids == nullptr ? 0 : blocks * width};
  const TopEntries likeliest{threads, width, to.k};

  Forward(const LinearCrossEntropy& op_, const LinearCrossEntropy::Results& to)
      : Base(op_), to(to) {}

  void run() const {
    parallel_for(own ? panels : 0, threads, [&](int64_t panel, int) { pack(panel); });
    parallel_for(blocks, threads, [&](int64_t b, int thread) {
      T* const copy = copies.data() + thread * ENTRIES * depth;
      const T* const weight = own ? rows_of_weight(b, copy) : nullptr;
      const int64_t from_row_to_row = weight == copy ? depth : op.inputs.weight.stride[0];
      for (int64_t panel = 0; panel < panels; ++panel) {
        float* const scores = scratch.data() + thread * ENTRIES * LANES;
        multiply(b, panel, weight, from_row_to_row, scores);
        block(b, panel, thread, scores);
      }
    });
    parallel_for(panels, threads, [&](int64_t panel, int) { finish(panel); });
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

  // scores [count, LANES] = the logits without their bias.
  void multiply(int64_t b, int64_t panel, const T* weight, int64_t from_row_to_row,
                float* scores) const {
    const int64_t count = Base::count(b);
    if (own) {
      const int64_t lanes = Base::lanes(panel) > HALF ? LANES : HALF;
      for (int64_t y = 0; y < count; ++y) {
        std::fill(scores + y * LANES + lanes, scores + (y + 1) * LANES, 0.0f);
      }
      Base::products.rows(whole_tiles(count), lanes, depth, weight, from_row_to_row,
                          {hidden.data() + panel * depth * LANES, depth}, {scores, ENTRIES});
    } else {
      float ones[LANES];
      std::fill(ones, ones + LANES, 1.0f);
      Base::read(b, panel, ones, scores);
    }
  }

  void block(int64_t b, int64_t panel, int thread, float* scores) const {
    const int64_t first = b * ENTRIES, count = Base::count(b), at = b * width + panel * LANES;
    const float* bias = op.inputs.bias == nullptr ? nullptr : op.inputs.bias + first;
    float* const tops = op.saved.tops + at;
    if (op.options.temperature == 1.0f) {
      isa.top_entries(scores, count, bias, op.options.softcap, tops, entry.data() + at);
    } else {
      isa.temper(scores, count, bias, op.options.softcap, op.options.temperature);
      isa.top_entries(scores, count, nullptr, 0.0f, tops, entry.data() + at);
    }
    std::fill(scores + count * LANES, scores + padded(count) * LANES, NOTHING);
    if (to.k > 0) {
      likeliest.add(thread, panel * LANES, Base::lanes(panel), first, count, scores, tops);
    }
    if (op.labels.ids != nullptr) add_lists(b, panel, scores);
    float norm[LANES];
    for (int64_t l = 0; l < LANES; ++l) norm[l] = tops[l] == NOTHING ? 0.0f : tops[l];
    if (Base::smooths()) {
      isa.weighted_sums(scores, count, norm, Base::class_weight(first), spread.data() + at);
    }
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {  // take the target out of the block
      const int64_t n = panel * LANES + l, w = op.labels.target[n] - first;
      if (w < 0 || w >= count) continue;
      // finish() subtracts the top
      op.saved.terms[TARGET_LESS_TOP * width + n] = scores[w * LANES + l];
      scores[w * LANES + l] = NOTHING;
    }
    if (to.entropy != nullptr) isa.moments(scores, padded(count), norm, moment.data() + at);
    save(b, panel, norm, scores);
  }

  // Sums the exponentials, and stores them or the scores.
  void save(int64_t b, int64_t panel, const float* norm, float* scores) const {
    const int64_t count = Base::count(b);
    float* const sum = others.data() + b * width + panel * LANES;
    if (op.saved.scores != nullptr) {
      isa.less_norm(scores, padded(count), norm, sum);
      float* const kept = op.saved.scores + Base::place(b, panel);
      return isa.lane_rows.write(scores, own ? padded(count) : count, Base::stride, kept);
    }
    T* const logits = Base::logits(b, panel);
    if (op.options.softcap > 0.0f) {
      isa.capped_exponentials(scores, padded(count), norm, Base::cap, sum);
    } else if (own && PER_UNIT == 2) {
      return isa.exponentials_bfloat16(scores, padded(count), norm, sum,
                                       reinterpret_cast<uint32_t*>(logits));
    } else {
      isa.exponentials(scores, padded(count), norm, sum, scores);
    }
    if (own) {
      Base::pair(b, scores, logits);
    } else {
      Base::lane_rows.write(scores, count, width, logits);
    }
  }

  void add_lists(int64_t b, int64_t panel, const float* z) const {
    const int64_t row = panel * LANES;
    double* const sum = list.data() + b * width + row;
    std::fill(sum, sum + LANES, 0.0);
    lists.among(row, row + Base::lanes(panel), b,
                [&](const Lists::Label& label, int64_t i, int64_t low, int64_t high) {
                  const float* const of_label = z + (label.id - b * ENTRIES) * LANES;
                  for (int64_t n = low; n < high; ++n) {
                    if (label.id != op.labels.target[n]) {
                      sum[n - row] += double{label.weight} * of_label[n - row];
                    }
                    if (op.saved.slopes == nullptr) continue;
                    op.saved.slopes[n * op.labels.longest + i] =
                        cap_slope(of_label[n - row], Base::cap);
                  }
                });
  }

  // Combines the blocks, for the rows of a panel.
  void finish(int64_t panel) const {
    Sums sums[LANES];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      for (int64_t l = 0; l < LANES; ++l) {
        if (op.saved.tops[at + l] > sums[l].top) {
          sums[l].top = op.saved.tops[at + l];
          sums[l].predicted = b * ENTRIES + entry.data()[at + l];
        }
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * width + panel * LANES;
      const double classes = Base::smooths() ? Base::class_sum(b * ENTRIES, Base::count(b)) : 0.0;
      for (int64_t l = 0; l < LANES; ++l) {
        const float own_top = op.saved.tops[at + l];
        const float below = own_top == sums[l].top ? 0.0f : own_top - sums[l].top;
        const float share = exponential(below), other = others.data()[at + l];
        sums[l].others += other * share;
        if (to.entropy != nullptr && share != 0.0f) {
          sums[l].moment += double{share} * (moment.data()[at + l] + double{other} * below);
        }
        if (op.labels.ids != nullptr) sums[l].list += list.data()[at + l];
        if (classes != 0.0) sums[l].spread += spread.data()[at + l] + classes * below;
      }
    }
    for (int64_t l = 0; l < Base::lanes(panel); ++l) finish(panel * LANES + l, sums[l]);
  }

  void finish(int64_t n, const Sums& sums) const {
    const float top = sums.top, others = static_cast<float>(sums.others);
    const float target = op.saved.terms[TARGET_LESS_TOP * width + n] - top;
    const double log_sum = log_of_sum(sums.others, target), lse = top + log_sum;
    const float log_prob = target_log_prob(others, target);
    double entropy = 0.0;
    if (to.entropy != nullptr) {
      const double share = std::exp(double{target}), moment = share == 0.0 ? 0.0 : share * target;
      entropy = log_sum - (sums.moment + moment) / (sums.others + share);
      to.entropy[n] = static_cast<float>(entropy);
    }
    op.saved.terms[TOP * width + n] = top;
    op.saved.terms[TARGET_LESS_TOP * width + n] = target;
    op.saved.terms[OTHERS * width + n] = others;
    op.saved.terms[ENTROPY * width + n] = static_cast<float>(entropy);
    to.loss[n] = static_cast<float>(loss(n, sums, log_prob, log_sum));
    to.log_prob[n] = log_prob;
    to.lse[n] = static_cast<float>(lse);
    to.predicted[n] = sums.predicted;
    if (to.k > 0) write_likeliest(n, top, log_prob, log_sum);
  }

  double loss(int64_t n, const Sums& sums, float log_prob, double log_sum) const {
    const RowWeights t = Base::weights(n);
    double loss = t.own == 0.0 ? 0.0 : -t.own * log_prob;
    if (t.list != 0.0) {
      const double weight = t.list / t.label;  // of its labels
      loss += t.label * (weight * (log_sum + sums.top) - sums.list);
    }
    if (t.spread != 0.0) loss += t.spread * log_sum - t.entry * sums.spread;
    const double lse = sums.top + log_sum, z_loss = op.options.z_loss;
    return z_loss > 0.0 ? loss + z_loss * lse * lse : loss;
  }

  void write_likeliest(int64_t n, float top, float log_prob, double log_sum) const {
    const TopEntries::Entry* const best = likeliest.merged(n);
    for (int64_t i = 0; i < to.k; ++i) {
      const bool there = best[i].id < Base::V;
      to.top_ids[n * to.k + i] = there ? best[i].id : -1;
      const float other = static_cast<float>((best[i].score - top) - log_sum);
      to.top_log_probs[n * to.k + i] = best[i].id == op.labels.target[n] ? log_prob : other;
    }
  }
};

}  // namespace

void linear_cross_entropy_forward(const LinearCrossEntropy& op,
                                  const LinearCrossEntropy::Results& to) {
  if (op.inputs.dtype == Dtype::bfloat16) {
    Forward<bfloat16>(op, to).run();
  } else {
    Forward<float>(op, to).run();
  }
}

}  // namespace groundkern
