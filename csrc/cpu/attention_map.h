// What attention_map.cpp stores of a sequence and of a block of rows, and the passes over them.
#pragma once

#include "gathered.h"

namespace groundkern {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// T: the type of the tensors. X: the type of the products' operands.
template <class T, class X>
struct Kernel {
  const AttentionMap& op;
  const Isa& isa;
  const Products<X> products{isa};
  const MapKind kind = op.options.kind;
  const bool contributes = kind == MapKind::contribution, mean = kind == MapKind::kl_mean;
  const bool kl = mean || kind == MapKind::kl_each;
  const int64_t N = op.inputs.q.size[0], Hq = op.inputs.q.size[1], D = op.inputs.q.size[2];
  const int64_t B = op.inputs.k.size[0], Hkv = op.inputs.k.size[1], S = op.inputs.k.size[2];
  const int64_t Dv = contributes ? op.inputs.v.size[3] : 0, C = op.columns.count, group = Hq / Hkv;
  const std::vector<int64_t> ranges = sequence_ranges(op.selection, B);
  const MapOptions options{kind, op.options.rectify, op.options.softcap};
  static constexpr bool narrow = !std::is_same_v<X, float>;

  // One sequence: its gathered keys, and which of them are columns.
  struct Sequence {
    int64_t b;
    std::vector<uint32_t> listed;  // [masks]: mask bits of the columns, over all S keys
    SequenceRows of;
    std::vector<int32_t> place;   // [C]: the column's place among the used keys, -1 if it has none
    std::vector<int32_t> live;    // tiles of 32 used keys that contain a column
    std::vector<uint8_t> column;  // [U]: whether the key is a column
    Buffer<X> k, k_paired;        // [Hkv, U, D]
    Buffer<X> v, v_paired;        // [Hkv, U, Dv], contribution only
  };
  // What is computed of a block of rows; the panels of a head lie next to each other.
  struct State {
    const Block& block;
    Buffer<float> scores, value;   // [Hkv, panels, U, LANES]
    Buffer<X> ds, dvalue;          // bf16: their gradients; in fp32 these overwrite them
    Buffer<X> q, g;                // [Hkv, m, D], [Hkv, m, Dv] paired, backward only
    Buffer<float> norm;            // [Hkv, panels * LANES]
    Buffer<float> total, maximum;  // [U, count]: the map, or its log (kl_mean); kl_mean only
  };

  std::vector<uint32_t> listed_bits(int64_t b) const {
    std::vector<uint32_t> bits((S + 31) / 32, 0);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t key = op.columns.keys[b * C + c];
      if (key >= 0) bits[key / 32] |= uint32_t{1} << (key % 32);
    }
    return bits;
  }
  // Whether the scores of the own columns are enough: always, but for the softmax over the visible
  // keys and its gradient.
  bool columns_suffice(bool backward) const {
    if (op.options.over_columns) return true;
    return backward ? op.options.lse_grad : op.inputs.lse.data != nullptr;
  }
  // Mask bits of the keys whose scores row n needs.
  uint32_t used(const std::vector<uint32_t>& listed, int64_t n, int64_t i, bool backward) const {
    if (!columns_suffice(backward)) return visible_bits(op.selection, n, i);
    return allowed_bits(op.selection, n, i) & listed[i];
  }
  int threads(int64_t items, double work) const {
    return useful_threads(items, work, op.options.threads);
  }
  float weight(int64_t n, int64_t h) const {
    return contributes ? 1.0f : *op.inputs.head_weight.template row<float>(n, h);
  }
  // Whether head h of row n takes no part, because its normaliser is infinite.
  bool left_out(int64_t n, int64_t h) const {
    return op.inputs.lse.data != nullptr &&
           std::isinf(*op.inputs.lse.template row<float>(n, h));
  }
  int64_t rows_at_a_time(const SequenceRows& of) const {
    const int64_t fitting = 2 * SCORES / (of.U * Hq * (contributes ? 2 : 1));
    return std::min<int64_t>(of.rows.size(), std::max<int64_t>(1, fitting));
  }

  Sequence sequence_of(int64_t b, bool backward) const;
  void gather(Sequence& sequence, bool backward) const;
  State allocate(const Block& block, bool backward) const;
  void score(const Sequence& sequence, State& state) const;
  void score_panel(const Sequence& sequence, State& state, int64_t head, int64_t panel,
                   float* scratch) const;
  template <class Body>
  void each_lane(const Block& block, int64_t panel, const Body& body) const;
  Lanes lanes_of(const State& state, int64_t head, int64_t panel, float* weights) const;
  void map(const Sequence& sequence, State& state) const;
  void own_target(const Sequence& sequence, int64_t n, float* P) const;
  void results(const Sequence& sequence, const State& state, float* out) const;
  void forward(float* out) const;

  using Gradients = AttentionMap::Gradients;
  void factors(const Sequence& sequence, const State& state, const float* upstream, float* E,
               float* F) const;
  void backward(const float* upstream, const Gradients& to) const;
  void backward_sequence(Sequence& sequence, const float* upstream, const Gradients& to) const;
  void backward_panel(const Sequence& sequence, State& state, int64_t head, int64_t panel,
                      const RowFactors& rows, const Gradients& to, float* scratch) const;
  int64_t backward_scratch(int64_t U) const {
    const int64_t panel = (narrow ? 2 : 1) * U * LANES + padded(std::max(D, Dv)) * LANES;
    return std::max(panel, PART * padded(std::max(D, Dv)));
  }
};

}  // namespace
}  // namespace groundkern
