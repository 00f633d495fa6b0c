// Query rows packed for the kernels over (row, key) pairs: the query heads of a key head stand
// beside their rows (m = row * group + head in group), and keys come in tiles of KEYS.
#pragma once

#include "tile.h"

namespace groundkern {

constexpr int64_t PACKED_ROWS = 96;  // rows x group of a block, unless the group alone is larger

// Scratch memory of one thread; `take` hands out its parts, the same for every item.
struct Scratch {
  float* next;

  float* take(int64_t count) {
    float* part = next;
    next += padded(count);
    return part;
  }
};

template <class T>
struct Packed {
  const Rows& rows;
  const float scale, softcap;
  const int64_t N, Hq, D, B, Hkv, S;
  const int64_t group = Hq / Hkv, tiles = (S + KEYS - 1) / KEYS, ldq = padded(D);
  const Blocks blocks{rows, B, std::max<int64_t>(1, PACKED_ROWS / std::max<int64_t>(group, 1))};
  const int64_t M = std::max(group, PACKED_ROWS);  // upper bound of a block's packed rows

  Packed(const Tensor<3>& q, const Tensor<4>& k, const Rows& rows, float scale, float softcap)
      : rows(rows), scale(scale), softcap(softcap), N(q.size[0]), Hq(q.size[1]), D(q.size[2]),
        B(k.size[0]), Hkv(k.size[1]), S(k.size[2]) {}

  // Multiply-adds per unit of head dimension, if no tile were skipped.
  double scores() const {
    double sum = 0.0;
    for (const Block& block : blocks.blocks) {
      sum += static_cast<double>(block.count) * (block.stop - block.start);
    }
    return sum * Hq;
  }

  // What a row of the block may see of a tile, [block.count]; returns the union.
  uint64_t masks(const Block& block, int64_t tile, std::vector<uint64_t>& keys) const {
    uint64_t any = 0;
    for (int64_t r = 0; r < block.count; ++r) {
      keys[r] = visible_keys(rows, block.index[r], tile * KEYS);
      any |= keys[r];
    }
    return any;
  }

  // tile [m, padded(width)] = factor * x of the block's rows and the key head's query heads
  void load_rows(const Tensor<3>& x, const Block& block, int64_t head, int64_t width, float factor,
                 float* tile) const {
    for (int64_t i = 0; i < block.count * group; ++i, tile += padded(width)) {
      load_row(x.row<T>(block.index[i / group], head * group + i % group), width, factor, tile);
    }
  }

  // The same, with zeros for rows that see no key: sums over rows must not meet their NaN.
  void load_rows(const Tensor<3>& x, const Block& block, int64_t head, int64_t width, float factor,
                 const std::vector<uint64_t>& keys, float* tile) const {
    load_rows(x, block, head, width, factor, tile);
    for (int64_t i = 0; i < block.count * group; ++i, tile += padded(width)) {
      if (keys[i / group] == 0) std::fill_n(tile, width, 0.0f);
    }
  }

  // s [m, KEYS] = a [m, width] . the keys of a transposed tile [width, KEYS]
  static void product(int64_t m, int64_t width, const float* a, const float* tile, float* s) {
    std::fill(s, s + m * KEYS, 0.0f);
    multiply_add(m, KEYS, width, a, padded(width), 1, tile, KEYS, s, KEYS);
  }

  void score(int64_t m, const float* q, const float* tile, float* s) const {
    product(m, D, q, tile, s);
    if (softcap > 0.0f) {
      for (int64_t i = 0; i < m; ++i) cap_scores(s + i * KEYS, softcap);
    }
  }

  T* keys_at(const Tensor<4>& x, int64_t sequence, int64_t head, int64_t tile) const {
    return x.template row<T>(sequence, head, tile * KEYS);
  }
};

}  // namespace groundkern
