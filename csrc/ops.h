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

constexpr int64_t WORDS = 128;  // of the vocabulary, in a block
enum RowTerm : int { TOP, TARGET_LESS_TOP, OTHERS, ROW_TERMS };

// A chunk of counted rows against a head. The forward leaves exponentials in `logits`, which with
// tops, terms and slopes are what the gradients are made of. Without weight the matrix products are
// another library's: the forward finds its logits there, as [V, N padded].
struct LinearCrossEntropy {
  Dtype dtype;             // float32 or bfloat16: of logits, hidden and weight
  int64_t N, V, D;
  void* logits;            // V x N, both padded
  Tensor<2> hidden;        // [N, D]
  Tensor<2> weight;        // [V, D] or no data
  const float* bias;       // [V] or null
  const int64_t* target;   // [N], in [0, V)
  const int64_t* ids;      // [T] labels in [0, V); null: no bags
  const int64_t* offsets;  // [G + 1]: bag g is ids[offsets[g] .. offsets[g + 1])
  const int64_t* index;    // [N] from row to bag, -1 for none
  int64_t bags;            // G
  int64_t longest;         // labels in the longest bag
  float* tops;             // [blocks, N padded]: the largest z of WORDS words
  float* terms;            // [ROW_TERMS, N padded]
  float* slopes;           // [N, longest]: dz / dlogit of the bag's labels; null: 1
  float smoothing;
  float softcap;  // 0: none
  int threads;
};

struct CrossEntropyResults {  // [N] each
  float* loss;
  float* log_prob;
  float* lse;
  int64_t* predicted;
};

struct CrossEntropyUpstream {  // [N] each, null: 0
  const float* loss;
  const float* log_prob;
  const float* lse;
};

struct CrossEntropyGradients {
  void* dlogits;      // without weight, and nothing else: [V, N padded], may be the logits
  Tensor<2> dhidden;  // [N, D]
  Tensor<2> dweight;  // [V, D] or no data
  float* dbias;       // [V] to be added to, or null
  Dtype dtype;        // of dweight: the op's, or float32
  bool add;           // to dweight, in float32
};

// The same bits on every run and for every number of threads, as for all of these.
void linear_cross_entropy_forward(const LinearCrossEntropy& op, const CrossEntropyResults& results);
void linear_cross_entropy_backward(const LinearCrossEntropy& op,
                                   const CrossEntropyUpstream& upstream,
                                   const CrossEntropyGradients& to);

// Whether its loops were compiled for the vectors of this CPU: else another library's are faster.
bool has_matrix_product(Dtype dtype);

}  // namespace groundkern
