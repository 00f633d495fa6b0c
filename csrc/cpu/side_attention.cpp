// side_attention on the CPU: for each row, attention over its allowed keys, and its log-sum-exp.
//
//   s = softcap(scale q . k),  lse = log sum_j exp(s_j),  p = exp(s - lse),  out = sum_j p_j v_j
//   ds = p (dp - delta) dcap,  dp_j = dout . v_j,  delta = sum_j p_j dp_j - dlse
//   dq = scale sum_j ds_j k_j,  dk_j = scale sum_n ds_nj q_n,  dv_j = sum_n p_nj dout_n
//
// For each sequence the keys that some row uses are gathered; then a panel of 32 packed rows at a
// time makes its scores as K Q^T [U, 32], the softmax runs down the columns, and out = P V. In
// backward p and ds of a block of rows are kept for all keys; dk and dv follow over parts of the
// keys. No sum is shared by two threads, so there are no atomics.
#include "gathered.h"

namespace groundkern {
namespace {

// T: of the tensors. X: of the products' operands.
template <class T, class X>
struct Kernel {
  const SideAttention& op;
  const Level& level;
  const Products<X> products{level};
  const int64_t N = op.q.size[0], Hq = op.q.size[1], D = op.q.size[2];
  const int64_t B = op.k.size[0], Hkv = op.k.size[1], S = op.k.size[2], Dv = op.v.size[3];
  const int64_t group = Hq / Hkv;
  const std::vector<int64_t> ranges = sequence_ranges(op.rows, B);
  static constexpr bool narrow = !std::is_same_v<X, float>;

  int threads(int64_t items, double work) const { return useful_threads(items, work, op.threads); }

  SequenceRows rows_of(int64_t b) const {
    return SequenceRows(op.rows, ranges[b], ranges[b + 1], S,
                        [&](int64_t n, int64_t word) { return allowed_word(op.rows, n, word); });
  }

  void zero_row(const Tensor<3>& x, int64_t n) const {
    for (int64_t h = 0; h < Hq; ++h) std::fill_n(x.row<T>(n, h), x.size[2], from_float<T>(0.0f));
  }

  void empty_row(int64_t n, const Tensor<3>& out, const Tensor<2>& lse) const {
    zero_row(out, n);
    for (int64_t h = 0; h < Hq; ++h) {
      *lse.row<float>(n, h) = -std::numeric_limits<float>::infinity();
    }
  }

  void forward(const Tensor<3>& out, const Tensor<2>& lse) const;
  void forward_panel(const Block& block, int64_t head, int64_t panel, const X* k, const X* v,
                     const Tensor<3>& out, const Tensor<2>& lse, float* scratch) const;
  int64_t forward_scratch(int64_t U) const {
    return words<X>(D + 1, LANES) + U * LANES + words<X>(U, LANES) + padded(Dv) * LANES;
  }

  // A batch of heads: their gathered keys and rows, what a block of rows keeps, and sums over
  // blocks. The parts of a head lie side by side.
  struct Batch {
    Buffer<X> k, k_paired, v, q, dout, p, ds;
    Buffer<float> dk, dv, scratch;
  };
  void backward(const Tensor<3>& dout, const Tensor<2>& dlse, const Tensor<2>& lse,
                const Tensor<3>& dq, const Tensor<4>& dk, const Tensor<4>& dv) const;
  void backward_batch(const SequenceRows& of, int64_t b, int64_t head, int64_t heads,
                      int64_t rows, const Tensor<3>& dout, const Tensor<2>& dlse,
                      const Tensor<2>& lse, const Tensor<3>& dq, const Tensor<4>& dk,
                      const Tensor<4>& dv) const;
  void backward_panel(const Block& block, int64_t head, int64_t panel, const Batch& batch,
                      int64_t part, const Tensor<3>& dout, const Tensor<2>& dlse,
                      const Tensor<2>& lse, const Tensor<3>& dq, float* scratch) const;
  int64_t backward_scratch(int64_t U) const {
    const int64_t panel = words<X>(D + 1, LANES) + words<X>(Dv + 1, LANES) +
                          (narrow ? 3 : 0) * U * LANES + padded(D) * LANES;
    return std::max(panel, PART * std::max(padded(D), padded(Dv)));
  }
};

template <class T, class X>
void Kernel<T, X>::forward(const Tensor<3>& out, const Tensor<2>& lse) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.rows.start[n] >= op.rows.stop[n]) empty_row(n, out, lse);
  }
  for (int64_t b = 0; b < B; ++b) {
    const SequenceRows of = rows_of(b);
    for (const int32_t n : of.rows) {
      if (!of.keys.empty()) break;
      empty_row(n, out, lse);
    }
    if (of.keys.empty()) continue;
    const Block block(of, 0, static_cast<int64_t>(of.rows.size()), group);
    const int64_t k_size = of.U * padded(D), v_size = of.U * padded(Dv);
    const int64_t batch = heads_at_a_time(k_size + v_size, block.panels, Hkv, op.threads);
    const double work = static_cast<double>(of.U) * block.m * (D + Dv) * batch;
    const int workers = threads(batch * block.panels, work);
    const Buffer<X> k(batch * k_size), v(batch * v_size);
    const int64_t share = forward_scratch(of.U), parts = (of.U + PART - 1) / PART;
    const Buffer<float> scratch(workers * share);
    for (int64_t head = 0; head < Hkv; head += batch) {
      const int64_t heads = std::min(batch, Hkv - head);
      parallel_for(heads * parts, workers, [&](int64_t item, int) {
        const int64_t h = item / parts, from = item % parts * PART;
        gather_plain<X, T>(of, op.k, b, head + h, from, every_key, k.data() + h * k_size);
        gather_paired<X, T>(of, op.v, b, head + h, from, every_key, v.data() + h * v_size);
      });
      parallel_for(heads * block.panels, workers, [&](int64_t item, int thread) {
        const int64_t h = item / block.panels;
        forward_panel(block, head + h, item % block.panels, k.data() + h * k_size,
                      v.data() + h * v_size, out, lse, scratch.data() + thread * share);
      });
    }
  }
}

template <class T, class X>
void Kernel<T, X>::forward_panel(const Block& block, int64_t head, int64_t panel, const X* k,
                                 const X* v, const Tensor<3>& out, const Tensor<2>& lse,
                                 float* scratch) const {
  const int64_t U = block.of.U;
  X* const q = reinterpret_cast<X*>(scratch);       // [D, LANES]
  float* const s = scratch + words<X>(D + 1, LANES);  // [U, LANES]
  float* const p = narrow ? s + U * LANES : s;        // [U, LANES]
  float* const o = s + U * LANES + words<X>(U, LANES);  // [LANES, Dv]
  float shift[LANES], top[LANES], sum[LANES];
  lay_transposed<X, T>(block, op.q, head * group, panel, q);
  products.plain(U, LANES, D, k, U, q, D, s, U, false);
  level.mask_scores(s, U, block.panel_bits(panel), op.scale, op.softcap, top);
  for (int64_t l = 0; l < LANES; ++l) shift[l] = std::isinf(top[l]) ? 0.0f : top[l];
  if (narrow) {
    level.exponentials_bfloat16(s, U, shift, sum, reinterpret_cast<uint32_t*>(p));
  } else {
    level.exponentials(s, U, shift, sum, p);
  }
  products.transposed(LANES, padded(Dv), U, reinterpret_cast<const X*>(p), U, v, U, o, LANES);
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l, n = block.row(i), h = head * group + block.head(i);
    get_row(o, Dv, LANES, l, sum[l] == 0.0f ? 0.0f : 1.0f / sum[l], out.row<T>(n, h));
    *lse.row<float>(n, h) = sum[l] == 0.0f ? top[l] : shift[l] + std::log(sum[l]);
  }
}

template <class T, class X>
void Kernel<T, X>::backward(const Tensor<3>& dout, const Tensor<2>& dlse, const Tensor<2>& lse,
                            const Tensor<3>& dq, const Tensor<4>& dk, const Tensor<4>& dv) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.rows.start[n] >= op.rows.stop[n]) zero_row(dq, n);
  }
  for (int64_t b = 0; b < B; ++b) {
    const SequenceRows of = rows_of(b);
    const int64_t parts = (S + PART - 1) / PART;
    const int workers = threads(Hkv * parts, static_cast<double>(Hkv) * S * (D + Dv));
    parallel_for(Hkv * parts, workers, [&](int64_t item, int) {
      zero_unused<T>(of.any, dk, b, item / parts, item % parts * PART);
      zero_unused<T>(of.any, dv, b, item / parts, item % parts * PART);
    });
    if (of.keys.empty()) {
      for (const int32_t n : of.rows) zero_row(dq, n);
      continue;
    }
    const int64_t count = static_cast<int64_t>(of.rows.size());
    const int64_t rows = std::min(count, std::max<int64_t>(1, SCORES / (of.U * group)));
    const int64_t per_head = of.U * (2 * padded(rows * group) + 2 * padded(D) + padded(Dv));
    const int64_t items = padded(rows * group) / LANES;
    const int64_t batch = heads_at_a_time(per_head, items, Hkv, op.threads);
    for (int64_t head = 0; head < Hkv; head += batch) {
      const int64_t heads = std::min(batch, Hkv - head);
      backward_batch(of, b, head, heads, rows, dout, dlse, lse, dq, dk, dv);
    }
  }
}

template <class T, class X>
void Kernel<T, X>::backward_batch(const SequenceRows& of, int64_t b, int64_t head, int64_t heads,
                                  int64_t rows, const Tensor<3>& dout, const Tensor<2>& dlse,
                                  const Tensor<2>& lse, const Tensor<3>& dq, const Tensor<4>& dk,
                                  const Tensor<4>& dv) const {
  const int64_t U = of.U, parts = (U + PART - 1) / PART, M = padded(rows * group);
  const int64_t count = static_cast<int64_t>(of.rows.size());
  const int64_t k_size = U * padded(D), v_size = U * padded(Dv);
  const double work = 2.0 * U * M * (D + Dv) * heads;
  const int workers = threads(heads * std::max(parts, M / LANES), work);
  const int64_t share = backward_scratch(U);
  const bool several = rows < count;
  const Batch batch{Buffer<X>(heads * k_size),
                    Buffer<X>(narrow ? heads * k_size : 0),
                    Buffer<X>(heads * v_size),
                    Buffer<X>(heads * M * padded(D)),
                    Buffer<X>(heads * M * padded(Dv)),
                    Buffer<X>(heads * M * U),
                    Buffer<X>(heads * M * U),
                    Buffer<float>(several ? heads * k_size : 0),
                    Buffer<float>(several ? heads * v_size : 0),
                    Buffer<float>(workers * share)};
  parallel_for(heads * parts, workers, [&](int64_t item, int) {
    const int64_t h = item / parts, from = item % parts * PART;
    gather_plain<X, T>(of, op.k, b, head + h, from, every_key, batch.k.data() + h * k_size);
    gather_plain<X, T>(of, op.v, b, head + h, from, every_key, batch.v.data() + h * v_size);
    if (!narrow) return;
    gather_paired<X, T>(of, op.k, b, head + h, from, every_key, batch.k_paired.data() + h * k_size);
  });
  for (int64_t first = 0; first < count; first += rows) {
    const Block block(of, first, std::min(rows, count - first), group);
    parallel_for(heads * block.panels, workers, [&](int64_t item, int thread) {
      const int64_t h = item / block.panels;
      backward_panel(block, head + h, item % block.panels, batch, h, dout, dlse, lse, dq,
                     batch.scratch.data() + thread * share);
    });
    const KeyGradient<T, X> gradient{products, of, first == 0, first + block.count == count};
    parallel_for(heads * parts, workers, [&](int64_t item, int thread) {
      const int64_t h = item / parts, from = item % parts * PART, m = h * block.panels * LANES;
      float* const part = batch.scratch.data() + thread * share;
      gradient.add(batch.ds.data() + m * U, batch.q.data() + m * padded(D), block.m, from, dk, b,
                   head + h, several ? batch.dk.data() + h * k_size : nullptr, part);
      gradient.add(batch.p.data() + m * U, batch.dout.data() + m * padded(Dv), block.m, from, dv, b,
                   head + h, several ? batch.dv.data() + h * v_size : nullptr, part);
    });
  }
}

template <class T, class X>
void Kernel<T, X>::backward_panel(const Block& block, int64_t head, int64_t panel,
                                  const Batch& batch, int64_t part, const Tensor<3>& dout,
                                  const Tensor<2>& dlse, const Tensor<2>& lse, const Tensor<3>& dq,
                                  float* scratch) const {
  const int64_t U = block.of.U, M = block.panels * LANES;
  X* const q = reinterpret_cast<X*>(scratch);                                // [D, LANES]
  X* const d = reinterpret_cast<X*>(scratch + words<X>(D + 1, LANES));       // [Dv, LANES]
  float* const own = scratch + words<X>(D + 1, LANES) + words<X>(Dv + 1, LANES);
  X* const p_kept = batch.p.data() + (part * M + panel * LANES) * U;         // [U, LANES]
  X* const ds_kept = batch.ds.data() + (part * M + panel * LANES) * U;       // [U, LANES]
  float* const s = narrow ? own : reinterpret_cast<float*>(p_kept);
  float* const dp = narrow ? own + U * LANES : reinterpret_cast<float*>(ds_kept);
  X* const ds_paired = narrow ? reinterpret_cast<X*>(own + 2 * U * LANES) : ds_kept;
  float* const gradient = own + (narrow ? 3 : 0) * U * LANES;  // [LANES, D]: dq
  const int64_t k_size = U * padded(D), v_size = U * padded(Dv);
  const X* const k = batch.k.data() + part * k_size;
  const X* const k_paired = narrow ? batch.k_paired.data() + part * k_size : k;
  lay_transposed<X, T>(block, op.q, head * group, panel, q);
  lay_transposed<X, T>(block, dout, head * group, panel, d);
  lay_paired<X, T>(block, op.q, head * group, panel, batch.q.data() + part * M * padded(D));
  lay_paired<X, T>(block, dout, head * group, panel, batch.dout.data() + part * M * padded(Dv));

  float shift[LANES] = {}, correction[LANES], delta[LANES], unused[LANES];
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l, h = head * group + block.head(i);
    const float norm = *lse.row<float>(block.row(i), h);
    shift[l] = std::isinf(norm) ? 0.0f : norm;
  }
  products.plain(U, LANES, D, k, U, q, D, s, U, false);
  products.plain(U, LANES, Dv, batch.v.data() + part * v_size, U, d, Dv, dp, U, false);
  level.mask_scores(s, U, block.panel_bits(panel), op.scale, op.softcap, unused);
  level.backward_sums(s, dp, U, shift, op.softcap, correction, delta);
  for (int64_t l = 0; l < LANES; ++l) {
    const int64_t i = panel * LANES + l;
    if (i >= block.m || correction[l] == 0.0f) {  // an empty lane, or a row that sees no key
      correction[l] = delta[l] = 0.0f;
      continue;
    }
    correction[l] = 1.0f / correction[l];
    delta[l] = delta[l] * correction[l] -
               *dlse.row<float>(block.row(i), head * group + block.head(i));
  }
  level.softmax_backward(s, dp, U, shift, correction, delta, op.scale, op.softcap);
  if (narrow) {
    level.narrow(s, U, reinterpret_cast<uint32_t*>(p_kept), nullptr);
    level.narrow(dp, U, reinterpret_cast<uint32_t*>(ds_kept), reinterpret_cast<uint32_t*>(ds_paired));
  }
  products.transposed(LANES, padded(D), U, ds_paired, U, k_paired, U, gradient, LANES);
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l;
    get_row(gradient, D, LANES, l, 1.0f, dq.row<T>(block.row(i), head * group + block.head(i)));
  }
}

}  // namespace

void side_attention_forward(const SideAttention& op, const Tensor<3>& out, const Tensor<2>& lse) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.forward(out, lse); });
}

void side_attention_backward(const SideAttention& op, const Tensor<3>& dout, const Tensor<2>& dlse,
                             const Tensor<2>& lse, const Tensor<3>& dq, const Tensor<4>& dk,
                             const Tensor<4>& dv) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.backward(dout, dlse, lse, dq, dk, dv); });
}

}  // namespace groundkern
