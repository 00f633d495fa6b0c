// attention_map, attention_contribution and attention_kl on the CPU.
//
//   log p_hc = s_hc - norm_h,  norm: log-sum-exp over the own columns or all visible keys      (K1)
//   M_c = sum_h w_h p_hc                                                                       (K2)
//   M_c = sum_h p_hc f(v_c . g_h)                                                              (C1)
//   KL = sum_c P_c (log P_c - log M_c)  or  sum_h w_h sum_c P_c (log P_c - log p_hc)           (K3)
//   a_hc = dL / dlog p_hc,  A_h = sum_c a_hc,  ds_hj = (a_hj - A_h p_hj / sum_j p_hj) dcap;
//   of a given norm that takes a gradient: dnorm_h = -A_h,  ds_hj = a_hj dcap
//   dq = scale sum_j ds_j k_j,  dk_j = scale sum_n ds_nj q_n
//
// For each sequence the keys that enter some row's softmax are gathered. The scores of a block of
// rows, of all heads, are in memory at once and transposed: K Q^T [U, 32] for each panel of 32
// packed rows. From them come the normalisers (down the columns) and the map (over tiles of keys,
// each of which loops over the heads). The backward overwrites the scores with ds and computes dq;
// then dk, over parts of the keys.
#include "attention_map.h"

namespace groundkern {
namespace {

template <class T, class X>
typename Kernel<T, X>::Sequence Kernel<T, X>::sequence_of(int64_t b,
                                                                bool backward) const {
  std::vector<uint32_t> listed = listed_bits(b);
  SequenceRows of(op.selection, ranges[b], ranges[b + 1], S,
                  [&](int64_t n, int64_t i) { return used(listed, n, i, backward); });
  std::vector<int32_t> at(S, -1), place(C, -1), live;
  std::vector<uint8_t> column(of.U, 0);
  for (std::size_t u = 0; u < of.keys.size(); ++u) at[of.keys[u]] = static_cast<int32_t>(u);
  for (int64_t c = 0; c < C; ++c) {
    const int32_t key = op.columns.keys[b * C + c];
    if (key < 0 || at[key] < 0) continue;
    place[c] = at[key];
    column[at[key]] = 1;
    if (live.empty() || live.back() != at[key] / LANES) live.push_back(at[key] / LANES);
  }
  return {b, std::move(listed), std::move(of), std::move(place), std::move(live),
          std::move(column), {}, {}, {}, {}};
}

template <class T, class X>
void Kernel<T, X>::gather(Sequence& sequence, bool backward) const {
  const SequenceRows& of = sequence.of;
  const int64_t k_size = of.U * padded(D), v_size = of.U * padded(Dv);
  const int64_t parts = (of.U + PART - 1) / PART;
  sequence.k = Buffer<X>(Hkv * k_size);
  sequence.v = Buffer<X>(Hkv * v_size);
  if (narrow && backward) sequence.k_paired = Buffer<X>(Hkv * k_size);
  if (narrow && backward) sequence.v_paired = Buffer<X>(Hkv * v_size);
  const int workers = threads(Hkv * parts, COPY * static_cast<double>(Hkv) * (k_size + v_size));
  const auto is_column = [&](int64_t u) { return sequence.column[u] != 0; };
  parallel_for(Hkv * parts, workers, [&](int64_t item, int) {
    const int64_t b = sequence.b, h = item / parts, from = item % parts * PART;
    gather_others<X, T>(of, op.inputs.k, b, h, from, sequence.k.data() + h * k_size);
    if (contributes) {
      gather_plain<X, T>(of, op.inputs.v, b, h, from, is_column, sequence.v.data() + h * v_size);
    }
    if constexpr (narrow) {
      if (!backward) return;
      gather_paired<X, T>(of, op.inputs.k, b, h, from, every_key,
                          sequence.k_paired.data() + h * k_size);
      if (!contributes) return;
      gather_paired<X, T>(of, op.inputs.v, b, h, from, is_column,
                          sequence.v_paired.data() + h * v_size);
    }
  });
}

template <class T, class X>
typename Kernel<T, X>::State Kernel<T, X>::allocate(const Block& block, bool backward) const {
  const int64_t U = block.of.U, M = block.panels * LANES;
  const auto when = [](bool needed, int64_t count) { return needed ? count : 0; };
  return {block,
          Buffer<float>(Hkv * M * U),
          Buffer<float>(when(contributes, Hkv * M * U)),
          Buffer<X>(when(narrow && backward, Hkv * M * U)),
          Buffer<X>(when(narrow && backward && contributes, Hkv * M * U)),
          Buffer<X>(when(backward, Hkv * M * padded(D))),
          Buffer<X>(when(backward, Hkv * M * padded(Dv))),
          Buffer<float>(Hkv * M),
          Buffer<float>(U * block.count),
          Buffer<float>(when(mean, U * block.count))};
}

// body(lane, row, query head in its group) for the lanes of a panel that are not empty.
template <class T, class X>
template <class Body>
void Kernel<T, X>::each_lane(const Block& block, int64_t panel, const Body& body) const {
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l;
    body(l, block.row(i), block.head(i));
  }
}

// The scores, v . g and normalisers of a block, all heads.
template <class T, class X>
void Kernel<T, X>::score(const Sequence& sequence, State& state) const {
  const Block& block = state.block;
  const int64_t items = Hkv * block.panels,
                share = panel_floats<X>(D + 1, LANES) + panel_floats<X>(Dv + 1, LANES);
  const int workers = threads(items, static_cast<double>(sequence.of.U) * block.m * Hkv * (D + Dv));
  const Buffer<float> scratch(workers * share);
  parallel_for(items, workers, [&](int64_t item, int thread) {
    score_panel(sequence, state, item / block.panels, item % block.panels,
                scratch.data() + thread * share);
  });
}

template <class T, class X>
void Kernel<T, X>::score_panel(const Sequence& sequence, State& state, int64_t head, int64_t panel,
                               float* scratch) const {
  const Block& block = state.block;
  const int64_t U = sequence.of.U, at = head * block.panels + panel;
  X* const q = reinterpret_cast<X*>(scratch);  // [D, LANES]
  float* const s = state.scores.data() + at * U * LANES;
  float* const norm = state.norm.data() + at * LANES;
  lay_transposed<X, T>(block, op.inputs.q, head * group, panel, q);
  multiply_keys<X, T>(products, sequence.of, op.inputs.k, sequence.b, head,
                      sequence.k.data() + head * U * padded(D), q, s);
  if (contributes) {
    X* const g = reinterpret_cast<X*>(scratch + panel_floats<X>(D + 1, LANES));  // [Dv, LANES]
    lay_transposed<X, T>(block, op.inputs.g, head * group, panel, g);
    products.plain(U, LANES, Dv, {sequence.v.data() + head * U * padded(Dv), U}, {g, Dv},
                   {state.value.data() + at * U * LANES, U}, false);
  }
  float top[LANES], sum[LANES];
  isa.mask_scores(s, U, block.panel_bits(panel), op.options.scale, op.options.softcap, top);
  for (int64_t l = 0; l < LANES; ++l) norm[l] = std::isinf(top[l]) ? 0.0f : top[l];
  if (op.inputs.lse.data == nullptr) {
    isa.sum_exponentials(s, U, norm, sum);
    for (int64_t l = 0; l < LANES; ++l) norm[l] += sum[l] == 0.0f ? 0.0f : std::log(sum[l]);
    return;
  }
  each_lane(block, panel, [&](int64_t l, int64_t n, int64_t h) {
    const bool out = left_out(n, head * group + h);
    norm[l] = out ? 0.0f : *op.inputs.lse.template row<float>(n, head * group + h);
    // kl_each reads log p, where 0 adds nothing, and all others p.
    const float nothing = kind == MapKind::kl_each ? 0.0f : -INFINITE;
    for (int64_t u = 0; out && u < U; ++u) s[u * LANES + l] = nothing;
  });
}

// Fills weights [LANES], which the result refers to.
template <class T, class X>
Lanes Kernel<T, X>::lanes_of(const State& state, int64_t head, int64_t panel,
                             float* weights) const {
  std::fill_n(weights, LANES, 0.0f);
  each_lane(state.block, panel,
            [&](int64_t l, int64_t n, int64_t h) { weights[l] = weight(n, head * group + h); });
  return {state.norm.data() + (head * state.block.panels + panel) * LANES, weights,
          state.block.lane_row.data() + panel * LANES, state.block.straight(panel)};
}

// total [U, count] = the map at the columns, for kl sum_h w_h log p (kl_each) or log M (kl_mean).
template <class T, class X>
void Kernel<T, X>::map(const Sequence& sequence, State& state) const {
  const Block& block = state.block;
  const int64_t U = sequence.of.U, count = block.count, panels = Hkv * block.panels;
  std::vector<float> weights(panels * LANES);
  std::vector<Lanes> lanes;
  for (int64_t i = 0; i < panels; ++i) {
    lanes.push_back(
        lanes_of(state, i / block.panels, i % block.panels, weights.data() + i * LANES));
  }
  const int64_t items = static_cast<int64_t>(sequence.live.size());
  const int workers = threads(items, 32.0 * items * LANES * panels * LANES);
  parallel_for(items, workers, [&](int64_t item, int) {
    const int64_t first = sequence.live[item] * LANES;
    float* const total = state.total.data() + first * count;
    float* const maximum = mean ? state.maximum.data() + first * count : nullptr;
    std::fill_n(total, LANES * count, 0.0f);
    if (mean) {
      std::fill_n(maximum, LANES * count, -INFINITE);
      for (int64_t i = 0; i < panels; ++i) {
        isa.raise_maximum(state.scores.data() + (i * U + first) * LANES, LANES, lanes[i], maximum,
                          count);
      }
      for (int64_t j = 0; j < LANES * count; ++j) {
        if (!std::isfinite(maximum[j])) maximum[j] = 0.0f;
      }
    }
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t at = (i * U + first) * LANES;
      float* const value = contributes ? state.value.data() + at : nullptr;
      const PanelScores head{state.scores.data() + at, value, LANES};
      isa.add_to_map(options, head, lanes[i], maximum, total, count);
    }
    if (!mean) return;
    isa.logarithms(total, LANES * count);
    for (int64_t j = 0; j < LANES * count; ++j) total[j] += maximum[j];
  });
}

// P [C]: the target on row n's own columns, renormalised, and 0 elsewhere; without a target 1 on
// these columns.
template <class T, class X>
void Kernel<T, X>::own_target(const Sequence& sequence, int64_t n, float* P) const {
  const float* const target = kl ? op.inputs.target.row<float>(n) : nullptr;
  const int32_t* const columns = op.columns.keys + sequence.b * C;
  int64_t mask = -1;
  uint32_t own = 0;
  double mass = 0.0;
  for (int64_t c = 0; c < C; ++c) {
    P[c] = 0.0f;
    if (columns[c] < 0) continue;
    if (columns[c] / 32 != mask) {
      mask = columns[c] / 32;
      own = allowed_bits(op.selection, n, mask);
    }
    if ((own >> (columns[c] % 32)) & 1) P[c] = kl ? target[c] : 1.0f;
    mass += P[c];
  }
  const double factor = mass > 0.0 ? 1.0 / mass : 0.0;
  for (int64_t c = 0; kl && c < C; ++c) P[c] = static_cast<float>(P[c] * factor);
}

// Writes out [N, C], or [N] for a KL, of a block's rows.
template <class T, class X>
void Kernel<T, X>::results(const Sequence& sequence, const State& state, float* out) const {
  const Block& block = state.block;
  const int workers = threads(block.count, 32.0 * block.count * C);
  const Buffer<float> scratch(workers * 2 * C);
  parallel_for(block.count, workers, [&](int64_t r, int thread) {
    const int64_t n = block.row(r);
    const float* const total = state.total.data() + r;
    float* const P = scratch.data() + thread * 2 * C;
    own_target(sequence, n, P);
    if (!kl) {
      for (int64_t c = 0; c < C; ++c) {
        if (P[c] > 0.0f) out[n * C + c] = total[sequence.place[c] * block.count];
      }
      return;
    }
    double weights = 0.0, sum = 0.0;
    for (int64_t h = 0; h < Hq; ++h) {
      if (!left_out(n, h)) weights = mean ? 1.0 : weights + weight(n, h);
    }
    out[n] = 0.0f;
    if (weights == 0.0) return;
    float* const log_P = P + C;
    std::copy_n(P, C, log_P);
    isa.logarithms(log_P, C);
    for (int64_t c = 0; c < C; ++c) {
      if (!(P[c] > 0.0f)) continue;
      sum +=
          P[c] * (weights * log_P[c] - static_cast<double>(total[sequence.place[c] * block.count]));
    }
    out[n] = static_cast<float>(sum);
  });
}

template <class T, class X>
void Kernel<T, X>::forward(float* out) const {
  std::fill_n(out, kl ? N : N * C, 0.0f);
  for (int64_t b = 0; b < B; ++b) {
    Sequence sequence = sequence_of(b, false);
    if (sequence.live.empty()) continue;
    gather(sequence, false);
    const int64_t rows = rows_at_a_time(sequence.of), count = sequence.of.rows.size();
    for (int64_t first = 0; first < count; first += rows) {
      const Block block(sequence.of, first, std::min(rows, count - first), group);
      State state = allocate(block, false);
      score(sequence, state);
      map(sequence, state);
      results(sequence, state, out);
    }
  }
}

// E and F [U, count] of map_gradient. F is log P for kl_each; for kl_mean it is the map itself.
template <class T, class X>
void Kernel<T, X>::factors(const Sequence& sequence, const State& state, const float* upstream,
                           float* E, float* F) const {
  const Block& block = state.block;
  const int64_t U = sequence.of.U, count = block.count;
  std::fill_n(E, U * count, 0.0f);
  if (F != nullptr) std::fill_n(F, U * count, 0.0f);
  const int workers = threads(count, 32.0 * count * C);
  const Buffer<float> scratch(workers * C);
  parallel_for(count, workers, [&](int64_t r, int thread) {
    const int64_t n = block.row(r);
    float* const P = scratch.data() + thread * C;
    own_target(sequence, n, P);
    for (int64_t c = 0; c < C; ++c) {
      if (P[c] == 0.0f) continue;
      const int64_t at = sequence.place[c] * count + r;
      E[at] = kl ? -upstream[n] * P[c] : upstream[n * C + c];
    }
    if (F == nullptr) return;
    isa.logarithms(P, C);
    for (int64_t c = 0; c < C; ++c) {
      if (P[c] > -INFINITE) F[sequence.place[c] * count + r] = P[c];
    }
  });
}

template <class T, class X>
void Kernel<T, X>::backward(const float* upstream, const Gradients& to) const {
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t h = 0; h < Hq; ++h) {
      std::fill_n(to.dq.template row<T>(n, h), D, from_float<T>(0.0f));
      if (contributes) std::fill_n(to.dg.template row<T>(n, h), Dv, from_float<T>(0.0f));
      if (!contributes) *to.dhead_weight.template row<float>(n, h) = 0.0f;
      if (op.options.lse_grad) *to.dlse.template row<float>(n, h) = 0.0f;
    }
  }
  for (int64_t b = 0; b < B; ++b) {
    Sequence sequence = sequence_of(b, true);
    const int64_t parts = (S + PART - 1) / PART;
    const bool nothing = sequence.live.empty();
    const std::vector<uint32_t> none(nothing ? (S + 31) / 32 : 0, 0);
    const int workers = threads(Hkv * parts, static_cast<double>(Hkv) * S * (D + Dv));
    parallel_for(Hkv * parts, workers, [&](int64_t item, int) {
      const auto& any = nothing ? none : sequence.of.any;
      zero_unused<T>(any, to.dk, b, item / parts, item % parts * PART);
      if (contributes) zero_unused<T>(any, to.dv, b, item / parts, item % parts * PART);
    });
    if (!nothing) backward_sequence(sequence, upstream, to);
  }
}

template <class T, class X>
void Kernel<T, X>::backward_sequence(Sequence& sequence, const float* upstream,
                                     const Gradients& to) const {
  gather(sequence, true);
  const SequenceRows& of = sequence.of;
  const int64_t rows = rows_at_a_time(of), count = of.rows.size(), U = of.U;
  const int64_t parts = (U + PART - 1) / PART, share = backward_scratch(U);
  const bool several = rows < count;
  const Buffer<float> dk(several ? Hkv * U * padded(D) : 0);
  const Buffer<float> dv(several ? Hkv * U * padded(Dv) : 0);
  for (int64_t first = 0; first < count; first += rows) {
    const Block block(of, first, std::min(rows, count - first), group);
    State state = allocate(block, true);
    score(sequence, state);
    if (mean) map(sequence, state);
    const Buffer<float> E(U * block.count), F(kind == MapKind::kl_each ? U * block.count : 0);
    factors(sequence, state, upstream, E.data(), F.data());
    const RowFactors factor{E.data(), mean ? state.total.data() : F.data(), block.count};
    const double work = 2.0 * U * block.m * Hkv * (D + Dv);
    const int workers = threads(Hkv * std::max(parts, block.panels), work);
    const Buffer<float> scratch(workers * share);
    parallel_for(Hkv * block.panels, workers, [&](int64_t item, int thread) {
      backward_panel(sequence, state, item / block.panels, item % block.panels, factor, to,
                     scratch.data() + thread * share);
    });
    const X* const ds = narrow ? state.ds.data() : reinterpret_cast<X*>(state.scores.data());
    const X* const dvalue = narrow ? state.dvalue.data() : reinterpret_cast<X*>(state.value.data());
    parallel_for(Hkv * parts, workers, [&](int64_t item, int thread) {
      const int64_t h = item / parts, from = item % parts * PART, m = h * block.panels * LANES;
      float* const part = scratch.data() + thread * share;
      const bool last = first + block.count == count;
      const KeyGradient<T, X> gradient{products, block, sequence.b, h, first == 0, last};
      gradient.add(ds + m * U, state.q.data() + m * padded(D), from, to.dk,
                   several ? dk.data() + h * U * padded(D) : nullptr, part);
      if (!contributes) return;
      gradient.add(dvalue + m * U, state.g.data() + m * padded(Dv), from, to.dv,
                   several ? dv.data() + h * U * padded(Dv) : nullptr, part);
    });
  }
}

// Overwrites the scores and v . g of a panel with ds and dvalue, then computes dq, dg, dhead_weight
// and dlse.
template <class T, class X>
void Kernel<T, X>::backward_panel(const Sequence& sequence, State& state, int64_t head,
                                  int64_t panel, const RowFactors& rows, const Gradients& to,
                                  float* scratch) const {
  const Block& block = state.block;
  const int64_t U = sequence.of.U, at = (head * block.panels + panel) * U * LANES;
  const int64_t k_size = U * padded(D), v_size = U * padded(Dv);
  float* const s = state.scores.data() + at;
  float* const value = contributes ? state.value.data() + at : nullptr;
  float* const p = scratch;                                    // [U, LANES]
  float* const paired = scratch + U * LANES;                   // [U, LANES] of X, if bf16
  float* const sums = scratch + (narrow ? 2 : 1) * U * LANES;  // [LANES, D] or [LANES, Dv]
  float weights[LANES], A[LANES], dweight[LANES], sum_p[LANES];
  const Lanes lanes = lanes_of(state, head, panel, weights);
  isa.map_gradient(options, {s, value, U}, lanes, rows, p, {A, dweight, sum_p});
  const uint32_t* const bits = block.panel_bits(panel);
  each_lane(block, panel, [&](int64_t l, int64_t n, int64_t h) {
    for (int64_t u = 0; std::isnan(lanes.norm[l]) && u < U; ++u) {  // not to keys it does not see
      if (!((bits[u / 32 * LANES + l] >> (u % 32)) & 1)) p[u * LANES + l] = 0.0f;
    }
    if (!left_out(n, head * group + h)) return;
    A[l] = dweight[l] = 0.0f;
    for (int64_t u = 0; u < U; ++u) {
      s[u * LANES + l] = p[u * LANES + l] = 0.0f;
      if (contributes) value[u * LANES + l] = 0.0f;
    }
  });
  if (op.options.lse_grad) {
    each_lane(block, panel, [&](int64_t l, int64_t n, int64_t h) {
      *to.dlse.template row<float>(n, head * group + h) = -A[l];
    });
    for (int64_t i = 0; i < U * LANES; ++i) s[i] *= op.options.scale;
  } else {
    // p sums to 1 only as far as norm is exact (one of 500 is rounded by 1.5e-5), but ds must sum to
    // 0: what is left over would be multiplied by all that the keys have in common.
    for (int64_t l = 0; l < LANES; ++l) A[l] = sum_p[l] == 0.0f ? 0.0f : A[l] / sum_p[l];
    isa.subtract_mean(s, p, U, A, op.options.scale);
  }

  // sums = x^T keys of a panel, and its rows to the gradient
  const auto reduce = [&](float* x, X* plain, const X* keys, int64_t width,
                          const Tensor<3>& gradient) {
    const X* operand = reinterpret_cast<const X*>(x);
    if (narrow) {
      isa.narrow(x, U, reinterpret_cast<uint32_t*>(plain), reinterpret_cast<uint32_t*>(paired));
      operand = reinterpret_cast<const X*>(paired);
    }
    products.transposed(LANES, padded(width), U, {operand, U}, {keys, U}, {sums, LANES});
    each_lane(block, panel, [&](int64_t l, int64_t n, int64_t h) {
      get_row(sums, width, LANES, l, 1.0f, gradient.template row<T>(n, head * group + h));
    });
  };
  const Buffer<X>& k = narrow ? sequence.k_paired : sequence.k;
  const Buffer<X>& v = narrow ? sequence.v_paired : sequence.v;
  const int64_t M = block.panels * LANES;
  reduce(s, narrow ? state.ds.data() + at : nullptr, k.data() + head * k_size, D, to.dq);
  lay_paired<X, T>(block, op.inputs.q, head * group, panel, state.q.data() + head * M * padded(D));
  if (contributes) {
    reduce(value, narrow ? state.dvalue.data() + at : nullptr, v.data() + head * v_size, Dv, to.dg);
    lay_paired<X, T>(block, op.inputs.g, head * group, panel,
                     state.g.data() + head * M * padded(Dv));
    return;
  }
  each_lane(block, panel, [&](int64_t l, int64_t n, int64_t h) {
    *to.dhead_weight.template row<float>(n, head * group + h) = dweight[l];
  });
}

}  // namespace

void attention_map_forward(const AttentionMap& op, float* out) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.forward(out); });
}

void attention_map_backward(const AttentionMap& op, const float* upstream,
                            const AttentionMap::Gradients& to) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.backward(upstream, to); });
}

}  // namespace groundkern
