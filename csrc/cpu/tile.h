// The inner loops of the CPU kernels, on fp32 tiles in scratch memory. tile.cpp compiles each for
// several instruction sets and the loader picks one, so the library runs on any CPU.
//
// A tile has KEYS keys. The leading dimension of a tile is a multiple of LANES, zero where padded.
#pragma once

#include "../rows.h"

namespace groundkern {

constexpr int64_t LANES = 16;

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// C [M, N] += A [M, K] B [K, N]; N a multiple of LANES; A by two strides, so it may be a transpose.
void multiply_add(int64_t M, int64_t N, int64_t K, const float* A, int64_t row_stride,
                  int64_t column_stride, const float* B, int64_t ldb, float* C, int64_t ldc);

// tile [padded(width)] = factor * x [width]
template <class T>
void load_row(const T* x, int64_t width, float factor, float* tile);

// tile [KEYS, padded(width)] = the rows x + j * stride with bit j of keys, zeros elsewhere. Keys
// that no row of a block sees are never read: their memory may hold anything.
template <class T>
void load_keys(const T* x, int64_t stride, int64_t width, uint64_t keys, float* tile);

// The same, transposed: tile [width, KEYS].
template <class T>
void load_keys_transposed(const T* x, int64_t stride, int64_t width, uint64_t keys, float* tile);

// y [width] = factor * tile [width], rounded to T.
template <class T>
void store_row(const float* tile, int64_t width, float factor, T* y);

// x [width] *= factor
void scale_row(float* x, int64_t width, float factor);

// scores [KEYS] -> softcap * tanh(scores / softcap)
void cap_scores(float* scores, float softcap);

// OnlineSoftmax::add_tile.
float add_tile(OnlineSoftmax& softmax, float* scores, uint64_t keys);

// One row of the softmax's backward, [KEYS], with p = exp(score - lse) and the cap's slope; 0 where
// not in keys. First sweep: scores become p slope, dp becomes p slope dp; returns what normalises
// them.
struct BackwardSums {
  float p;     // sum_j p_j
  float p_dp;  // sum_j p_j dp_j
};
BackwardSums backward_sums(float* scores, float* dp, uint64_t keys, float lse, float softcap);

// Second sweep, once they are known: scores become p = exp(score - lse) correction, dp becomes
// ds = p (dp - delta) slope.
void softmax_backward(float* scores, float* dp, uint64_t keys, float lse, float correction,
                      float delta, float softcap);

// attention_map: one row and head of a tile. log p = scores - norm, 0 probability where not in own.
// total [KEYS] takes in the head's share of the map; for kl_mean `maximum` is the largest log p.
void add_to_map(MapKind kind, const float* scores, const float* value, uint64_t own, float norm,
                float weight, bool rectify, const float* maximum, float* total);

// maximum [KEYS] = max(maximum, scores - norm)
void raise_maximum(const float* scores, float norm, float* maximum);

// The backward of one row and head of a tile, before the sum over columns is known: scores become
// a slope with a the gradient of log p, value becomes the gradient of (v . g) (contribution only),
// p becomes p slope. Returns sum_c a and the head weight's gradient. E and F [KEYS] are the row's
// factor and offset: E = upstream (attention, contribution), -upstream P (kl); F = log M (kl_mean),
// log P (kl_each).
struct MapSums {
  float a;
  float weight;
};
MapSums map_gradient(MapKind kind, float* scores, float* value, float* p, uint64_t own,
                     uint64_t used, float norm, float weight, const float* E, const float* F,
                     bool rectify, float softcap);

}  // namespace groundkern
