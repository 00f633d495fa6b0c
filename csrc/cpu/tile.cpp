#include "tile.h"

namespace groundkern {
namespace {

// C [ROWS, LANES] += A [ROWS, K] B [K, LANES]; the sums stay in registers. They start at zero and
// meet C at the end: a long sum over tiles rounds like a sum of tile sums.
template <int ROWS>
GROUNDKERN_INLINE void panel(int64_t K, const float* __restrict__ A, int64_t row_stride,
                             int64_t column_stride, const float* __restrict__ B, int64_t ldb,
                             float* __restrict__ C, int64_t ldc) {
  // Loops over lanes are kept rolled: the compiler turns a rolled one into one vector instruction.
  float sums[ROWS][LANES] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const float a = A[i * row_stride + k * column_stride];
#pragma GCC unroll 1
      for (int j = 0; j < LANES; ++j) sums[i][j] += a * B[k * ldb + j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 1
    for (int j = 0; j < LANES; ++j) C[i * ldc + j] += sums[i][j];
  }
}

}  // namespace

CLONES void multiply_add(int64_t M, int64_t N, int64_t K, const float* A, int64_t row_stride,
                         int64_t column_stride, const float* B, int64_t ldb, float* C,
                         int64_t ldc) {
  for (int64_t n = 0; n < N; n += LANES) {
    int64_t m = 0;
    for (; m + 6 <= M; m += 6) {
      panel<6>(K, A + m * row_stride, row_stride, column_stride, B + n, ldb, C + m * ldc + n, ldc);
    }
    for (; m + 2 <= M; m += 2) {
      panel<2>(K, A + m * row_stride, row_stride, column_stride, B + n, ldb, C + m * ldc + n, ldc);
    }
    if (m < M) {
      panel<1>(K, A + m * row_stride, row_stride, column_stride, B + n, ldb, C + m * ldc + n, ldc);
    }
  }
}

template <class T>
CLONES void load_row(const T* x, int64_t width, float factor, float* tile) {
  for (int64_t d = 0; d < width; ++d) tile[d] = to_float(x[d]) * factor;
  for (int64_t d = width; d < padded(width); ++d) tile[d] = 0.0f;
}

template <class T>
CLONES void load_keys(const T* x, int64_t stride, int64_t width, uint64_t keys, float* tile) {
  const int64_t ld = padded(width);
  for (int64_t j = 0; j < KEYS; ++j, tile += ld) {
    int64_t d = 0;
    if ((keys >> j) & 1) {
      const T* row = x + j * stride;
      for (; d < width; ++d) tile[d] = to_float(row[d]);
    }
    for (; d < ld; ++d) tile[d] = 0.0f;
  }
}

template <class T>
CLONES void load_keys_transposed(const T* x, int64_t stride, int64_t width, uint64_t keys,
                                 float* tile) {
  for (int64_t j = 0; j < KEYS; ++j) {
    if ((keys >> j) & 1) {
      const T* row = x + j * stride;
      for (int64_t d = 0; d < width; ++d) tile[d * KEYS + j] = to_float(row[d]);
    } else {
      for (int64_t d = 0; d < width; ++d) tile[d * KEYS + j] = 0.0f;
    }
  }
}

template <class T>
CLONES void store_row(const float* tile, int64_t width, float factor, T* y) {
  for (int64_t d = 0; d < width; ++d) y[d] = from_float<T>(tile[d] * factor);
}

#define INSTANTIATE(T)                                                                     \
  template void load_row<T>(const T*, int64_t, float, float*);                             \
  template void load_keys<T>(const T*, int64_t, int64_t, uint64_t, float*);                \
  template void load_keys_transposed<T>(const T*, int64_t, int64_t, uint64_t, float*);     \
  template void store_row<T>(const float*, int64_t, float, T*);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
#undef INSTANTIATE

CLONES void scale_row(float* x, int64_t width, float factor) {
  for (int64_t d = 0; d < width; ++d) x[d] *= factor;
}

void cap_scores(float* scores, float softcap) {
  for (int64_t j = 0; j < KEYS; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
}

CLONES float add_tile(OnlineSoftmax& softmax, float* scores, uint64_t keys) {
  return softmax.add_tile(scores, keys);
}

CLONES BackwardSums backward_sums(float* scores, float* dp, uint64_t keys, float lse,
                                  float softcap) {
  const float per_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  float sum_p = 0.0f, sum_p_dp = 0.0f;
#pragma omp simd reduction(+ : sum_p, sum_p_dp)
  for (int64_t j = 0; j < KEYS; ++j) {
    const bool visible = (keys >> j) & 1;
    const float capped = scores[j] * per_softcap;
    const float slope = 1.0f - capped * capped;
    const float p = visible ? exponential(scores[j] - lse) : 0.0f;
    const float p_dp = visible ? p * dp[j] : 0.0f;
    scores[j] = visible ? p * slope : 0.0f;
    dp[j] = visible ? p_dp * slope : 0.0f;
    sum_p += p;
    sum_p_dp += p_dp;
  }
  return {sum_p, sum_p_dp};
}

CLONES void softmax_backward(float* scores, float* dp, uint64_t keys, float lse, float correction,
                             float delta, float softcap) {
  const float per_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  for (int64_t j = 0; j < KEYS; ++j) {
    const bool visible = (keys >> j) & 1;
    const float capped = scores[j] * per_softcap;
    const float p = exponential(scores[j] - lse) * correction;
    const float ds = p * (dp[j] - delta) * (1.0f - capped * capped);
    scores[j] = visible ? p : 0.0f;
    dp[j] = visible ? ds : 0.0f;
  }
}

}  // namespace groundkern
