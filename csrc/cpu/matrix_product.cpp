// Matrix products for linear_cross_entropy, on the panels and loops of the attention kernels.
//
// A task owns a tile of C: it packs a slice of A and of B at a time and sums in fp32 scratch. An
// element's sum runs over K in the same order whatever the tiles and threads.
#include "panels.h"

namespace groundkern {
namespace {

constexpr int64_t DEPTH = 256;  // a slice of K

template <class T>
struct Kernel {
  // In bf16 packing is dearer than imbalance: long rows of B, no more tiles than threads need.
  static constexpr bool FEW = sizeof(T) == 2;
  const MatrixProduct& op;
  const Level& level;
  const Products<T> products{level};
  int64_t rows = 512, columns = FEW ? 1024 : 256;  // a tile of C

  Kernel(const MatrixProduct& op, const Level& level) : op(op), level(level) {
    const auto tiles = [&] { return ((op.M + rows - 1) / rows) * ((op.N + columns - 1) / columns); };
    const int64_t wanted = (FEW ? 1 : 4) * op.threads;
    while (FEW && tiles() < wanted && columns > 256) columns /= 2;
    while (tiles() < wanted && rows > 64) rows /= 2;
    while (tiles() < wanted && columns > 64) columns /= 2;
  }

  void run() const {
    const int64_t down = (op.M + rows - 1) / rows, across = (op.N + columns - 1) / columns;
    const int threads = useful_threads(down * across, 1.0 * op.M * op.N * op.K, op.threads);
    const int64_t share = DEPTH * padded(rows) + DEPTH * padded(columns) +
                          rows * columns * static_cast<int64_t>(sizeof(float) / sizeof(T));
    const Buffer<T> scratch(threads * share);
    parallel_for(down * across, threads, [&](int64_t item, int thread) {
      tile(item % down * rows, item / down * columns, scratch.data() + thread * share);
    });
  }

  // Rows [m, m + rows) and columns [n, n + columns) of C.
  void tile(int64_t m, int64_t n, T* scratch) const {
    const int64_t M = std::min(rows, op.M - m), N = std::min(columns, op.N - n);
    T* const A = scratch;
    T* const B = A + DEPTH * padded(rows);
    float* const C = reinterpret_cast<float*>(B + DEPTH * padded(columns));
    for (int64_t k = 0; k < op.K || k == 0; k += DEPTH) {
      const int64_t K = std::min(DEPTH, op.K - k);
      pack_B(k, K, n, N, B);
      if (op.transposed_A) {
        pack(op.A, k, K, m, M, A);
        products.transposed(padded(M), padded(N), K, A, DEPTH, B, DEPTH, C, rows, k > 0);
      } else {
        for (int64_t i = 0; i < padded(M); ++i) {
          put_plain(i < M ? op.A.row<T>(m + i, k) : nullptr, K, rows, i, A);
        }
        products.plain(padded(M), padded(N), K, A, rows, B, DEPTH, C, rows, k > 0);
      }
    }
    for (int64_t i = 0; i < M; ++i) {
      if (op.add) {
        add_row(C, N, i, op.C.row<T>(m + i, n));
      } else {
        get_row(C, N, rows, i, 1.0f, op.C.row<T>(m + i, n));
      }
    }
  }

  void pack_B(int64_t k, int64_t K, int64_t n, int64_t N, T* B) const {
    if (!op.transposed_B) return pack(op.B, k, K, n, N, B);
    for (int64_t j = 0; j < padded(N); ++j) {
      put_transposed(j < N ? op.B.row<T>(n + j, k) : nullptr, K, j % LANES,
                     B + j / LANES * DEPTH * LANES);
    }
  }

  // x [k, k + K) x [first, first + count) into panels of DEPTH rows
  void pack(const Tensor<2>& x, int64_t k, int64_t K, int64_t first, int64_t count,
            T* panels) const {
    for (int64_t i = 0; i < K; i += 2) {
      const T* const even = x.row<T>(k + i, first);
      const T* const odd = i + 1 < K ? x.row<T>(k + i + 1, first) : nullptr;
      T* const to = panels + i * LANES;
      if (FEW && odd != nullptr && count % LANES == 0) {
        level.pair(even, odd, count / LANES, DEPTH * LANES, to);
      } else {
        put_paired(even, odd, count, DEPTH, i, panels);
      }
    }
  }

  void add_row(const float* C, int64_t width, int64_t i, T* to) const {
    for (int64_t c = 0; c < width; ++c) {
      to[c] = from_float<T>(to_float(to[c]) + C[(c / LANES * rows + i) * LANES + c % LANES]);
    }
  }
};

}  // namespace

bool has_matrix_product(Dtype dtype) {
  return dtype == Dtype::bfloat16 ? level().dots_bfloat16 : level().wide;
}

void matrix_product(const MatrixProduct& op) {
  if (op.dtype == Dtype::bfloat16) {
    Kernel<bfloat16>(op, level()).run();
  } else {
    Kernel<float>(op, level()).run();
  }
}

}  // namespace groundkern
