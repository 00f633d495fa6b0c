// What side_attention and attention_map share around their products: gathering the keys of a batch
// of key heads, packing rows into lanes, and the gradient of the keys.
#pragma once

#include "panels.h"

namespace groundkern {

constexpr int64_t PART = 64;         // keys of a task that gathers them or computes their gradient
constexpr int64_t SCORES = 1 << 21;  // scores of a block of rows: 8 MiB in fp32
constexpr int64_t BATCH = 1 << 22;   // elements of a batch of heads: 16 MiB in fp32

// The number of heads in a batch: as many as fit BATCH, but enough to give every thread work.
inline int64_t heads_at_a_time(int64_t per_head, int64_t items_per_head, int64_t heads,
                               int threads) {
  const int64_t fitting = BATCH / std::max<int64_t>(per_head, 1);
  const int64_t busy = (threads + items_per_head - 1) / std::max<int64_t>(items_per_head, 1);
  return std::min(heads, std::max<int64_t>(1, std::max(fitting, busy)));
}

// x [B, H, S, width] of the used keys [from, from + PART) of one sequence and head, into plain or
// paired panels [U, width]. Padding keys, and those for which wanted(u) is false, are zeros.
template <class X, class T, class Wanted>
void gather_plain(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from,
                  const Wanted& wanted, X* panels) {
  const int64_t count = static_cast<int64_t>(of.keys.size());
  for (int64_t u = from; u < std::min(from + PART, of.U); ++u) {
    const bool read = u < count && wanted(u);
    const T* const row = read ? x.template row<T>(b, h, int64_t{of.keys[u]}) : nullptr;
    put_plain(row, x.size[3], of.U, u, panels);
  }
}

template <class X, class T, class Wanted>
void gather_paired(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from,
                   const Wanted& wanted, X* panels) {
  const int64_t count = static_cast<int64_t>(of.keys.size());
  const auto row = [&](int64_t u) -> const T* {
    return u < count && wanted(u) ? x.template row<T>(b, h, int64_t{of.keys[u]}) : nullptr;
  };
  for (int64_t u = from; u < std::min(from + PART, of.U); u += 2) {
    put_paired(row(u), row(u + 1), x.size[3], of.U, u, panels);
  }
}

inline bool every_key(int64_t) { return true; }

// The used keys [from, from + PART) of x [B, H, S, width], if they lie next to each other and a
// product can read them where they are; else null. In fp32 always null: reading rows is slower than
// panels there, and the backward needs the copy.
template <class X, class T>
const X* in_place(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from) {
  if constexpr (std::is_same_v<X, T> && sizeof(X) == 2) {
    const int64_t last = from + PART - 1, width = x.size[3];
    const bool whole = last < static_cast<int64_t>(of.keys.size());
    if (whole && of.keys[last] - of.keys[from] == PART - 1 && width % Products<X>::PER_UNIT == 0) {
      return x.template row<T>(b, h, int64_t{of.keys[from]});
    }
  }
  return nullptr;
}

// gather_plain of the keys that multiply_keys does not read in place.
template <class X, class T>
void gather_others(const SequenceRows& of, const Tensor<4>& x, int64_t b, int64_t h, int64_t from,
                   X* panels) {
  if (in_place<X, T>(of, x, b, h, from) != nullptr) return;
  gather_plain<X, T>(of, x, b, h, from, every_key, panels);
}

// C [U, LANES] = the used keys of x, in place or gathered by gather_others, times
// rows [width, LANES].
template <class X, class T>
void multiply_keys(const Products<X>& products, const SequenceRows& of, const Tensor<4>& x,
                   int64_t b, int64_t h, const X* gathered, const X* rows, float* C) {
  const int64_t width = x.size[3];
  for (int64_t from = 0; from < of.U; from += PART) {
    const int64_t M = std::min(PART, of.U - from);
    const Panels<float> to{C + from * LANES, of.U};
    const X* const keys = in_place<X, T>(of, x, b, h, from);
    if (keys != nullptr) {
      products.rows(M, LANES, width, keys, x.stride[2], {rows, width}, to);
    } else {
      products.plain(M, LANES, width, {gathered + from * LANES, of.U}, {rows, width}, to, false);
    }
  }
}

// One panel of x [N, Hq, width], of a block's rows and one group of heads: lay_transposed packs it
// as its transpose [width, LANES], lay_paired as its part of the paired panels [m, width]. Rows
// that use no key are zeros, because a NaN in them would spread through sums over rows.
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

// Sets dx [B, H, S, width] to zero at the keys of [from, from + PART) that no row uses.
template <class T>
void zero_unused(const std::vector<uint32_t>& any, const Tensor<4>& dx, int64_t b, int64_t h,
                 int64_t from) {
  for (int64_t j = from; j < std::min(from + PART, dx.size[2]); ++j) {
    if ((any[j / 32] >> (j % 32)) & 1) continue;
    std::memset(static_cast<void*>(dx.template row<T>(b, h, j)), 0, dx.size[3] * sizeof(T));
  }
}

// The gradient of the used keys of one head, a part at a time: dx = ds x, summed over the blocks of
// rows and rounded with the last block.
template <class T, class X>
struct KeyGradient {
  const Products<X>& products;
  const Block& block;
  int64_t b, h;      // sequence and key head
  bool first, last;  // whether this is the first and the last block of rows

  // ds [U, m] plain, rows [m, width] paired, dx [B, Hkv, S, width]. `sum` [U, width] holds the sum
  // over blocks if there are several; with one block it is null, and `scratch` [PART, width] is
  // used.
  void add(const X* ds, const X* rows, int64_t from, const Tensor<4>& dx, float* sum,
           float* scratch) const {
    const SequenceRows& of = block.of;
    const int64_t M = std::min(PART, of.U - from), width = dx.size[3];
    const Panels<float> to =
        sum == nullptr ? Panels<float>{scratch, PART} : Panels<float>{sum + from * LANES, of.U};
    products.plain(M, padded(width), block.m, {ds + from * LANES, of.U}, {rows, padded(block.m)},
                   to, !first);
    const int64_t count = static_cast<int64_t>(of.keys.size());
    for (int64_t u = from; last && u < std::min(from + M, count); ++u) {
      T* const row = dx.template row<T>(b, h, int64_t{of.keys[u]});
      get_row(to.data, width, to.rows, u - from, 1.0f, row);
    }
  }
};

// Calls body(Kernel<T, X>) for the op's T, the type of its tensors, and X, the type of the
// products' operands.
template <template <class, class> class Kernel, class Op, class Body>
void dispatch(const Op& op, const Body& body) {
  const Isa& best = chosen_isa();
  if (op.inputs.dtype == Dtype::float32) {
    body(Kernel<float, float>{op, best});
  } else if (op.inputs.dtype == Dtype::float16) {
    body(Kernel<float16, float>{op, best});
  } else if (best.dots_bfloat16) {
    body(Kernel<bfloat16, bfloat16>{op, best});
  } else {
    body(Kernel<bfloat16, float>{op, best});
  }
}

}  // namespace groundkern
