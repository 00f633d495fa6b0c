// side_attention on the CPU: for each row, attention over its allowed keys, and its log-sum-exp.
//
//   s = softcap(scale q . k),  lse = log sum_j exp(s_j),  p = exp(s - lse),  out = sum_j p_j v_j
//   ds = p (dp - delta) dcap,  dp_j = dout . v_j,  delta = sum_j p_j dp_j - dlse
//   dq = scale sum_j ds_j k_j,  dk_j = scale sum_n ds_nj q_n,  dv_j = sum_n p_nj dout_n
//
// The query heads of a key head are packed with the rows (m = row * group + head in group), keys
// come in tiles of KEYS, and a tile in which no row of a block has an allowed key is skipped.
// Backward takes two passes without atomics: dq over blocks of rows, then dk and dv over tiles.
#include "packed.h"

namespace groundkern {
namespace {

template <class T>
struct Kernel : Packed<T> {
  using Base = Packed<T>;
  using Base::N, Base::Hq, Base::D, Base::B, Base::Hkv, Base::S, Base::group, Base::tiles;
  using Base::ldq, Base::blocks, Base::M, Base::scores, Base::masks, Base::load_rows;
  using Base::product, Base::score, Base::keys_at;
  const SideAttention& op;
  const int64_t Dv = op.v.size[3], ldv = padded(Dv);

  explicit Kernel(const SideAttention& op)
      : Base(op.q, op.k, op.rows, op.scale, op.softcap), op(op) {}

  void forward(const Tensor<3>& out, const Tensor<2>& lse) const;
  void forward_block(const Block& block, int64_t head, const Tensor<3>& out, const Tensor<2>& lse,
                     std::vector<uint64_t>& keys, std::vector<OnlineSoftmax>& softmax,
                     Scratch scratch) const;

  // What the dq pass finds for each row and query head, [N, Hq], and the dk, dv pass uses. Both
  // come from p itself: exp(lse) is the softmax's denominator, and out the weighted sum of v, only
  // to their rounding.
  struct Statistics {
    std::vector<float> correction;  // 1 / sum_j exp(s_j - lse)
    std::vector<float> delta;
  };
  void backward(const Tensor<3>& dout, const Tensor<2>& dlse, const Tensor<2>& lse,
                const Tensor<3>& dq, const Tensor<4>& dk, const Tensor<4>& dv) const;
  void backward_dq(const Block& block, int64_t head, const Tensor<3>& dout, const Tensor<2>& dlse,
                   const Tensor<2>& lse, const Tensor<3>& dq, Statistics& rows,
                   std::vector<uint64_t>& keys, Scratch scratch) const;
  void backward_dkv(int64_t sequence, int64_t head, int64_t tile, const Tensor<3>& dout,
                    const Tensor<2>& lse, const Statistics& rows, const Tensor<4>& dk,
                    const Tensor<4>& dv, std::vector<uint64_t>& keys, Scratch scratch) const;
};

template <class T>
void Kernel<T>::forward(const Tensor<3>& out, const Tensor<2>& lse) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.rows.start[n] < op.rows.stop[n]) continue;
    for (int64_t h = 0; h < Hq; ++h) {
      std::fill_n(out.row<T>(n, h), Dv, from_float<T>(0.0f));
      *lse.row<float>(n, h) = -std::numeric_limits<float>::infinity();
    }
  }
  const int64_t items = static_cast<int64_t>(blocks.blocks.size()) * Hkv;
  const int threads = useful_threads(items, scores() * (D + Dv), op.threads);
  const int64_t share = M * (ldq + ldv + KEYS) + KEYS * (D + ldv);
  std::vector<float> memory(threads * share);
  std::vector<std::vector<uint64_t>> keys(threads, std::vector<uint64_t>(M));
  std::vector<std::vector<OnlineSoftmax>> softmax(threads, std::vector<OnlineSoftmax>(M));
  parallel_for(items, threads, [&](int64_t item, int thread) {
    forward_block(blocks.blocks[item / Hkv], item % Hkv, out, lse, keys[thread], softmax[thread],
                  {memory.data() + thread * share});
  });
}

template <class T>
void Kernel<T>::forward_block(const Block& block, int64_t head, const Tensor<3>& out,
                              const Tensor<2>& lse, std::vector<uint64_t>& keys,
                              std::vector<OnlineSoftmax>& softmax, Scratch scratch) const {
  const int64_t m = block.count * group;
  float* const q = scratch.take(M * ldq);       // [m, D]
  float* const o = scratch.take(M * ldv);       // [m, Dv]
  float* const s = scratch.take(M * KEYS);      // [m, KEYS]: scores, then p
  float* const kt = scratch.take(D * KEYS);     // [D, KEYS]
  float* const v = scratch.take(KEYS * ldv);    // [KEYS, Dv]
  load_rows(op.q, block, head, D, op.scale, q);
  std::fill(o, o + m * ldv, 0.0f);
  std::fill_n(softmax.begin(), m, OnlineSoftmax{});

  for (int64_t tile = block.start / KEYS; tile * KEYS < block.stop; ++tile) {
    const uint64_t any = masks(block, tile, keys);
    if (any == 0) continue;
    load_keys_transposed(keys_at(op.k, block.sequence, head, tile), op.k.stride[2], D, any, kt);
    load_keys(keys_at(op.v, block.sequence, head, tile), op.v.stride[2], Dv, any, v);
    score(m, q, kt, s);
    for (int64_t i = 0; i < m; ++i) {
      if (keys[i / group] == 0) {
        std::fill_n(s + i * KEYS, KEYS, 0.0f);
      } else {
        scale_row(o + i * ldv, ldv, add_tile(softmax[i], s + i * KEYS, keys[i / group]));
      }
    }
    multiply_add(m, ldv, KEYS, s, KEYS, 1, v, ldv, o, ldv);
  }
  for (int64_t i = 0; i < m; ++i) {
    const int64_t n = block.index[i / group], h = head * group + i % group;
    const float sum = softmax[i].sum;
    store_row(o + i * ldv, Dv, sum == 0.0f ? 0.0f : 1.0f / sum, out.row<T>(n, h));
    *lse.row<float>(n, h) = softmax[i].log_sum_exp();
  }
}

template <class T>
void Kernel<T>::backward(const Tensor<3>& dout, const Tensor<2>& dlse, const Tensor<2>& lse,
                         const Tensor<3>& dq, const Tensor<4>& dk, const Tensor<4>& dv) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.rows.start[n] < op.rows.stop[n]) continue;
    for (int64_t h = 0; h < Hq; ++h) std::fill_n(dq.row<T>(n, h), D, from_float<T>(0.0f));
  }
  const int64_t row_items = static_cast<int64_t>(blocks.blocks.size()) * Hkv;
  const int64_t key_items = B * Hkv * tiles;
  const double work = scores() * 2 * (D + Dv);
  const int threads = useful_threads(std::max(row_items, key_items), work, op.threads);
  const int64_t share = M * (3 * ldq + ldv + 2 * KEYS) + KEYS * (2 * ldq + 2 * ldv);
  std::vector<float> memory(threads * share);
  std::vector<std::vector<uint64_t>> keys(threads, std::vector<uint64_t>(M));
  Statistics rows{std::vector<float>(N * Hq), std::vector<float>(N * Hq)};
  parallel_for(row_items, threads, [&](int64_t item, int thread) {
    backward_dq(blocks.blocks[item / Hkv], item % Hkv, dout, dlse, lse, dq, rows, keys[thread],
                {memory.data() + thread * share});
  });
  parallel_for(key_items, threads, [&](int64_t item, int thread) {
    backward_dkv(item / tiles / Hkv, item / tiles % Hkv, item % tiles, dout, lse, rows, dk, dv,
                 keys[thread], {memory.data() + thread * share});
  });
}

// Before delta is known: sum_j p_j (dp_j - delta) k_j = sum_j p_j dp_j k_j - delta sum_j p_j k_j.
template <class T>
void Kernel<T>::backward_dq(const Block& block, int64_t head, const Tensor<3>& dout,
                            const Tensor<2>& dlse, const Tensor<2>& lse, const Tensor<3>& dq,
                            Statistics& rows, std::vector<uint64_t>& keys,
                            Scratch scratch) const {
  const int64_t m = block.count * group;
  float* const q = scratch.take(M * ldq);      // [m, D]
  float* const d = scratch.take(M * ldv);      // [m, Dv]: dout
  float* const dp_k = scratch.take(M * ldq);   // [m, D]: sum_j p_j dp_j k_j
  float* const p_k = scratch.take(M * ldq);    // [m, D]: sum_j p_j k_j
  float* const s = scratch.take(M * KEYS);     // [m, KEYS]: scores, then p
  float* const dp = scratch.take(M * KEYS);    // [m, KEYS]: dp, then p dp
  float* const kt = scratch.take(D * KEYS);    // [D, KEYS]
  float* const vt = scratch.take(Dv * KEYS);   // [Dv, KEYS]
  float* const k = scratch.take(KEYS * ldq);   // [KEYS, D]
  load_rows(op.q, block, head, D, op.scale, q);
  load_rows(dout, block, head, Dv, 1.0f, d);
  std::fill(dp_k, dp_k + m * ldq, 0.0f);
  std::fill(p_k, p_k + m * ldq, 0.0f);
  const auto row = [&](int64_t i) -> int64_t { return block.index[i / group]; };
  const auto query_head = [&](int64_t i) { return head * group + i % group; };
  const auto at = [&](int64_t i) { return row(i) * Hq + query_head(i); };
  for (int64_t i = 0; i < m; ++i) rows.correction[at(i)] = rows.delta[at(i)] = 0.0f;

  for (int64_t tile = block.start / KEYS; tile * KEYS < block.stop; ++tile) {
    const uint64_t any = masks(block, tile, keys);
    if (any == 0) continue;
    const T* const keys_k = keys_at(op.k, block.sequence, head, tile);
    load_keys_transposed(keys_k, op.k.stride[2], D, any, kt);
    load_keys(keys_k, op.k.stride[2], D, any, k);
    load_keys_transposed(keys_at(op.v, block.sequence, head, tile), op.v.stride[2], Dv, any, vt);
    score(m, q, kt, s);
    product(m, Dv, d, vt, dp);
    for (int64_t i = 0; i < m; ++i) {
      const BackwardSums sums = backward_sums(s + i * KEYS, dp + i * KEYS, keys[i / group],
                                              *lse.row<float>(row(i), query_head(i)), op.softcap);
      rows.correction[at(i)] += sums.p;
      rows.delta[at(i)] += sums.p_dp;
    }
    multiply_add(m, ldq, KEYS, dp, KEYS, 1, k, ldq, dp_k, ldq);
    multiply_add(m, ldq, KEYS, s, KEYS, 1, k, ldq, p_k, ldq);
  }
  for (int64_t i = 0; i < m; ++i) {
    float &correction = rows.correction[at(i)], &delta = rows.delta[at(i)];
    if (correction != 0.0f) {  // else the row sees no key, and all three are 0
      correction = 1.0f / correction;
      delta = delta * correction - *dlse.row<float>(row(i), query_head(i));
    }
    float* const sum = dp_k + i * ldq;
    for (int64_t c = 0; c < D; ++c) sum[c] -= delta * p_k[i * ldq + c];
    store_row(sum, D, op.scale * correction, dq.row<T>(row(i), query_head(i)));
  }
}

template <class T>
void Kernel<T>::backward_dkv(int64_t sequence, int64_t head, int64_t tile, const Tensor<3>& dout,
                             const Tensor<2>& lse, const Statistics& rows, const Tensor<4>& dk,
                             const Tensor<4>& dv, std::vector<uint64_t>& keys,
                             Scratch scratch) const {
  float* const q = scratch.take(M * ldq);      // [m, D]
  float* const d = scratch.take(M * ldv);      // [m, Dv]: dout
  float* const s = scratch.take(M * KEYS);     // [m, KEYS]: scores, then p
  float* const ds = scratch.take(M * KEYS);    // [m, KEYS]: dp, then ds
  float* const kt = scratch.take(D * KEYS);    // [D, KEYS]
  float* const vt = scratch.take(Dv * KEYS);   // [Dv, KEYS]
  float* const gk = scratch.take(KEYS * ldq);  // [KEYS, D]: dk
  float* const gv = scratch.take(KEYS * ldv);  // [KEYS, Dv]: dv
  std::fill(gk, gk + KEYS * ldq, 0.0f);
  std::fill(gv, gv + KEYS * ldv, 0.0f);
  uint64_t loaded = 0;  // the keys that kt and vt hold

  for (int64_t b = blocks.first[sequence]; b < blocks.first[sequence + 1]; ++b) {
    const Block& block = blocks.blocks[b];
    const uint64_t any = masks(block, tile, keys);
    if (any == 0) continue;
    if ((any & ~loaded) != 0) {
      loaded |= any;
      load_keys_transposed(keys_at(op.k, sequence, head, tile), op.k.stride[2], D, loaded, kt);
      load_keys_transposed(keys_at(op.v, sequence, head, tile), op.v.stride[2], Dv, loaded, vt);
    }
    const int64_t m = block.count * group;
    load_rows(op.q, block, head, D, op.scale, keys, q);
    load_rows(dout, block, head, Dv, 1.0f, keys, d);
    score(m, q, kt, s);
    product(m, Dv, d, vt, ds);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t n = block.index[i / group], h = head * group + i % group;
      softmax_backward(s + i * KEYS, ds + i * KEYS, keys[i / group], *lse.row<float>(n, h),
                       rows.correction[n * Hq + h], rows.delta[n * Hq + h], op.softcap);
    }
    multiply_add(KEYS, ldv, m, s, 1, KEYS, d, ldv, gv, ldv);   // p^T dout
    multiply_add(KEYS, ldq, m, ds, 1, KEYS, q, ldq, gk, ldq);  // ds^T (scale q)
  }
  for (int64_t j = 0; j < std::min(KEYS, S - tile * KEYS); ++j) {
    store_row(gk + j * ldq, D, 1.0f, dk.row<T>(sequence, head, tile * KEYS + j));
    store_row(gv + j * ldv, Dv, 1.0f, dv.row<T>(sequence, head, tile * KEYS + j));
  }
}

// body(Kernel<T>) for the T of the op.
template <class Body>
void dispatch(const SideAttention& op, const Body& body) {
  switch (op.dtype) {
    case Dtype::float32:
      return body(Kernel<float>{op});
    case Dtype::bfloat16:
      return body(Kernel<bfloat16>{op});
    case Dtype::float16:
      return body(Kernel<float16>{op});
    case Dtype::int32:
    case Dtype::int64:
      return;  // cannot happen: bindings.cpp refuses it
  }
}

}  // namespace

void side_attention_forward(const SideAttention& op, const Tensor<3>& out, const Tensor<2>& lse) {
  dispatch(op, [&](const auto& kernel) { kernel.forward(out, lse); });
}

void side_attention_backward(const SideAttention& op, const Tensor<3>& dout, const Tensor<2>& dlse,
                             const Tensor<2>& lse, const Tensor<3>& dq, const Tensor<4>& dk,
                             const Tensor<4>& dv) {
  dispatch(op, [&](const auto& kernel) { kernel.backward(dout, dlse, lse, dq, dk, dv); });
}

}  // namespace groundkern
