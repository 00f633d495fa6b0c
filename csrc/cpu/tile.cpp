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

CLONES void raise_maximum(const float* scores, float norm, float* maximum) {
  for (int64_t j = 0; j < KEYS; ++j) maximum[j] = std::max(maximum[j], scores[j] - norm);
}

namespace {

template <MapKind KIND>
CLONES void add_head(const float* scores, const float* value, uint64_t own, float norm,
                     float weight, bool rectify, const float* maximum, float* total) {
  for (int64_t j = 0; j < KEYS; ++j) {
    const bool inside = (own >> j) & 1;
    const float log_p = scores[j] - norm;
    float share = 0.0f;
    if (KIND == MapKind::attention) share = weight * exponential(log_p);
    if (KIND == MapKind::kl_mean) share = weight * exponential(std::min(log_p - maximum[j], 80.0f));
    if (KIND == MapKind::kl_each) share = weight * log_p;
    if (KIND == MapKind::contribution) {
      share = exponential(log_p) * (rectify && value[j] < 0.0f ? 0.0f : value[j]);
    }
    total[j] += inside ? share : 0.0f;
  }
}

template <MapKind KIND>
CLONES MapSums head_gradient(float* scores, float* value, float* p, uint64_t own, uint64_t used,
                             float norm, float weight, const float* E, const float* F,
                             bool rectify, float softcap) {
  const float per_softcap = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  float shares[KEYS], weights[KEYS];
  for (int64_t j = 0; j < KEYS; ++j) {
    const bool inside = (own >> j) & 1;
    const float capped = scores[j] * per_softcap;
    const float slope = 1.0f - capped * capped;
    const float log_p = scores[j] - norm;
    const float probability = exponential(log_p);
    float a = 0.0f, dweight = 0.0f;
    if (KIND == MapKind::attention) dweight = E[j] * probability;
    if (KIND == MapKind::kl_mean) dweight = E[j] * exponential(std::min(log_p - F[j], 80.0f));
    a = weight * dweight;
    if (KIND == MapKind::kl_each) {
      a = weight * E[j];
      dweight = E[j] * (log_p - F[j]);
    }
    if (KIND == MapKind::contribution) {
      const bool off = rectify && !(value[j] > 0.0f);
      a = off ? 0.0f : E[j] * probability * value[j];
      value[j] = inside && !off ? E[j] * probability : 0.0f;
    }
    shares[j] = inside ? a : 0.0f;
    weights[j] = inside ? dweight : 0.0f;
    scores[j] = shares[j] * slope;
    p[j] = (used >> j) & 1 ? probability * slope : 0.0f;
  }
  float sum = 0.0f, weight_sum = 0.0f;
#pragma omp simd reduction(+ : sum, weight_sum)
  for (int64_t j = 0; j < KEYS; ++j) {
    sum += shares[j];
    weight_sum += weights[j];
  }
  return {sum, weight_sum};
}

}  // namespace

void add_to_map(MapKind kind, const float* scores, const float* value, uint64_t own, float norm,
                float weight, bool rectify, const float* maximum, float* total) {
  const auto add = kind == MapKind::attention      ? add_head<MapKind::attention>
                   : kind == MapKind::contribution ? add_head<MapKind::contribution>
                   : kind == MapKind::kl_mean      ? add_head<MapKind::kl_mean>
                                                   : add_head<MapKind::kl_each>;
  add(scores, value, own, norm, weight, rectify, maximum, total);
}

MapSums map_gradient(MapKind kind, float* scores, float* value, float* p, uint64_t own,
                     uint64_t used, float norm, float weight, const float* E, const float* F,
                     bool rectify, float softcap) {
  const auto differentiate = kind == MapKind::attention      ? head_gradient<MapKind::attention>
                             : kind == MapKind::contribution ? head_gradient<MapKind::contribution>
                             : kind == MapKind::kl_mean      ? head_gradient<MapKind::kl_mean>
                                                             : head_gradient<MapKind::kl_each>;
  return differentiate(scores, value, p, own, used, norm, weight, E, F, rectify, softcap);
}

}  // namespace groundkern
