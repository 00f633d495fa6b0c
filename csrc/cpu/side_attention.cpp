// side_attention on the CPU: for each row, attention over its allowed keys, and its log-sum-exp.
//
//   s = softcap(scale q . k),  lse = log sum_j exp(s_j),  p = exp(s - lse),                    (S1)
//   out = sum_j p_j v_j
//   ds = p (dp - delta) dcap,  dp_j = dout . v_j,  delta = sum_j p_j dp_j - dlse
//   dq = scale sum_j ds_j k_j,  dk_j = scale sum_n ds_nj q_n,  dv_j = sum_n p_nj dout_n
//
// For each sequence the keys that some row uses are gathered. Then, for one panel of 32 packed rows
// at a time, the scores are K Q^T [U, 32], the softmax runs down the columns, and out = P V. The
// backward stores p and ds of a block of rows for all keys, from which dk and dv follow over parts
// of the keys. No two threads add to one sum, so there are no atomics.
#include "gathered.h"

namespace groundkern {
namespace {

// T: the type of the tensors. X: the type of the products' operands.
template <class T, class X>
struct Kernel {
  using Results = SideAttention::Results;
  using Upstream = SideAttention::Upstream;
  using Gradients = SideAttention::Gradients;

  const SideAttention& op;
  const Isa& isa;
  const Products<X> products{isa};
  const int64_t N = op.inputs.q.size[0], Hq = op.inputs.q.size[1], D = op.inputs.q.size[2];
  const int64_t B = op.inputs.k.size[0], Hkv = op.inputs.k.size[1], S = op.inputs.k.size[2],
                Dv = op.inputs.v.size[3];
  const int64_t group = Hq / Hkv;
  const std::vector<int64_t> ranges = sequence_ranges(op.selection, B);
  static constexpr bool narrow = !std::is_same_v<X, float>;

  int threads(int64_t items, double work) const {
    return useful_threads(items, work, op.options.threads);
  }

  SequenceRows rows_of(int64_t b) const {
    return SequenceRows(op.selection, ranges[b], ranges[b + 1], S,
                        [&](int64_t n, int64_t i) { return allowed_bits(op.selection, n, i); });
  }

  void zero_row(const Tensor<3>& x, int64_t n) const {
    for (int64_t h = 0; h < Hq; ++h) std::fill_n(x.row<T>(n, h), x.size[2], from_float<T>(0.0f));
  }

  // The results of a row without keys.
  void empty_row(int64_t n, const Results& to) const {
    zero_row(to.out, n);
    for (int64_t h = 0; h < Hq; ++h) {
      *to.lse.row<float>(n, h) = -std::numeric_limits<float>::infinity();
    }
  }

  void forward(const Results& to) const;
  void forward_panel(const Block& block, int64_t b, int64_t head, int64_t panel, const X* k,
                     const X* v, const Results& to, float* scratch) const;
  int64_t forward_scratch(int64_t U) const {
    return panel_floats<X>(D + 1, LANES) + U * LANES + panel_floats<X>(U, LANES) +
           padded(Dv) * LANES;
  }

  // Key heads [head, head + heads) of one sequence, with the backward's buffers for them. What
  // belongs to one head lies next to each other.
  struct Batch {
    const SequenceRows& of;
    int64_t b, head, heads;
    int64_t rows;           // at most so many in a block
    Buffer<X> k, k_paired;  // [heads, U, D]
    Buffer<X> v;            // [heads, U, Dv]
    Buffer<X> q, dout;      // [heads, M, D], [heads, M, Dv] paired: M = padded(rows * group)
    Buffer<X> p, ds;        // [heads, M / LANES, U, LANES]
    Buffer<float> dk, dv;   // [heads, U, D], [heads, U, Dv]: sums over several blocks
  };
  Batch allocate(const SequenceRows& of, int64_t b, int64_t head) const;
  void backward(const Upstream& from, const Gradients& to) const;
  void backward_batch(const Batch& batch, const Upstream& from, const Gradients& to) const;
  void backward_panel(const Block& block, const Batch& batch, int64_t part, int64_t panel,
                      const Upstream& from, const Tensor<3>& dq, float* scratch) const;
  int64_t backward_scratch(int64_t U) const {
    const int64_t panel = panel_floats<X>(D + 1, LANES) + panel_floats<X>(Dv + 1, LANES) +
                          (narrow ? 3 : 0) * U * LANES + padded(D) * LANES;
    return std::max(panel, PART * std::max(padded(D), padded(Dv)));
  }
};

template <class T, class X>
void Kernel<T, X>::forward(const Results& to) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.selection.start[n] >= op.selection.stop[n]) empty_row(n, to);
  }
  for (int64_t b = 0; b < B; ++b) {
    const SequenceRows of = rows_of(b);
    for (const int32_t n : of.rows) {
      if (!of.keys.empty()) break;
      empty_row(n, to);
    }
    if (of.keys.empty()) continue;
    const Block block(of, 0, static_cast<int64_t>(of.rows.size()), group);
    const int64_t k_size = of.U * padded(D), v_size = of.U * padded(Dv);
    const int64_t batch = heads_at_a_time(k_size + v_size, block.panels, Hkv, op.options.threads);
    const double work = static_cast<double>(of.U) * block.m * (D + Dv) * batch;
    const int workers = threads(batch * block.panels, work);
    const Buffer<X> k(batch * k_size), v(batch * v_size);
    const int64_t share = forward_scratch(of.U), parts = (of.U + PART - 1) / PART;
    const Buffer<float> scratch(workers * share);
    for (int64_t head = 0; head < Hkv; head += batch) {
      const int64_t heads = std::min(batch, Hkv - head);
      parallel_for(heads * parts, workers, [&](int64_t item, int) {
        const int64_t h = item / parts, from = item % parts * PART;
        gather_others<X, T>(of, op.inputs.k, b, head + h, from, k.data() + h * k_size);
        gather_paired<X, T>(of, op.inputs.v, b, head + h, from, every_key, v.data() + h * v_size);
      });
      parallel_for(heads * block.panels, workers, [&](int64_t item, int thread) {
        const int64_t h = item / block.panels;
        forward_panel(block, b, head + h, item % block.panels, k.data() + h * k_size,
                      v.data() + h * v_size, to, scratch.data() + thread * share);
      });
    }
  }
}

template <class T, class X>
void Kernel<T, X>::forward_panel(const Block& block, int64_t b, int64_t head, int64_t panel,
                                 const X* k, const X* v, const Results& to, float* scratch) const {
  const int64_t U = block.of.U;
  X* const q = reinterpret_cast<X*>(scratch);                  // [D, LANES]
  float* const s = scratch + panel_floats<X>(D + 1, LANES);    // [U, LANES]
  float* const p = narrow ? s + U * LANES : s;                 // [U, LANES]
  float* const o = s + U * LANES + panel_floats<X>(U, LANES);  // [LANES, Dv]
  float shift[LANES], top[LANES], sum[LANES];
  lay_transposed<X, T>(block, op.inputs.q, head * group, panel, q);
  multiply_keys<X, T>(products, block.of, op.inputs.k, b, head, k, q, s);
  isa.mask_scores(s, U, block.panel_bits(panel), op.options.scale, op.options.softcap, top);
  for (int64_t l = 0; l < LANES; ++l) shift[l] = std::isinf(top[l]) ? 0.0f : top[l];
  if (narrow) {
    isa.exponentials_bfloat16(s, U, shift, sum, reinterpret_cast<uint32_t*>(p));
  } else {
    isa.exponentials(s, U, shift, sum, p);
  }
  products.transposed(LANES, padded(Dv), U, {reinterpret_cast<const X*>(p), U}, {v, U}, {o, LANES});
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l, n = block.row(i), h = head * group + block.head(i);
    get_row(o, Dv, LANES, l, sum[l] == 0.0f ? 0.0f : 1.0f / sum[l], to.out.row<T>(n, h));
    *to.lse.row<float>(n, h) = sum[l] == 0.0f ? top[l] : shift[l] + std::log(sum[l]);
  }
}

template <class T, class X>
void Kernel<T, X>::backward(const Upstream& from, const Gradients& to) const {
  for (int64_t n = 0; n < N; ++n) {
    if (op.selection.start[n] >= op.selection.stop[n]) zero_row(to.dq, n);
  }
  for (int64_t b = 0; b < B; ++b) {
    const SequenceRows of = rows_of(b);
    const int64_t parts = (S + PART - 1) / PART;
    const int workers = threads(Hkv * parts, static_cast<double>(Hkv) * S * (D + Dv));
    parallel_for(Hkv * parts, workers, [&](int64_t item, int) {
      zero_unused<T>(of.any, to.dk, b, item / parts, item % parts * PART);
      zero_unused<T>(of.any, to.dv, b, item / parts, item % parts * PART);
    });
    if (of.keys.empty()) {
      for (const int32_t n : of.rows) zero_row(to.dq, n);
      continue;
    }
    for (int64_t head = 0; head < Hkv;) {
      const Batch batch = allocate(of, b, head);
      backward_batch(batch, from, to);
      head += batch.heads;
    }
  }
}

template <class T, class X>
typename Kernel<T, X>::Batch Kernel<T, X>::allocate(const SequenceRows& of, int64_t b,
                                                    int64_t head) const {
  const int64_t U = of.U, count = static_cast<int64_t>(of.rows.size());
  const int64_t rows = std::min(count, std::max<int64_t>(1, SCORES / (U * group)));
  const int64_t M = padded(rows * group), k_size = U * padded(D), v_size = U * padded(Dv);
  const int64_t per_head = U * 2 * M + 2 * k_size + v_size;
  const int64_t heads =
      std::min(heads_at_a_time(per_head, M / LANES, Hkv, op.options.threads), Hkv - head);
  const bool several = rows < count;
  return {of,
          b,
          head,
          heads,
          rows,
          Buffer<X>(heads * k_size),
          Buffer<X>(narrow ? heads * k_size : 0),
          Buffer<X>(heads * v_size),
          Buffer<X>(heads * M * padded(D)),
          Buffer<X>(heads * M * padded(Dv)),
          Buffer<X>(heads * M * U),
          Buffer<X>(heads * M * U),
          Buffer<float>(several ? heads * k_size : 0),
          Buffer<float>(several ? heads * v_size : 0)};
}

template <class T, class X>
void Kernel<T, X>::backward_batch(const Batch& batch, const Upstream& from,
                                  const Gradients& to) const {
  const SequenceRows& of = batch.of;
  const int64_t U = of.U, parts = (U + PART - 1) / PART, M = padded(batch.rows * group);
  const int64_t count = static_cast<int64_t>(of.rows.size()), b = batch.b, heads = batch.heads;
  const int64_t k_size = U * padded(D), v_size = U * padded(Dv);
  const double work = 2.0 * U * M * (D + Dv) * heads;
  const int workers = threads(heads * std::max(parts, M / LANES), work);
  const int64_t share = backward_scratch(U);
  const Buffer<float> scratch(workers * share);
  parallel_for(heads * parts, workers, [&](int64_t item, int) {
    const int64_t i = item / parts, h = batch.head + i, key = item % parts * PART;
    gather_others<X, T>(of, op.inputs.k, b, h, key, batch.k.data() + i * k_size);
    gather_others<X, T>(of, op.inputs.v, b, h, key, batch.v.data() + i * v_size);
    if (!narrow) return;
    gather_paired<X, T>(of, op.inputs.k, b, h, key, every_key, batch.k_paired.data() + i * k_size);
  });
  for (int64_t first = 0; first < count; first += batch.rows) {
    const Block block(of, first, std::min(batch.rows, count - first), group);
    parallel_for(heads * block.panels, workers, [&](int64_t item, int thread) {
      backward_panel(block, batch, item / block.panels, item % block.panels, from, to.dq,
                     scratch.data() + thread * share);
    });
    parallel_for(heads * parts, workers, [&](int64_t item, int thread) {
      const int64_t i = item / parts, key = item % parts * PART, m = i * block.panels * LANES;
      const bool last = first + block.count == count;
      const KeyGradient<T, X> gradient{products, block, b, batch.head + i, first == 0, last};
      float* const part = scratch.data() + thread * share;
      float* const dk = batch.dk.data() == nullptr ? nullptr : batch.dk.data() + i * k_size;
      float* const dv = batch.dv.data() == nullptr ? nullptr : batch.dv.data() + i * v_size;
      gradient.add(batch.ds.data() + m * U, batch.q.data() + m * padded(D), key, to.dk, dk, part);
      gradient.add(batch.p.data() + m * U, batch.dout.data() + m * padded(Dv), key, to.dv, dv,
                   part);
    });
  }
}

// p and ds of a panel into the batch, and its dq; `part` counts the batch's heads.
template <class T, class X>
void Kernel<T, X>::backward_panel(const Block& block, const Batch& batch, int64_t part,
                                  int64_t panel, const Upstream& from, const Tensor<3>& dq,
                                  float* scratch) const {
  const int64_t U = block.of.U, M = block.panels * LANES, first_head = (batch.head + part) * group;
  X* const q = reinterpret_cast<X*>(scratch);                                  // [D, LANES]
  X* const d = reinterpret_cast<X*>(scratch + panel_floats<X>(D + 1, LANES));  // [Dv, LANES]
  float* const own = scratch + panel_floats<X>(D + 1, LANES) + panel_floats<X>(Dv + 1, LANES);
  X* const p_saved = batch.p.data() + (part * M + panel * LANES) * U;               // [U, LANES]
  X* const ds_saved = batch.ds.data() + (part * M + panel * LANES) * U;             // [U, LANES]
  float* const s = narrow ? own : reinterpret_cast<float*>(p_saved);                // [U, LANES]
  float* const dp = narrow ? own + U * LANES : reinterpret_cast<float*>(ds_saved);  // [U, LANES]
  X* const ds_paired = narrow ? reinterpret_cast<X*>(own + 2 * U * LANES) : ds_saved;
  float* const gradient = own + (narrow ? 3 : 0) * U * LANES;  // [LANES, D]: dq
  const int64_t k_size = U * padded(D), v_size = U * padded(Dv);
  const X* const k = batch.k.data() + part * k_size;
  const X* const k_paired = narrow ? batch.k_paired.data() + part * k_size : k;
  const X* const v = batch.v.data() + part * v_size;
  lay_transposed<X, T>(block, op.inputs.q, first_head, panel, q);
  lay_transposed<X, T>(block, from.dout, first_head, panel, d);
  lay_paired<X, T>(block, op.inputs.q, first_head, panel, batch.q.data() + part * M * padded(D));
  lay_paired<X, T>(block, from.dout, first_head, panel, batch.dout.data() + part * M * padded(Dv));

  float shift[LANES] = {}, correction[LANES], delta[LANES], unused[LANES];
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l, h = first_head + block.head(i);
    const float norm = *from.lse.row<float>(block.row(i), h);
    shift[l] = std::isinf(norm) ? 0.0f : norm;
  }
  multiply_keys<X, T>(products, block.of, op.inputs.k, batch.b, batch.head + part, k, q, s);
  multiply_keys<X, T>(products, block.of, op.inputs.v, batch.b, batch.head + part, v, d, dp);
  isa.mask_scores(s, U, block.panel_bits(panel), op.options.scale, op.options.softcap, unused);
  isa.backward_sums(s, dp, U, shift, op.options.softcap, correction, delta);
  for (int64_t l = 0; l < LANES; ++l) {
    const int64_t i = panel * LANES + l;
    if (i >= block.m || correction[l] == 0.0f) {  // an empty lane, or a row that sees no key
      correction[l] = delta[l] = 0.0f;
      continue;
    }
    correction[l] = 1.0f / correction[l];
    delta[l] =
        delta[l] * correction[l] - *from.dlse.row<float>(block.row(i), first_head + block.head(i));
  }
  isa.softmax_backward(s, dp, U, shift, correction, delta, op.options.scale, op.options.softcap);
  if (narrow) {
    isa.narrow(s, U, reinterpret_cast<uint32_t*>(p_saved), nullptr);
    isa.narrow(dp, U, reinterpret_cast<uint32_t*>(ds_saved),
               reinterpret_cast<uint32_t*>(ds_paired));
  }
  products.transposed(LANES, padded(D), U, {ds_paired, U}, {k_paired, U}, {gradient, LANES});
  for (int64_t l = 0; l < LANES && panel * LANES + l < block.m; ++l) {
    const int64_t i = panel * LANES + l;
    get_row(gradient, D, LANES, l, 1.0f, dq.row<T>(block.row(i), first_head + block.head(i)));
  }
}

}  // namespace

void side_attention_forward(const SideAttention& op, const SideAttention::Results& to) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.forward(to); });
}

void side_attention_backward(const SideAttention& op, const SideAttention::Upstream& from,
                             const SideAttention::Gradients& to) {
  dispatch<Kernel>(op, [&](const auto& kernel) { kernel.backward(from, to); });
}

}  // namespace groundkern
