// What the CPU kernels share: element types, the parallel loop with its grain, exp and tanh.
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

#include "../ops.h"

// Inlined into the caller and therefore compiled for the caller's instruction set.
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

constexpr double GRAIN = 1 << 20;  // multiply-adds that are worth waking one thread
constexpr double COPY = 32;        // multiply-adds that take as long as an element's copy

// The number of threads for a loop of `count` items that together take `work` multiply-adds.
inline int useful_threads(int64_t count, double work, int threads) {
  const double by_work = std::min(work / GRAIN, static_cast<double>(count));
  return std::max(1, static_cast<int>(std::min(by_work, static_cast<double>(threads))));
}

// Calls body(item, thread) for every item; serial with one thread. Bodies must not throw, so their
// memory is allocated before, one share for each of useful_threads().
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

// exp(x) to 1 ulp for x <= 88, 0 below -87. Without branches, so that loops over it vectorise.
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

// tanh to 2 ulp (Cephes), without branches.
GROUNDKERN_INLINE float hyperbolic_tangent(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? near : (x < 0.0f ? -far : far);
}

}  // namespace groundkern
