// Query rows and keys as the matrix products want them: of one sequence, the keys that some row
// uses, gathered into panels, and the rows with their query heads in lanes of a panel.
//
// The lanes of a key head are m = head in group * count + row, so that 32 rows fill one panel.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "level.h"

namespace groundkern {

// Memory that is not touched before it is used; cache lines do not straddle its rows.
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

// Words of a panel matrix [rows, columns] of X, both padded.
template <class X>
int64_t words(int64_t rows, int64_t columns) {
  return rows * padded(columns) * static_cast<int64_t>(sizeof(X)) / 4;
}

// The products of one level on operands of type X; sizes in elements.
template <class X>
struct Products {
  static constexpr int64_t PER_WORD = 4 / sizeof(X);
  const Level& level;

  // C [M, N] (+)= A [M, K] B [K, N], or A^T [K, M] for the transposed one; `rows` are those of the
  // panels of A and C. M may be a part of them.
  void plain(int64_t M, int64_t N, int64_t K, const X* A, int64_t rows, const X* B, int64_t B_rows,
             float* C, int64_t C_rows, bool add) const {
    multiply().panels({M, N, inner(K), word(A), rows * LANES / PER_WORD, word(B),
                       inner(B_rows) * LANES, C, C_rows * LANES, add});
  }
  void transposed(int64_t M, int64_t N, int64_t K, const X* A, int64_t A_rows, const X* B,
                  int64_t B_rows, float* C, int64_t C_rows, bool add = false) const {
    multiply().transposed({M, N, inner(K), word(A), inner(A_rows) * LANES, word(B),
                           inner(B_rows) * LANES, C, C_rows * LANES, add});
  }
  // A in rows `stride` apart; K a multiple of PER_WORD.
  void rows(int64_t M, int64_t N, int64_t K, const X* A, int64_t stride, const X* B, int64_t B_rows,
            float* C, int64_t C_rows, bool add) const {
    multiply().rows({M, N, inner(K), word(A), stride, word(B), inner(B_rows) * LANES, C,
                     C_rows * LANES, add});
  }

 private:
  const Multiply& multiply() const {
    return PER_WORD == 1 ? level.multiply : level.multiply_bfloat16;
  }
  static int64_t inner(int64_t K) { return (K + PER_WORD - 1) / PER_WORD; }
  static const uint32_t* word(const X* x) { return reinterpret_cast<const uint32_t*>(x); }
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

// A row x [width], or zeros where x is null, into row i of plain panels of `rows` rows.
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

// Rows i and i + 1 (i even) into paired panels; in fp32 that is the plain form.
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

// A row x [width], or zeros where x is null, as lane `lane` of the transpose [width, LANES], paired.
template <class X, class T>
void put_transposed(const T* x, int64_t width, int64_t lane, X* panel) {
  constexpr int64_t PER_WORD = 4 / sizeof(X);
  for (int64_t d = 0; d < (width + PER_WORD - 1) / PER_WORD * PER_WORD; ++d) {
    const X value = x != nullptr && d < width ? converted<X>(x[d]) : X{};
    panel[d / PER_WORD * PER_WORD * LANES + lane * PER_WORD + d % PER_WORD] = value;
  }
}

// Row i of fp32 panels of `rows` rows, times a factor, rounded to y [width].
template <class T>
void get_row(const float* panels, int64_t width, int64_t rows, int64_t i, float factor, T* y) {
  for (int64_t first = 0; first < width; first += LANES) {
    const float* const from = panels + (first / LANES * rows + i) * LANES;
    const int64_t count = std::min(LANES, width - first);
    for (int64_t c = 0; c < count; ++c) y[first + c] = from_float<T>(from[c] * factor);
  }
}

// The rows of one sequence that see a key, and the keys that some of them uses.
struct SequenceRows {
  std::vector<int32_t> rows;      // numbers of the rows
  std::vector<int32_t> keys;      // the used keys, ascending
  std::vector<uint32_t> any;      // [S / 32]: bit set for a used key
  std::vector<uint32_t> bits;     // [rows, tiles]: which of 32 used keys the row uses
  int64_t U = 0, tiles = 0;       // used keys, padded; U / 32

  // used(n, word): which of the keys 32 word .. 32 word + 31 row n uses.
  template <class Used>
  SequenceRows(const Rows& all, int64_t first, int64_t stop, int64_t S, const Used& used)
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
      int64_t at = 0;  // used keys before this word
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
  // The bits of x at the set bits of mask, side by side.
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

// Some rows of a sequence with the query heads of a group in lanes.
struct Block {
  const SequenceRows& of;
  int64_t first, count, group;            // rows [first, first + count) of `of`
  int64_t m = count * group, panels = padded(m) / LANES;
  std::vector<uint32_t> bits;             // [panels, tiles, LANES]
  std::vector<int32_t> lane_row;          // [panels * LANES] in the block, 0 where empty
  std::vector<uint8_t> empty;             // [count]: rows that use no key

  Block(const SequenceRows& of, int64_t first, int64_t count, int64_t group)
      : of(of), first(first), count(count), group(group), bits(panels * of.tiles * LANES, 0),
        lane_row(panels * LANES, 0), empty(count) {
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
  const uint32_t* panel_bits(int64_t panel) const {
    return bits.data() + panel * of.tiles * LANES;
  }
  // The panel's lanes are consecutive rows.
  bool straight(int64_t panel) const { return count % LANES == 0 && panel < panels; }
};

// The rows of each sequence as [first, stop) ranges: [B + 1].
inline std::vector<int64_t> sequence_ranges(const Rows& rows, int64_t B) {
  std::vector<int64_t> first(B + 1, 0);
  for (int64_t n = 0; n < rows.count; ++n) ++first[rows.sequence[n] + 1];
  for (int64_t b = 0; b < B; ++b) first[b + 1] += first[b];
  return first;
}

// Which of the keys 32 word .. 32 word + 31 row n may see.
inline uint32_t visible_word(const Rows& rows, int64_t n, int64_t word) {
  const int64_t low = std::max<int64_t>(rows.start[n] - word * 32, 0);
  const int64_t high = std::min<int64_t>(rows.stop[n] - word * 32, 32);
  if (low >= high) return 0;
  return (~uint32_t{0} >> (32 - high)) & (~uint32_t{0} << low);
}

inline uint32_t allowed_word(const Rows& rows, int64_t n, int64_t word) {
  const uint32_t visible = visible_word(rows, n, word);
  if (visible == 0 || rows.words == nullptr || rows.set_index[n] < 0) return visible;
  return visible & static_cast<uint32_t>(rows.words[rows.set_index[n] * rows.words_per_set + word]);
}

}  // namespace groundkern
