// attention_map, attention_contribution and attention_kl on the CPU.
//
//   log p_hc = s_hc - norm_h,  norm: log-sum-exp over the own columns or all visible keys      (K1)
//   M_c = sum_h w_h p_hc                                                                       (K2)
//   M_c = sum_h p_hc f(v_c . g_h)                                                              (C1)
//   KL = sum_c P_c (log P_c - log M_c)  or  sum_h w_h sum_c P_c (log P_c - log p_hc)           (K3)
//   a_hc = dL / dlog p_hc,  A_h = sum_c a_hc,  ds_hj = (a_hj - A_h exp(s_hj - norm_h)) dcap
//   dq = scale sum_j ds_j k_j,  dk_j = scale sum_n ds_nj q_n
//
// Passes: the normalisers over blocks of rows; the map over (block, tile), each of which owns its
// columns and loops over the heads; in backward dq over blocks of rows, then dk and dv over tiles.
// Only [N, C] and [N, Hq] is held. Tiles without own columns (or visible keys) are skipped.
#include "packed.h"

namespace groundkern {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <class T>
struct Kernel : Packed<T> {
  using Base = Packed<T>;
  using Base::N, Base::Hq, Base::D, Base::B, Base::Hkv, Base::S, Base::group, Base::tiles;
  using Base::ldq, Base::blocks, Base::M, Base::scores, Base::masks, Base::load_rows;
  using Base::product, Base::score, Base::keys_at;
  const AttentionMap& op;
  const bool contributes = op.kind == MapKind::contribution;
  const bool kl = op.kind == MapKind::kl_mean || op.kind == MapKind::kl_each;
  const int64_t C = op.column_count;
  const int64_t Dv = contributes ? op.v.size[3] : 0, ldv = padded(Dv);
  std::vector<int32_t> column;   // [B, tiles * KEYS]: the key's column, -1 for none
  std::vector<uint64_t> listed;  // [B, tiles]: which keys are columns
  std::vector<float> norm;       // [N, Hq]

  explicit Kernel(const AttentionMap& op)
      : Base(op.q, op.k, op.rows, op.scale, op.softcap), op(op), column(B * tiles * KEYS, -1),
        listed(B * tiles, 0), norm(N * Hq, -INFINITE) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t key = op.columns[b * C + c];
        if (key < 0) continue;
        column[b * tiles * KEYS + key] = static_cast<int32_t>(c);
        listed[b * tiles + key / KEYS] |= uint64_t{1} << (key % KEYS);
      }
    }
  }

  struct Masks {
    std::vector<uint64_t> own, used;  // [rows of a block]
    uint64_t any_own, any_used;
  };

  // The own columns of each row of a block in a tile, and the keys its normaliser is made of.
  void masks_of(const Block& block, int64_t tile, Masks& masks) const {
    const uint64_t columns = listed[block.sequence * tiles + tile];
    Rows ranges = op.rows;
    ranges.words = nullptr;
    masks.any_own = masks.any_used = 0;
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t n = block.index[r];
      masks.own[r] = columns == 0 ? 0 : columns & visible_keys(op.rows, n, tile * KEYS);
      masks.used[r] = op.over_columns ? masks.own[r] : visible_keys(ranges, n, tile * KEYS);
      masks.any_own |= masks.own[r];
      masks.any_used |= masks.used[r];
    }
  }

  int64_t row(const Block& block, int64_t i) const { return block.index[i / group]; }
  float weight(int64_t n, int64_t h) const {
    return contributes ? 1.0f : *op.head_weight.template row<float>(n, h);
  }

  // to [KEYS] = x [C] of row n at the own columns of a tile, 0 elsewhere
  void gather(const float* x, const Block& block, int64_t tile, uint64_t own, float* to) const {
    const int32_t* const at = column.data() + (block.sequence * tiles + tile) * KEYS;
    for (int64_t j = 0; j < KEYS; ++j) to[j] = (own >> j) & 1 ? x[at[j]] : 0.0f;
  }

  // s [m, KEYS] and, where asked for, value [m, KEYS] = v . g
  void load_scores(const Block& block, int64_t head, int64_t tile, uint64_t any, const float* q,
                   const float* g, float* kt, float* vt, float* s, float* value) const {
    const int64_t m = block.count * group;
    load_keys_transposed(keys_at(op.k, block.sequence, head, tile), op.k.stride[2], D, any, kt);
    score(m, q, kt, s);
    if (!contributes) return;
    load_keys_transposed(keys_at(op.v, block.sequence, head, tile), op.v.stride[2], Dv, any, vt);
    product(m, Dv, g, vt, value);
  }

  int64_t block_items() const { return static_cast<int64_t>(blocks.blocks.size()) * Hkv; }
  std::vector<Masks> some_masks(int threads) const {
    return std::vector<Masks>(threads,
                              Masks{std::vector<uint64_t>(M), std::vector<uint64_t>(M), 0, 0});
  }

  void normalise();
  void normalise_block(const Block& block, int64_t head, Masks& masks,
                       std::vector<OnlineSoftmax>& softmax, Scratch scratch);
  void map(float* out) const;
  void map_tile(const Block& block, int64_t tile, float* out, const Masks& masks,
                Scratch scratch) const;
  double own_target(int64_t n, float* P) const;
  void forward(float* out);

  // The row's factors E and F [N, C] of map_gradient, and A [N, Hq].
  struct Factors {
    std::vector<float> E, F, A;
  };
  Factors factors(const float* upstream) const;
  void backward(const float* upstream, const Tensor<3>& dq, const Tensor<4>& dk,
                const Tensor<4>& dv, const Tensor<3>& dg, const Tensor<2>& dhead_weight);
  void backward_dq(const Block& block, int64_t head, Factors& rows, const Tensor<3>& dq,
                   const Tensor<3>& dg, const Tensor<2>& dhead_weight, Masks& masks,
                   Scratch scratch) const;
  void backward_dkv(int64_t sequence, int64_t head, int64_t tile, const Factors& rows,
                    const Tensor<4>& dk, const Tensor<4>& dv, Masks& masks,
                    Scratch scratch) const;
  MapSums gradient(const Block& block, int64_t head, int64_t tile, int64_t i, const Masks& masks,
                   const Factors& rows, float* s, float* value, float* p) const;
};

template <class T>
void Kernel<T>::normalise() {
  const int threads = useful_threads(block_items(), scores() * D, op.threads);
  const int64_t share = M * (ldq + KEYS) + D * KEYS + 4 * LANES;
  std::vector<float> memory(threads * share);
  std::vector<Masks> masks = some_masks(threads);
  std::vector<std::vector<OnlineSoftmax>> softmax(threads, std::vector<OnlineSoftmax>(M));
  parallel_for(block_items(), threads, [&](int64_t item, int thread) {
    normalise_block(blocks.blocks[item / Hkv], item % Hkv, masks[thread], softmax[thread],
                    {memory.data() + thread * share});
  });
}

template <class T>
void Kernel<T>::normalise_block(const Block& block, int64_t head, Masks& masks,
                                std::vector<OnlineSoftmax>& softmax, Scratch scratch) {
  const int64_t m = block.count * group;
  bool given = op.lse.data != nullptr && !op.over_columns;
  for (int64_t i = 0; given && i < m; ++i) {
    const int64_t n = row(block, i), h = head * group + i % group;
    norm[n * Hq + h] = *op.lse.template row<float>(n, h);
    given = std::isfinite(norm[n * Hq + h]);
  }
  if (given) return;
  float* const q = scratch.take(M * ldq);    // [m, D]
  float* const s = scratch.take(M * KEYS);   // [m, KEYS]
  float* const kt = scratch.take(D * KEYS);  // [D, KEYS]
  load_rows(op.q, block, head, D, op.scale, q);
  std::fill_n(softmax.begin(), m, OnlineSoftmax{});
  for (int64_t tile = block.start / KEYS; tile * KEYS < block.stop; ++tile) {
    masks_of(block, tile, masks);
    if (masks.any_used == 0) continue;
    load_keys_transposed(keys_at(op.k, block.sequence, head, tile), op.k.stride[2], D,
                         masks.any_used, kt);
    score(m, q, kt, s);
    for (int64_t i = 0; i < m; ++i) {
      if (masks.used[i / group] != 0) add_tile(softmax[i], s + i * KEYS, masks.used[i / group]);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    const int64_t n = row(block, i), h = head * group + i % group;
    const float lse = op.lse.data == nullptr || op.over_columns
                          ? INFINITE
                          : *op.lse.template row<float>(n, h);
    norm[n * Hq + h] = std::isfinite(lse) ? lse : softmax[i].log_sum_exp();
  }
}

// out [N, C] = the map, or for kl sum_h w_h log p (kl_each) or log M (kl_mean).
template <class T>
void Kernel<T>::map(float* out) const {
  std::fill_n(out, N * C, 0.0f);
  const int64_t items = static_cast<int64_t>(blocks.blocks.size()) * tiles;
  const int threads = useful_threads(items, scores() * (D + Dv), op.threads);
  const int64_t rows = M / std::max<int64_t>(group, 1) + 1;
  const int64_t share = M * (ldq + ldv + KEYS) + D * KEYS + Dv * KEYS + M * Hkv * KEYS +
                        2 * rows * KEYS + 10 * LANES;
  std::vector<float> memory(threads * share);
  std::vector<Masks> masks = some_masks(threads);
  parallel_for(items, threads, [&](int64_t item, int thread) {
    const Block& block = blocks.blocks[item / tiles];
    masks_of(block, item % tiles, masks[thread]);
    if (masks[thread].any_own == 0) return;
    map_tile(block, item % tiles, out, masks[thread], {memory.data() + thread * share});
  });
}

template <class T>
void Kernel<T>::map_tile(const Block& block, int64_t tile, float* out, const Masks& masks,
                         Scratch scratch) const {
  const int64_t m = block.count * group, rows = M / std::max<int64_t>(group, 1) + 1;
  float* const q = scratch.take(M * ldq);            // [m, D]
  float* const g = scratch.take(M * ldv);            // [m, Dv]
  float* const value = scratch.take(M * KEYS);       // [m, KEYS]
  float* const kt = scratch.take(D * KEYS);          // [D, KEYS]
  float* const vt = scratch.take(Dv * KEYS);         // [Dv, KEYS]
  float* const all = scratch.take(M * Hkv * KEYS);   // [Hkv, m, KEYS]: scores
  float* const total = scratch.take(rows * KEYS);    // [rows, KEYS]
  float* const maximum = scratch.take(rows * KEYS);  // [rows, KEYS], kl_mean
  std::fill_n(total, block.count * KEYS, 0.0f);
  std::fill_n(maximum, block.count * KEYS, -INFINITE);
  const auto add = [&](int64_t head) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t n = row(block, i), h = head * group + i % group, r = i / group;
      add_to_map(op.kind, all + (head * m + i) * KEYS, value + i * KEYS, masks.own[r],
                 norm[n * Hq + h], weight(n, h), op.rectify, maximum + r * KEYS, total + r * KEYS);
    }
  };
  for (int64_t head = 0; head < Hkv; ++head) {
    float* const s = all + head * m * KEYS;
    load_rows(op.q, block, head, D, op.scale, q);
    if (contributes) load_rows(op.g, block, head, Dv, 1.0f, g);
    load_scores(block, head, tile, masks.any_own, q, g, kt, vt, s, value);
    if (op.kind != MapKind::kl_mean) add(head);
    for (int64_t i = 0; op.kind == MapKind::kl_mean && i < m; ++i) {
      const int64_t n = row(block, i), h = head * group + i % group;
      if (weight(n, h) > 0.0f && masks.own[i / group] != 0) {
        raise_maximum(s + i * KEYS, norm[n * Hq + h], maximum + i / group * KEYS);
      }
    }
  }
  for (int64_t j = 0; j < block.count * KEYS; ++j) {
    if (!std::isfinite(maximum[j])) maximum[j] = 0.0f;
  }
  for (int64_t head = 0; op.kind == MapKind::kl_mean && head < Hkv; ++head) add(head);
  const int32_t* const at = column.data() + (block.sequence * tiles + tile) * KEYS;
  for (int64_t i = 0; i < block.count * KEYS; ++i) {
    if (((masks.own[i / KEYS] >> (i % KEYS)) & 1) == 0) continue;
    const float x = op.kind == MapKind::kl_mean ? maximum[i] + std::log(total[i]) : total[i];
    out[block.index[i / KEYS] * C + at[i % KEYS]] = x;
  }
}

// P [C]: the target on row n's own columns, renormalised; returns what it was divided by.
template <class T>
double Kernel<T>::own_target(int64_t n, float* P) const {
  const float* const target = op.target.row<float>(n);
  const int32_t* const columns = op.columns + op.rows.sequence[n] * C;
  double total = 0.0;
  for (int64_t c = 0; c < C; ++c) {
    const int64_t key = columns[c];
    const bool own = key >= 0 && ((visible_keys(op.rows, n, key / KEYS * KEYS) >> (key % KEYS)) & 1);
    P[c] = own ? target[c] : 0.0f;
    total += P[c];
  }
  for (int64_t c = 0; c < C; ++c) {
    P[c] = total > 0.0 ? static_cast<float>(P[c] / total) : 0.0f;
  }
  return total;
}

template <class T>
void Kernel<T>::forward(float* out) {
  normalise();
  if (!kl) return map(out);
  std::vector<float> log_map(N * C), P(C);
  map(log_map.data());
  for (int64_t n = 0; n < N; ++n) {
    double weights = 0.0, sum = 0.0;
    for (int64_t h = 0; h < Hq; ++h) weights += weight(n, h);
    if (op.kind == MapKind::kl_mean) weights = 1.0;
    own_target(n, P.data());
    for (int64_t c = 0; c < C; ++c) {
      if (P[c] > 0.0f) {
        sum += P[c] * (weights * std::log(P[c]) - static_cast<double>(log_map[n * C + c]));
      }
    }
    out[n] = static_cast<float>(sum);
  }
}

template <class T>
typename Kernel<T>::Factors Kernel<T>::factors(const float* upstream) const {
  Factors rows{std::vector<float>(N * C), std::vector<float>(kl ? N * C : 0),
               std::vector<float>(N * Hq)};
  if (!kl) {
    std::copy_n(upstream, N * C, rows.E.begin());
    return rows;
  }
  if (op.kind == MapKind::kl_mean) map(rows.F.data());
  for (int64_t n = 0; n < N; ++n) {
    float* const P = rows.E.data() + n * C;
    own_target(n, P);
    for (int64_t c = 0; c < C; ++c) {
      if (op.kind == MapKind::kl_each) rows.F[n * C + c] = P[c] > 0.0f ? std::log(P[c]) : 0.0f;
      P[c] *= -upstream[n];
    }
  }
  return rows;
}

template <class T>
void Kernel<T>::backward(const float* upstream, const Tensor<3>& dq, const Tensor<4>& dk,
                         const Tensor<4>& dv, const Tensor<3>& dg,
                         const Tensor<2>& dhead_weight) {
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t h = 0; h < Hq; ++h) {
      std::fill_n(dq.row<T>(n, h), D, from_float<T>(0.0f));
      if (contributes) std::fill_n(dg.row<T>(n, h), Dv, from_float<T>(0.0f));
      if (!contributes) *dhead_weight.row<float>(n, h) = 0.0f;
    }
  }
  normalise();
  Factors rows = factors(upstream);
  const int64_t key_items = B * Hkv * tiles;
  const double work = scores() * 3 * (D + Dv);
  const int threads = useful_threads(std::max(block_items(), key_items), work, op.threads);
  const int64_t share = M * (3 * ldq + 2 * ldv + 3 * KEYS) +
                        KEYS * (D + Dv + 2 * ldq + 2 * ldv) + 16 * LANES;
  std::vector<float> memory(threads * share);
  std::vector<Masks> masks = some_masks(threads);
  parallel_for(block_items(), threads, [&](int64_t item, int thread) {
    backward_dq(blocks.blocks[item / Hkv], item % Hkv, rows, dq, dg, dhead_weight, masks[thread],
                {memory.data() + thread * share});
  });
  parallel_for(key_items, threads, [&](int64_t item, int thread) {
    backward_dkv(item / tiles / Hkv, item / tiles % Hkv, item % tiles, rows, dk, dv, masks[thread],
                 {memory.data() + thread * share});
  });
}

// map_gradient of packed row i, with what it needs gathered from [N, C].
template <class T>
MapSums Kernel<T>::gradient(const Block& block, int64_t head, int64_t tile, int64_t i,
                            const Masks& masks, const Factors& rows, float* s, float* value,
                            float* p) const {
  const int64_t n = row(block, i), h = head * group + i % group;
  const uint64_t own = masks.own[i / group];
  float E[KEYS], F[KEYS];
  gather(rows.E.data() + n * C, block, tile, own, E);
  if (kl) gather(rows.F.data() + n * C, block, tile, own, F);
  return map_gradient(op.kind, s + i * KEYS, value + i * KEYS, p + i * KEYS, own,
                      masks.used[i / group], norm[n * Hq + h], weight(n, h), E, F, op.rectify,
                      op.softcap);
}

// sum_j (a_j - A p_j) k_j = sum_j a_j k_j - A sum_j p_j k_j: A is known at the end.
template <class T>
void Kernel<T>::backward_dq(const Block& block, int64_t head, Factors& rows, const Tensor<3>& dq,
                            const Tensor<3>& dg, const Tensor<2>& dhead_weight, Masks& masks,
                            Scratch scratch) const {
  const int64_t m = block.count * group;
  float* const q = scratch.take(M * ldq);       // [m, D]
  float* const g = scratch.take(M * ldv);       // [m, Dv]
  float* const a_k = scratch.take(M * ldq);     // [m, D]: sum_j a_j k_j
  float* const p_k = scratch.take(M * ldq);     // [m, D]: sum_j p_j k_j
  float* const g_sum = scratch.take(M * ldv);   // [m, Dv]: dg
  float* const s = scratch.take(M * KEYS);      // [m, KEYS]: scores, then a
  float* const value = scratch.take(M * KEYS);  // [m, KEYS]: v . g, then its gradient
  float* const p = scratch.take(M * KEYS);      // [m, KEYS]
  float* const kt = scratch.take(D * KEYS);     // [D, KEYS]
  float* const vt = scratch.take(Dv * KEYS);    // [Dv, KEYS]
  float* const k = scratch.take(KEYS * ldq);    // [KEYS, D]
  float* const v = scratch.take(KEYS * ldv);    // [KEYS, Dv]
  load_rows(op.q, block, head, D, op.scale, q);
  if (contributes) load_rows(op.g, block, head, Dv, 1.0f, g);
  std::fill_n(a_k, m * ldq, 0.0f);
  std::fill_n(p_k, m * ldq, 0.0f);
  std::fill_n(g_sum, m * ldv, 0.0f);
  for (int64_t tile = block.start / KEYS; tile * KEYS < block.stop; ++tile) {
    masks_of(block, tile, masks);
    if (masks.any_used == 0) continue;
    load_scores(block, head, tile, masks.any_used, q, g, kt, vt, s, value);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t n = row(block, i), h = head * group + i % group;
      const MapSums sums = gradient(block, head, tile, i, masks, rows, s, value, p);
      rows.A[n * Hq + h] += sums.a;
      if (!contributes) *dhead_weight.row<float>(n, h) += sums.weight;
    }
    const T* const keys = keys_at(op.k, block.sequence, head, tile);
    load_keys(keys, op.k.stride[2], D, masks.any_used, k);
    multiply_add(m, ldq, KEYS, p, KEYS, 1, k, ldq, p_k, ldq);
    if (masks.any_own == 0) continue;
    multiply_add(m, ldq, KEYS, s, KEYS, 1, k, ldq, a_k, ldq);
    if (!contributes) continue;
    load_keys(keys_at(op.v, block.sequence, head, tile), op.v.stride[2], Dv, masks.any_used, v);
    multiply_add(m, ldv, KEYS, value, KEYS, 1, v, ldv, g_sum, ldv);
  }
  for (int64_t i = 0; i < m; ++i) {
    const int64_t n = row(block, i), h = head * group + i % group;
    float* const sum = a_k + i * ldq;
    for (int64_t c = 0; c < D; ++c) sum[c] -= rows.A[n * Hq + h] * p_k[i * ldq + c];
    store_row(sum, D, op.scale, dq.row<T>(n, h));
    if (contributes) store_row(g_sum + i * ldv, Dv, 1.0f, dg.row<T>(n, h));
  }
}

template <class T>
void Kernel<T>::backward_dkv(int64_t sequence, int64_t head, int64_t tile, const Factors& rows,
                             const Tensor<4>& dk, const Tensor<4>& dv, Masks& masks,
                             Scratch scratch) const {
  float* const q = scratch.take(M * ldq);       // [m, D]
  float* const g = scratch.take(M * ldv);       // [m, Dv]
  float* const s = scratch.take(M * KEYS);      // [m, KEYS]: scores, then ds
  float* const value = scratch.take(M * KEYS);  // [m, KEYS]: v . g, then its gradient
  float* const p = scratch.take(M * KEYS);      // [m, KEYS]
  float* const kt = scratch.take(D * KEYS);     // [D, KEYS]
  float* const vt = scratch.take(Dv * KEYS);    // [Dv, KEYS]
  float* const gk = scratch.take(KEYS * ldq);   // [KEYS, D]: dk
  float* const gv = scratch.take(KEYS * ldv);   // [KEYS, Dv]: dv
  std::fill_n(gk, KEYS * ldq, 0.0f);
  std::fill_n(gv, KEYS * ldv, 0.0f);
  for (int64_t b = blocks.first[sequence]; b < blocks.first[sequence + 1]; ++b) {
    const Block& block = blocks.blocks[b];
    const int64_t m = block.count * group;
    masks_of(block, tile, masks);
    if (masks.any_used == 0) continue;
    load_rows(op.q, block, head, D, op.scale, masks.used, q);
    if (contributes) load_rows(op.g, block, head, Dv, 1.0f, masks.own, g);
    load_scores(block, head, tile, masks.any_used, q, g, kt, vt, s, value);
    for (int64_t i = 0; i < m; ++i) {
      gradient(block, head, tile, i, masks, rows, s, value, p);
      const float A = rows.A[row(block, i) * Hq + head * group + i % group];
      for (int64_t j = 0; j < KEYS; ++j) s[i * KEYS + j] -= A * p[i * KEYS + j];
    }
    multiply_add(KEYS, ldq, m, s, 1, KEYS, q, ldq, gk, ldq);  // ds^T (scale q)
    if (contributes) multiply_add(KEYS, ldv, m, value, 1, KEYS, g, ldv, gv, ldv);
  }
  for (int64_t j = 0; j < std::min(KEYS, S - tile * KEYS); ++j) {
    store_row(gk + j * ldq, D, 1.0f, dk.row<T>(sequence, head, tile * KEYS + j));
    if (contributes) store_row(gv + j * ldv, Dv, 1.0f, dv.row<T>(sequence, head, tile * KEYS + j));
  }
}

// body(Kernel<T>) for the T of the op.
template <class Body>
void dispatch(const AttentionMap& op, const Body& body) {
  if (op.dtype == Dtype::float32) {
    body(Kernel<float>{op});
  } else if (op.dtype == Dtype::bfloat16) {
    body(Kernel<bfloat16>{op});
  } else {
    body(Kernel<float16>{op});
  }
}

}  // namespace

void attention_map_forward(const AttentionMap& op, float* out) {
  dispatch(op, [&](auto&& kernel) { kernel.forward(out); });
}

void attention_map_backward(const AttentionMap& op, const float* upstream, const Tensor<3>& dq,
                            const Tensor<4>& dk, const Tensor<4>& dv, const Tensor<3>& dg,
                            const Tensor<2>& dhead_weight) {
  dispatch(op, [&](auto&& kernel) { kernel.backward(upstream, dq, dk, dv, dg, dhead_weight); });
}

}  // namespace groundkern
