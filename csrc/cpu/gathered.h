// What side_attention and attention_map do alike around their products: gather the keys of a batch
// of key heads, lay rows into lanes, and give the keys their gradient.
#pragma once

#include "panels.h"

namespace groundkern {

constexpr int64_t PART = 64;            // keys that are gathered, or given a gradient, at a time
constexpr int64_t SCORES = 1 << 21;     // scores of a block of rows: 8 MiB in fp32
constexpr int64_t BATCH = 1 << 22;      // elements of a batch of heads: 16 MiB in fp32

// Heads [first, stop), so many that their share fits BATCH and every thread has work.
inline int64_t heads_at_a_time(int64_t per_head, int64_t items_per_head, int64_t heads,
                               int threads) {
  const int64_t fitting = BATCH / std::max<int64_t>(per_head, 1);
  const int64_t busy = (threads + items_per_head - 1) / std::max<int64_t>(items_per_head, 1);
  return std::min(heads, std::max<int64_t>(1, std::max(fitting, busy)));
}

// The used keys [U] of one sequence and head of x, [U, width], in the form put() writes, from key
// `from` to `from + PART`. Keys past the last are zeros, as are those that `kept` leaves out.
template <class X, class T, class Kept>
void gather_plain(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from,
                  const Kept& kept, X* panels) {
  const int64_t count = static_cast<int64_t>(of.keys.size());
  for (int64_t u = from; u < std::min(from + PART, of.U); ++u) {
    const T* const row = u < count && kept(u) ? x.template row<T>(b, h, int64_t{of.keys[u]}) : nullptr;
    put_plain(row, x.size[3], of.U, u, panels);
  }
}

template <class X, class T, class Kept>
void gather_paired(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from,
                   const Kept& kept, X* panels) {
  const int64_t count = static_cast<int64_t>(of.keys.size());
  const auto row = [&](int64_t u) -> const T* {
    return u < count && kept(u) ? x.template row<T>(b, h, int64_t{of.keys[u]}) : nullptr;
  };
  for (int64_t u = from; u < std::min(from + PART, of.U); u += 2) {
    put_paired(row(u), row(u + 1), x.size[3], of.U, u, panels);
  }
}

inline bool every_key(int64_t) { return true; }

// x [N, Hq, width] of a block's rows and one group of heads: one panel of its transpose, and the
// whole [m, width] paired. Rows that use no key are zeros: sums must not meet their NaN.
template <class X, class T>
void lay_transposed(const Block& block, const Tensor<3>& x, int64_t first_head, int64_t panel,
                    X* to) {
  for (int64_t lane = 0; lane < LANES; ++lane) {
    const int64_t i = panel * LANES + lane;
    const bool used = i < block.m && !block.empty[i % block.count];
    const T* const row =
        used ? x.template row<T>(block.row(i), first_head + block.head(i)) : nullptr;
    put_transposed(row, x.size[2], lane, to);
  }
}

template <class X, class T>
void lay_paired(const Block& block, const Tensor<3>& x, int64_t first_head, int64_t panel, X* to) {
  const auto row = [&](int64_t i) -> const T* {
    if (i >= block.m || block.empty[i % block.count]) return nullptr;
    return x.template row<T>(block.row(i), first_head + block.head(i));
  };
  for (int64_t i = panel * LANES; i < (panel + 1) * LANES; i += 2) {
    put_paired(row(i), row(i + 1), x.size[2], block.panels * LANES, i, to);
  }
}

// dx [B, H, S, width] of the keys [from, from + PART) of S that no row uses: zeros.
template <class T>
void zero_unused(const std::vector<uint32_t>& any, const Tensor<4>& dx, int64_t b, int64_t h,
                 int64_t from) {
  for (int64_t j = from; j < std::min(from + PART, dx.size[2]); ++j) {
    if ((any[j / 32] >> (j % 32)) & 1) continue;
    std::memset(static_cast<void*>(dx.template row<T>(b, h, j)), 0, dx.size[3] * sizeof(T));
  }
}

// The gradient of the used keys [from, from + PART) of one head: dx (+)= ds x, summed over the
// blocks of rows in `sum` where there are several, else in `part`; stored with the last block.
template <class T, class X>
struct KeyGradient {
  const Products<X>& products;
  const SequenceRows& of;
  bool first, last;

  void add(const X* ds, const X* rows, int64_t m, int64_t from, const Tensor<4>& dx, int64_t b,
           int64_t h, float* sum, float* part) const {
    const int64_t M = std::min(PART, of.U - from), width = dx.size[3];
    float* const to = sum == nullptr ? part : sum + from * LANES;
    const int64_t to_rows = sum == nullptr ? PART : of.U;
    products.plain(M, padded(width), m, ds + from * LANES, of.U, rows, padded(m), to, to_rows,
                   !first);
    const int64_t count = static_cast<int64_t>(of.keys.size());
    for (int64_t u = from; last && u < std::min(from + M, count); ++u) {
      get_row(to, width, to_rows, u - from, 1.0f, dx.template row<T>(b, h, int64_t{of.keys[u]}));
    }
  }
};

// body(Kernel<T, X>) for the op's T, the type of its tensors, and X, that of the products' operands.
template <template <class, class> class Kernel, class Op, class Body>
void dispatch(const Op& op, const Body& body) {
  const Level& best = level();
  if (op.dtype == Dtype::float32) {
    body(Kernel<float, float>{op, best});
  } else if (op.dtype == Dtype::float16) {
    body(Kernel<float16, float>{op, best});
  } else if (best.dots_bfloat16) {
    body(Kernel<bfloat16, bfloat16>{op, best});
  } else {
    body(Kernel<bfloat16, float>{op, best});
  }
}

}  // namespace groundkern
