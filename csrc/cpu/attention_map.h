// What attention_map.cpp keeps of a sequence and of a block of rows, and the passes over them.
#pragma once

#include "gathered.h"

namespace groundkern {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// T: of the tensors. X: of the products' operands.
template <class T, class X>
struct Kernel {
  const AttentionMap& op;
  const Level& level;
  const Products<X> products{level};
  const bool contributes = op.kind == MapKind::contribution;
  const bool mean = op.kind == MapKind::kl_mean, kl = mean || op.kind == MapKind::kl_each;
  const int64_t N = op.q.size[0], Hq = op.q.size[1], D = op.q.size[2];
  const int64_t B = op.k.size[0], Hkv = op.k.size[1], S = op.k.size[2];
  const int64_t Dv = contributes ? op.v.size[3] : 0, C = op.column_count, group = Hq / Hkv;
  const std::vector<int64_t> ranges = sequence_ranges(op.rows, B);
  static constexpr bool narrow = !std::is_same_v<X, float>;

  // One sequence: its gathered keys, and which of them are columns.
  struct Sequence {
    int64_t b;
    std::vector<uint32_t> listed;  // [S / 32]: bit set for a column
    SequenceRows of;
    std::vector<int32_t> place;    // [C]: the column among the used keys, -1 for none
    std::vector<int32_t> live;     // parts of the used keys that hold a column
    std::vector<uint8_t> column;   // [U]: whether the key is a column
    Buffer<X> k, k_paired, v, v_paired;
  };
  // What a block of rows keeps. Panels of a head lie side by side: [Hkv, panels, U, LANES].
  struct Kept {
    const Block& block;
    Buffer<float> scores, value;
    Buffer<X> ds, dvalue;           // bf16: their gradients; in fp32 these take their place
    Buffer<X> q, g;                 // [Hkv, m, D] paired, backward only
    Buffer<float> norm;             // [Hkv, panels * LANES]
    Buffer<float> total, maximum;   // [U, count]: the map (kl_mean: its log); kl_mean
  };

  std::vector<uint32_t> listed_words(int64_t b) const {
    std::vector<uint32_t> words((S + 31) / 32, 0);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t key = op.columns[b * C + c];
      if (key >= 0) words[key / 32] |= uint32_t{1} << (key % 32);
    }
    return words;
  }
  uint32_t used(const std::vector<uint32_t>& listed, int64_t n, int64_t word) const {
    return op.over_columns ? allowed_word(op.rows, n, word) & listed[word]
                           : visible_word(op.rows, n, word);
  }
  int threads(int64_t items, double work) const { return useful_threads(items, work, op.threads); }
  float weight(int64_t n, int64_t h) const {
    return contributes ? 1.0f : *op.head_weight.template row<float>(n, h);
  }
  int64_t rows_at_a_time(const SequenceRows& of) const {
    const int64_t fitting = 2 * SCORES / (of.U * Hq * (contributes ? 2 : 1));
    return std::min<int64_t>(of.rows.size(), std::max<int64_t>(1, fitting));
  }

  Sequence sequence_of(int64_t b) const;
  void gather(Sequence& sequence, bool backward) const;
  Kept keep(const Block& block, bool backward) const;
  void score(const Sequence& sequence, Kept& kept) const;
  void score_panel(const Sequence& sequence, Kept& kept, int64_t head, int64_t panel,
                   float* scratch) const;
  template <class Body>
  void each_lane(const Block& block, int64_t panel, const Body& body) const;
  Lanes lanes_of(const Kept& kept, int64_t head, int64_t panel, float* weights) const;
  void map(const Sequence& sequence, Kept& kept) const;
  double own_target(const Sequence& sequence, int64_t n, float* P) const;
  void results(const Sequence& sequence, const Kept& kept, float* out) const;
  void forward(float* out) const;

  struct Gradients {
    const float* upstream;
    const Tensor<3>& dq;
    const Tensor<4>& dk;
    const Tensor<4>& dv;
    const Tensor<3>& dg;
    const Tensor<2>& dhead_weight;
  };
  void factors(const Sequence& sequence, const Kept& kept, const float* upstream, float* E,
               float* F) const;
  void backward(const Gradients& out) const;
  void backward_sequence(Sequence& sequence, const Gradients& out) const;
  void backward_panel(const Sequence& sequence, Kept& kept, int64_t head, int64_t panel,
                      const RowFactors& rows, const Gradients& out, float* scratch) const;
  int64_t backward_scratch(int64_t U) const {
    const int64_t panel = (narrow ? 2 : 1) * U * LANES + padded(std::max(D, Dv)) * LANES;
    return std::max(panel, PART * padded(std::max(D, Dv)));
  }
};

}  // namespace
}  // namespace groundkern
