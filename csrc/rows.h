// What kernels over query rows share: element types, the parallel loop with its grain, the blocks
// of rows, the keys a row may see, and the online softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "ops.h"

// One clone per x86-64 level; elsewhere the baseline already has its vector unit (aarch64: NEON).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Inlined into its caller, and so compiled for the caller's instruction set.
#define GROUNDKERN_INLINE __attribute__((always_inline)) inline

namespace groundkern {

// Element types are for storage only; arithmetic is fp32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

GROUNDKERN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

GROUNDKERN_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

GROUNDKERN_INLINE float to_float(float x) { return x; }
GROUNDKERN_INLINE float to_float(bfloat16 x) {
  return float_of(static_cast<uint32_t>(x.bits) << 16);
}
GROUNDKERN_INLINE float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t shifted = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float normal = float_of(shifted + (112u << 23));
  const float subnormal = float_of(shifted + (113u << 23)) - 0x1p-14f;
  const float finite = shifted < (1u << 23) ? subnormal : normal;
  return float_of(sign | (shifted >= (31u << 23) ? shifted | 0x7f800000u : bits_of(finite)));
}

// Round to nearest even, as torch does.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <>
inline float16 from_float<float16>(float x) {
  const uint16_t sign = static_cast<uint16_t>((bits_of(x) >> 16) & 0x8000);
  const uint32_t bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= (143u << 23)) return {static_cast<uint16_t>(sign | 0x7c00)};  // >= 65536
  if (bits < (113u << 23)) {  // subnormal: adding 1/2 leaves the rounded value in the low bits
    return {static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)))};
  }
  const uint32_t rounded = bits - (112u << 23) + 0xfff + ((bits >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

constexpr double GRAIN = 1 << 20;  // multiply-adds that pay for waking one thread

// The threads a loop of this much work may use.
inline int useful_threads(int64_t count, double work, int threads) {
  const double by_work = std::min(work / GRAIN, static_cast<double>(count));
  return std::max(1, static_cast<int>(std::min(by_work, static_cast<double>(threads))));
}

// body(item, thread) for every item; serial with one thread. Bodies must not throw: what they need
// is allocated before, one share for each of useful_threads().
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t item = 0; item < count; ++item) body(item, omp_get_thread_num());
    return;
  }
#endif
  (void)threads;
  for (int64_t item = 0; item < count; ++item) body(item, 0);
}

constexpr int64_t KEYS = 64;  // keys in a tile: one bit each in a uint64_t

// The keys of the tile [first, first + KEYS) that row n may see.
inline uint64_t visible_keys(const Rows& rows, int64_t n, int64_t first) {
  const int64_t low = std::max<int64_t>(rows.start[n] - first, 0);
  const int64_t high = std::min<int64_t>(rows.stop[n] - first, KEYS);
  if (low >= high) return 0;
  uint64_t keys = (~uint64_t{0} >> (KEYS - high)) & (~uint64_t{0} << low);
  if (rows.words != nullptr && rows.set_index[n] >= 0) {
    const int32_t* set = rows.words + rows.set_index[n] * rows.words_per_set;
    const int64_t word = first / 32;
    uint64_t allowed = static_cast<uint32_t>(set[word]);
    if (word + 1 < rows.words_per_set) {
      allowed |= static_cast<uint64_t>(static_cast<uint32_t>(set[word + 1])) << 32;
    }
    keys &= allowed;
  }
  return keys;
}

// Rows of one sequence that are worked on together: index[0 .. count) are their numbers.
struct Block {
  int64_t sequence;
  const int32_t* index;
  int64_t count;
  int64_t start;  // the keys that any of them sees lie in [start, stop)
  int64_t stop;
};

// All rows that see a key, in blocks of at most `limit`. Rows without keys are in no block.
struct Blocks {
  std::vector<int32_t> index;
  std::vector<Block> blocks;
  std::vector<int64_t> first;  // [B + 1]: the blocks of sequence b are first[b] .. first[b + 1]

  Blocks(const Rows& rows, int64_t sequences, int64_t limit) : first(sequences + 1, 0) {
    index.reserve(rows.count);  // Block::index points into it
    for (int64_t n = 0; n < rows.count; ++n) {
      if (rows.start[n] >= rows.stop[n]) continue;
      index.push_back(static_cast<int32_t>(n));
      const int64_t sequence = rows.sequence[n];
      if (blocks.empty() || blocks.back().sequence != sequence || blocks.back().count == limit) {
        blocks.push_back({sequence, &index.back(), 0, rows.start[n], rows.stop[n]});
        ++first[sequence + 1];
      }
      Block& block = blocks.back();
      ++block.count;
      block.start = std::min<int64_t>(block.start, rows.start[n]);
      block.stop = std::max<int64_t>(block.stop, rows.stop[n]);
    }
    for (int64_t b = 0; b < sequences; ++b) first[b + 1] += first[b];
  }
};

// exp(x) to 1 ulp for x <= 88, 0 below -87; branch-free, so that loops over it vectorise.
GROUNDKERN_INLINE float exponential(float x) {
  const float bounded = x > 88.0f ? 88.0f : x;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer in the low mantissa bits
  const float shifted = bounded * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float result = p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : result;
}

// Running maximum and sum of one row's softmax over the tiles of its keys.
struct OnlineSoftmax {
  float maximum = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;

  // Takes in one tile: scores [KEYS] become exp(score - maximum), 0 where not in keys (not 0).
  // Returns the factor that what was summed so far must be multiplied by.
  GROUNDKERN_INLINE float add_tile(float* scores, uint64_t keys) {
    float lanes[KEYS];
    float tile_maximum = maximum;
    for (int64_t j = 0; j < KEYS; ++j) {
      lanes[j] = (keys >> j) & 1 ? scores[j] : -std::numeric_limits<float>::infinity();
    }
#pragma omp simd reduction(max : tile_maximum)
    for (int64_t j = 0; j < KEYS; ++j) tile_maximum = std::max(tile_maximum, lanes[j]);
    float tile_sum = 0.0f;
#pragma omp simd reduction(+ : tile_sum)
    for (int64_t j = 0; j < KEYS; ++j) {
      scores[j] = exponential(lanes[j] - tile_maximum);
      tile_sum += scores[j];
    }
    const float factor = exponential(maximum - tile_maximum);
    maximum = tile_maximum;
    sum = sum * factor + tile_sum;
    return factor;
  }

  float log_sum_exp() const { return sum == 0.0f ? maximum : maximum + std::log(sum); }
};

}  // namespace groundkern
