// What the ops of csrc look like from outside: plain structs over raw memory, no Python, no torch.
//
// An op is one struct of inputs, selection (or labels) and options, which its forward and its
// backward share. Letters are those of the equations: N rows, B sequences, S keys, Hq query heads,
// Hkv key heads, D and Dv the head dimensions of k and v, C key columns, G key sets or label bags,
// V vocabulary entries. Strides count elements.
//
// Every kernel computes the same bits on every run and for every number of threads, and writes
// every element of its results.
#pragma once

#include <cstdint>

namespace groundkern {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, int32 = 3, int64 = 4 };

template <int Rank>
struct Tensor {
  void* data;
  int64_t size[Rank];
  int64_t stride[Rank];

  // The row of the last dimension at the given leading indices; the caller names its type.
  template <class T, class... Index>
  T* row(Index... index) const {
    const int64_t indices[] = {index...};
    int64_t offset = 0;
    for (int i = 0; i < static_cast<int>(sizeof...(index)); ++i) offset += indices[i] * stride[i];
    return static_cast<T*>(data) + offset;
  }
};

// Query rows, sorted by sequence, and the keys that each may see.
struct Selection {
  int64_t rows;             // N
  const int32_t* sequence;  // [N]
  const int32_t* start;     // [N]
  const int32_t* stop;      // [N]: row n sees the keys start[n] <= j < stop[n]
  const int32_t* bits;  // [G, masks]: of these only keys j whose bit j % 32 of mask j / 32 is set
  int64_t masks;        // ceil(S / 32)
  const int32_t* set_index;  // [N]: the key set of row n, -1 for none; null exactly when bits is
};

struct AttentionOptions {
  float scale;
  float softcap;  // 0: none
  int threads;
};

struct SideAttention {
  struct Inputs {
    Dtype dtype;  // of q, k, v, out and their gradients
    Tensor<3> q;  // [N, Hq, D]
    Tensor<4> k;  // [B, Hkv, S, D]
    Tensor<4> v;  // [B, Hkv, S, Dv]
  };
  struct Results {
    Tensor<3> out;  // [N, Hq, Dv]; 0 in a row without an allowed key
    Tensor<2> lse;  // [N, Hq] fp32; -inf in a row without an allowed key
  };
  struct Upstream {
    Tensor<3> dout;  // [N, Hq, Dv]
    Tensor<2> dlse;  // [N, Hq] fp32
    Tensor<2> lse;   // [N, Hq] fp32, as the forward wrote it
  };
  struct Gradients {
    Tensor<3> dq;  // [N, Hq, D]
    Tensor<4> dk;  // [B, Hkv, S, D]; 0 at keys that no row sees
    Tensor<4> dv;  // [B, Hkv, S, Dv]; 0 at keys that no row sees
  };

  Inputs inputs;
  Selection selection;
  AttentionOptions options;
};

void side_attention_forward(const SideAttention& op, const SideAttention::Results& to);
void side_attention_backward(const SideAttention& op, const SideAttention::Upstream& from,
                             const SideAttention::Gradients& to);

// What is computed of log p [N, Hq, C]: a map [N, C], or with a target the KL [N] of its heads'
// mean or of each head.
enum class MapKind : int { attention = 0, contribution = 1, kl_mean = 2, kl_each = 3 };

struct AttentionMap {
  struct Inputs {
    Dtype dtype;            // of q, k, v, g and their gradients
    Tensor<3> q;            // [N, Hq, D]
    Tensor<4> k;            // [B, Hkv, S, D]
    Tensor<4> v;            // [B, Hkv, S, Dv], contribution only
    Tensor<3> g;            // [N, Hq, Dv], contribution only
    Tensor<2> head_weight;  // [N, Hq] fp32, all but contribution
    Tensor<2> target;       // [N, C] fp32, KL only
    Tensor<2> lse;          // [N, Hq] fp32, or no data; not with over_columns
  };
  struct Columns {
    const int32_t* keys;  // [B, C] ascending, -1 for padding
    int64_t count;        // C
  };
  struct Options : AttentionOptions {
    MapKind kind;
    bool over_columns;  // softmax over the row's own columns; else over all keys it may see
    bool rectify;
    bool lse_grad;  // the given lse takes the normaliser's gradient, which then reaches no key
  };
  struct Gradients {
    Tensor<3> dq;            // [N, Hq, D]
    Tensor<4> dk;            // [B, Hkv, S, D]
    Tensor<4> dv;            // [B, Hkv, S, Dv], contribution only
    Tensor<3> dg;            // [N, Hq, Dv], contribution only
    Tensor<2> dhead_weight;  // [N, Hq] fp32, all but contribution
    Tensor<2> dlse;          // [N, Hq] fp32, with lse_grad
  };

  Inputs inputs;
  Selection selection;
  Columns columns;
  Options options;
};

// out: the map [N, C] or the KL [N], contiguous fp32; upstream: its gradient. Where a given lse is
// infinite, that head of that row is left out.
void attention_map_forward(const AttentionMap& op, float* out);
void attention_map_backward(const AttentionMap& op, const float* upstream,
                            const AttentionMap::Gradients& to);

constexpr int64_t ENTRIES = 128;  // vocabulary entries in a block
constexpr int64_t MOST_TOP = 32;  // likeliest entries that a row may ask for
enum RowTerm : int { TOP, TARGET_LESS_TOP, OTHERS, ENTROPY, ROW_TERMS };

// A chunk of counted rows against a head. The forward leaves exponentials in `logits`, from which,
// with tops, terms and slopes, the backward makes the gradients. Where these do not suffice, for
// the entropy's gradient and for label smoothing under a softcap, it leaves the scores z.
// Without weight the matrix products are another library's, and the forward reads its logits in
// `logits`, as [V, N padded].
struct LinearCrossEntropy {
  struct Inputs {
    Dtype dtype;  // float32 or bfloat16: of logits, hidden and weight
    int64_t N, V, D;
    Tensor<2> hidden;   // [N, D] or no data
    Tensor<2> weight;   // [V, D] or no data
    const float* bias;  // [V] or null; the forward's alone
  };
  struct Labels {
    const int64_t* target;      // [N], in [0, V)
    const float* own;           // [N]: what the target weighs; null: 1
    const int64_t* ids;         // [T] labels in [0, V); null: no lists
    const float* weights;       // [T]: what each of them weighs; null: 1
    const int64_t* offsets;     // [G + 1]: list g is ids[offsets[g] .. offsets[g + 1])
    const int64_t* index;       // [N]: the list of row n, -1 for none
    int64_t lists;              // G
    int64_t longest;            // labels in the longest list
    const float* class_weight;  // [V]: what label smoothing weighs each entry with; null: 1
  };
  struct Saved {
    void* logits;   // [V, N], both padded; null if scores are kept and the products are ours
    float* scores;  // the same, z less the block's top; may be the logits; null: not kept
    float* tops;    // [blocks, N padded]: the largest z of ENTRIES vocabulary entries
    float* terms;   // [ROW_TERMS, N padded]
    float* slopes;  // [N, longest]: dz / dlogit at the list's labels; null: 1
  };
  struct Options {
    float smoothing;  // the share of a list as a whole; 0: each of its labels weighs by itself
    float softcap;    // 0: none
    float temperature;
    float label_smoothing;
    float z_loss;
    int threads;
  };
  struct Results {
    float* loss;           // [N]
    float* log_prob;       // [N]
    float* lse;            // [N]
    float* entropy;        // [N] or null
    int64_t* predicted;    // [N]
    int64_t* top_ids;      // [N, k]; -1 after the last entry
    float* top_log_probs;  // [N, k]; -inf there
    int64_t k;             // 0: no top_ids, no top_log_probs
  };
  struct Upstream {
    const float* dloss;      // [N], null: 0
    const float* dlog_prob;  // [N], null: 0
    const float* dlse;       // [N], null: 0
    const float* dentropy;   // [N], null: 0
  };
  struct Gradients {
    void* dlogits;      // [V, N padded], may be the logits; without weight, and then nothing else
    Tensor<2> dhidden;  // [N, D]
    Tensor<2> dweight;  // [V, D] or no data
    float* dbias;       // [V] to be added to, or null
    Dtype dtype;        // of dweight: the op's, or float32
    bool add;           // to dweight, in float32
  };

  Inputs inputs;
  Labels labels;
  Saved saved;
  Options options;
};

void linear_cross_entropy_forward(const LinearCrossEntropy& op,
                                  const LinearCrossEntropy::Results& to);
void linear_cross_entropy_backward(const LinearCrossEntropy& op,
                                   const LinearCrossEntropy::Upstream& from,
                                   const LinearCrossEntropy::Gradients& to);

// Whether this CPU has vectors that our products were compiled for; without, another library's are
// faster.
bool has_matrix_product(Dtype dtype);

}  // namespace groundkern
