// What the ops of csrc look like from outside: plain structs over raw memory, no Python, no torch.
//
// Letters are those of the equations: N rows, B sequences, S keys, Hq query heads, Hkv key heads,
// D and Dv the head dimensions of k and v, G key sets or label bags, V words. Strides count elements.
#pragma once

#include <cstdint>

namespace groundkern {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, int32 = 3, int64 = 4 };

template <int Rank>
struct Tensor {
  void* data;
  int64_t size[Rank];
  int64_t stride[Rank];

  // The row of the last dimension at the given leading indices; typed by the caller.
  template <class T, class... Index>
  T* row(Index... index) const {
    const int64_t indices[] = {index...};
    int64_t offset = 0;
    for (int i = 0; i < static_cast<int>(sizeof...(index)); ++i) offset += indices[i] * stride[i];
    return static_cast<T*>(data) + offset;
  }
};

// Query rows and the keys they may see; rows are sorted by sequence.
struct Rows {
  int64_t count;            // N
  const int32_t* sequence;  // [N]
  const int32_t* start;     // [N]
  const int32_t* stop;      // [N]: row n sees the keys start[n] <= j < stop[n] ...
  const int32_t* words;     // [G, ceil(S / 32)] or null: ... whose bit j % 32 of word j / 32 is set
  int64_t words_per_set;
  const int32_t* set_index;  // [N], -1 for no set; null exactly where words is
};

struct SideAttention {
  Dtype dtype;  // of q, k, v, out and their gradients
  Tensor<3> q;  // [N, Hq, D]
  Tensor<4> k;  // [B, Hkv, S, D]
  Tensor<4> v;  // [B, Hkv, S, Dv]
  Rows rows;
  float scale;
  float softcap;  // 0: none
  int threads;
};

// out [N, Hq, Dv], lse [N, Hq] fp32. A row with no allowed key: out 0, lse -inf.
void side_attention_forward(const SideAttention& op, const Tensor<3>& out, const Tensor<2>& lse);

// dq [N, Hq, D], dk [B, Hkv, S, D], dv [B, Hkv, S, Dv]; every element is written, keys that no row
// sees with zeros. The same bits on every run and for every number of threads.
void side_attention_backward(const SideAttention& op, const Tensor<3>& dout, const Tensor<2>& dlse,
                             const Tensor<2>& lse, const Tensor<3>& dq, const Tensor<4>& dk,
                             const Tensor<4>& dv);

// What the [N, C] map of log p [N, Hq, C] is, and with a target which KL to it.
enum class MapKind : int { attention = 0, contribution = 1, kl_mean = 2, kl_each = 3 };

struct AttentionMap {
  MapKind kind;
  Dtype dtype;              // of q, k, v, g and their gradients
  Tensor<3> q;              // [N, Hq, D]
  Tensor<4> k;              // [B, Hkv, S, D]
  Tensor<4> v;              // [B, Hkv, S, Dv], contribution only
  Tensor<3> g;              // [N, Hq, Dv], contribution only
  Tensor<2> head_weight;    // [N, Hq] fp32, all but contribution
  Tensor<2> target;         // [N, C] fp32, kl only
  const int32_t* columns;   // [B, C] ascending, -1 for padding
  int64_t column_count;     // C
  Rows rows;
  Tensor<2> lse;            // [N, Hq] fp32, or no data
  bool over_columns;        // else over all visible keys
  bool rectify;
  float scale;
  float softcap;  // 0: none
  int threads;
};

// out: [N, C] fp32, or [N] (stride 1) for kl.
void attention_map_forward(const AttentionMap& op, float* out);

// upstream: as out. dv, dg: contribution only; dhead_weight [N, Hq] fp32: all but contribution.
// Every element is written. The same bits on every run and for every number of threads.
void attention_map_backward(const AttentionMap& op, const float* upstream, const Tensor<3>& dq,
                            const Tensor<4>& dk, const Tensor<4>& dv, const Tensor<3>& dg,
                            const Tensor<2>& dhead_weight);

// A chunk of counted rows, after the matrix product.
struct LinearCrossEntropy {
  Dtype dtype;             // of logits: float32 or bfloat16
  Tensor<2> logits;        // [N, V], before the softcap
  const int64_t* target;   // [N], in [0, V)
  const int64_t* ids;      // [T] labels in [0, V); null: no bags
  const int64_t* offsets;  // [G + 1]: bag g is ids[offsets[g] .. offsets[g + 1])
  const int64_t* index;    // [N] from row to bag, -1 for none
  int64_t longest;         // labels in the longest bag
  float smoothing;
  float softcap;  // 0: none
  int threads;
};

// All [N]. Upstream gradients may be null (then 0); with any of them the logits become their
// gradient.
struct CrossEntropyRows {
  float* loss;
  float* log_prob;
  float* lse;
  int64_t* predicted;
  const float* dloss;
  const float* dlog_prob;
  const float* dlse;
};

void linear_cross_entropy(const LinearCrossEntropy& op, const CrossEntropyRows& rows);

// C = A B, A B^T or A^T B, summed in fp32.
struct MatrixProduct {
  Dtype dtype;                      // float32, or bfloat16 where has_matrix_product(bfloat16)
  bool transposed_A, transposed_B;  // not both
  int64_t M, N, K;                  // C [M, N], K summed over
  Tensor<2> A;                      // [M, K], transposed [K, M]
  Tensor<2> B;                      // [K, N], transposed [N, K]
  Tensor<2> C;
  bool add;  // to C
  int threads;
};

// The same bits for every number of threads.
void matrix_product(const MatrixProduct& op);

// Whether its loops were compiled for the vectors of this CPU: else another library's are faster.
bool has_matrix_product(Dtype dtype);

}  // namespace groundkern
