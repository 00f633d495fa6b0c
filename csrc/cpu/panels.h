// Query rows and keys of one sequence in the form that the matrix products read: the keys that some
// row uses are gathered into panels, and the rows, each with its query heads, are packed into
// lanes.
//
// Lane m of a key head is row m % count of a block and query head m / count of the group, so that
// 32 rows fill one panel.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "isa.h"

namespace groundkern {

// Uninitialised memory that starts on a cache line.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    if (count == 0) return;
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (memory == nullptr) throw std::bad_alloc();
  }
  T* data() const { return memory.get(); }

 private:
  struct Free {
    void operator()(T* x) const { std::free(x); }
  };
  std::unique_ptr<T, Free> memory;
};

// Floats that a matrix [rows, columns] of X in panels takes; the columns are padded.
template <class X>
int64_t panel_floats(int64_t rows, int64_t columns) {
  return rows * padded(columns) * static_cast<int64_t>(sizeof(X)) / 4;
}

// A matrix in panels, and the rows of each panel.
template <class X>
struct Panels {
  X* data;
  int64_t rows;
};

// The products of one ISA on operands of type X; sizes in elements.
template <class X>
struct Products {
  static constexpr int64_t PER_UNIT = 4 / sizeof(X);
  const Isa& isa;

  // C [M, N] = or += A [M, K] B [K, N]. M may be less than the rows of the panels of A and C.
  void plain(int64_t M, int64_t N, int64_t K, Panels<const X> A, Panels<const X> B, Panels<float> C,
             bool add) const {
    multiply().panels({M, N, inner(K), units(A), A.rows * LANES / PER_UNIT, units(B),
                       inner(B.rows) * LANES, C.data, C.rows * LANES, add});
  }
  // C [M, N] = or += A^T B, of A [K, M].
  void transposed(int64_t M, int64_t N, int64_t K, Panels<const X> A, Panels<const X> B,
                  Panels<float> C, bool add = false, const Ahead& ahead = {}) const {
    multiply().transposed({M, N, inner(K), units(A), inner(A.rows) * LANES, units(B),
                           inner(B.rows) * LANES, C.data, C.rows * LANES, add, ahead});
  }
  // C [M, N] = A B, of A in rows that lie `stride` apart; K is a multiple of PER_UNIT.
  void rows(int64_t M, int64_t N, int64_t K, const X* A, int64_t stride, Panels<const X> B,
            Panels<float> C) const {
    multiply().rows({M, N, inner(K), units({A, 0}), stride, units(B), inner(B.rows) * LANES, C.data,
                     C.rows * LANES, false});
  }

 private:
  const Multiply& multiply() const { return PER_UNIT == 1 ? isa.multiply : isa.multiply_bfloat16; }
  static int64_t inner(int64_t K) { return (K + PER_UNIT - 1) / PER_UNIT; }
  static const uint32_t* units(Panels<const X> x) {
    return reinterpret_cast<const uint32_t*>(x.data);
  }
};

template <class X, class T>
GROUNDKERN_INLINE X converted(T x) {
  if constexpr (std::is_same_v<X, T>) {
    return x;
  } else {
    static_assert(std::is_same_v<X, float>);
    return to_float(x);
  }
}

// Stores a row x [width], or zeros if x is null, as row i of plain panels of `rows` rows.
template <class X, class T>
void put_plain(const T* x, int64_t width, int64_t rows, int64_t i, X* panels) {
  for (int64_t first = 0; first < width; first += LANES) {
    X* const to = panels + (first / LANES * rows + i) * LANES;
    const int64_t count = x == nullptr ? 0 : std::min(LANES, width - first);
    if (count == LANES) {
      for (int64_t c = 0; c < LANES; ++c) to[c] = converted<X>(x[first + c]);
      continue;
    }
    for (int64_t c = 0; c < count; ++c) to[c] = converted<X>(x[first + c]);
    for (int64_t c = count; c < LANES; ++c) to[c] = X{};
  }
}

// Stores two rows [width], or zeros if null, as rows i and i + 1 of paired panels, i even; in fp32
// these are plain panels.
template <class X, class T>
void put_paired(const T* even, const T* odd, int64_t width, int64_t rows, int64_t i, X* panels) {
  if constexpr (std::is_same_v<X, float>) {
    put_plain(even, width, rows, i, panels);
    put_plain(odd, width, rows, i + 1, panels);
  } else {
    for (int64_t first = 0; first < width; first += LANES) {
      X* const to = panels + (first / LANES * rows + i) * LANES;
      const int64_t count = std::min(LANES, width - first);
      if (count == LANES && even != nullptr && odd != nullptr) {
        for (int64_t c = 0; c < LANES; ++c) {
          to[2 * c] = even[first + c];
          to[2 * c + 1] = odd[first + c];
        }
        continue;
      }
      for (int64_t c = 0; c < LANES; ++c) {
        to[2 * c] = even != nullptr && c < count ? even[first + c] : X{};
        to[2 * c + 1] = odd != nullptr && c < count ? odd[first + c] : X{};
      }
    }
  }
}

// Stores a row x [width], or zeros if x is null, as lane `lane` of the transpose [width, LANES],
// paired.
template <class X, class T>
void put_transposed(const T* x, int64_t width, int64_t lane, X* panel) {
  constexpr int64_t PER_UNIT = 4 / sizeof(X);
  for (int64_t d = 0; d < (width + PER_UNIT - 1) / PER_UNIT * PER_UNIT; ++d) {
    const X value = x != nullptr && d < width ? converted<X>(x[d]) : X{};
    panel[d / PER_UNIT * PER_UNIT * LANES + lane * PER_UNIT + d % PER_UNIT] = value;
  }
}

// y [width] = row i of fp32 panels of `rows` rows, times a factor.
template <class T>
void get_row(const float* panels, int64_t width, int64_t rows, int64_t i, float factor, T* y) {
  for (int64_t first = 0; first < width; first += LANES) {
    const float* const from = panels + (first / LANES * rows + i) * LANES;
    const int64_t count = std::min(LANES, width - first);
    for (int64_t c = 0; c < count; ++c) y[first + c] = from_float<T>(from[c] * factor);
  }
}

// The rows of one sequence that see a key, and the used keys: those that at least one row uses.
struct SequenceRows {
  std::vector<int32_t> rows;   // numbers of the rows
  std::vector<int32_t> keys;   // the used keys, ascending
  std::vector<uint32_t> any;   // [masks]: mask bits of the used keys, over all S keys
  std::vector<uint32_t> bits;  // [rows, tiles]: mask bits of the row's keys, over the used keys
  int64_t U = 0, tiles = 0;    // number of used keys, padded; U / 32

  // For the rows [first, stop). used(n, i): the mask bits of keys 32 i to 32 i + 31 for row n.
  template <class Used>
  SequenceRows(const Selection& all, int64_t first, int64_t stop, int64_t S, const Used& used)
      : any((S + 31) / 32, 0) {
    for (int64_t n = first; n < stop; ++n) {
      if (all.start[n] < all.stop[n]) rows.push_back(static_cast<int32_t>(n));
    }
    const int64_t count = static_cast<int64_t>(any.size());
    for (const int32_t n : rows) {
      for (int64_t w = all.start[n] / 32; w * 32 < all.stop[n]; ++w) any[w] |= used(n, w);
    }
    for (int64_t w = 0; w < count; ++w) {
      for (uint32_t left = any[w]; left != 0; left &= left - 1) {
        keys.push_back(static_cast<int32_t>(w * 32 + __builtin_ctz(left)));
      }
    }
    U = padded(static_cast<int64_t>(keys.size()));
    tiles = U / 32;
    bits.assign(rows.size() * tiles, 0);
    for (std::size_t r = 0; r < rows.size(); ++r) {
      int64_t at = 0;  // used keys before mask w
      uint32_t* const to = bits.data() + r * tiles;
      for (int64_t w = 0; w < count; ++w) {
        if (any[w] == 0) continue;
        const uint64_t some = gathered(used(rows[r], w), any[w]);
        to[at / 32] |= static_cast<uint32_t>(some << (at % 32));
        const uint32_t rest = static_cast<uint32_t>(some >> 1 >> (31 - at % 32));
        if (rest != 0) to[at / 32 + 1] |= rest;
        at += __builtin_popcount(any[w]);
      }
    }
  }

  bool sees_none(int64_t r) const {
    const auto first = bits.begin() + r * tiles;
    return std::all_of(first, first + tiles, [](uint32_t x) { return x == 0; });
  }

 private:
  // The bits of x at the set bits of mask, moved next to each other (PEXT).
  static uint32_t gathered(uint32_t x, uint32_t mask) {
    x &= mask;
    if (mask == ~uint32_t{0} || x == 0) return x;
    if (x == mask) return ~uint32_t{0} >> (32 - __builtin_popcount(mask));
    uint32_t result = 0;
    for (int at = 0; mask != 0; mask &= mask - 1, ++at) {
      result |= ((x >> __builtin_ctz(mask)) & 1) << at;
    }
    return result;
  }
};

// Some rows of a sequence, with the query heads of a group, in lanes.
struct Block {
  const SequenceRows& of;
  int64_t first, count, group;                            // rows [first, first + count) of `of`
  int64_t m = count * group, panels = padded(m) / LANES;  // lanes in use; panels that hold them
  std::vector<uint32_t> bits;                             // [panels, tiles, LANES]: mask bits
  std::vector<int32_t> lane_row;  // [panels * LANES]: the lane's row in the block, 0 in empty lanes
  std::vector<uint8_t> empty;     // [count]: whether the row uses no key

  Block(const SequenceRows& of, int64_t first, int64_t count, int64_t group)
      : of(of),
        first(first),
        count(count),
        group(group),
        bits(panels * of.tiles * LANES, 0),
        lane_row(panels * LANES, 0),
        empty(count) {
    for (int64_t r = 0; r < count; ++r) empty[r] = of.sees_none(first + r);
    for (int64_t i = 0; i < m; ++i) {
      lane_row[i] = static_cast<int32_t>(i % count);
      const uint32_t* const from = of.bits.data() + (first + i % count) * of.tiles;
      uint32_t* const to = bits.data() + i / LANES * of.tiles * LANES + i % LANES;
      for (int64_t t = 0; t < of.tiles; ++t) to[t * LANES] = from[t];
    }
  }

  int64_t row(int64_t i) const { return of.rows[first + i % count]; }
  int64_t head(int64_t i) const { return i / count; }  // in the group
  const uint32_t* panel_bits(int64_t panel) const { return bits.data() + panel * of.tiles * LANES; }
  // Whether the panel's lanes are consecutive rows.
  bool straight(int64_t panel) const { return count % LANES == 0 && panel < panels; }
};

// [B + 1]: sequence b has the rows from ranges[b] to ranges[b + 1].
inline std::vector<int64_t> sequence_ranges(const Selection& selection, int64_t B) {
  std::vector<int64_t> first(B + 1, 0);
  for (int64_t n = 0; n < selection.rows; ++n) ++first[selection.sequence[n] + 1];
  for (int64_t b = 0; b < B; ++b) first[b + 1] += first[b];
  return first;
}

// Mask bits of the keys 32 i to 32 i + 31 that row n may see.
inline uint32_t visible_bits(const Selection& selection, int64_t n, int64_t i) {
  const int64_t low = std::max<int64_t>(selection.start[n] - i * 32, 0);
  const int64_t high = std::min<int64_t>(selection.stop[n] - i * 32, 32);
  if (low >= high) return 0;
  return (~uint32_t{0} >> (32 - high)) & (~uint32_t{0} << low);
}

// The same, and of these only keys in the row's set.
inline uint32_t allowed_bits(const Selection& selection, int64_t n, int64_t i) {
  const uint32_t visible = visible_bits(selection, n, i);
  if (visible == 0 || selection.bits == nullptr || selection.set_index[n] < 0) return visible;
  const int64_t at = selection.set_index[n] * selection.masks + i;
  return visible & static_cast<uint32_t>(selection.bits[at]);
}

}  // namespace groundkern
