// The inner loops of the CPU kernels. levels.cpp compiles each for several instruction sets, and
// `level()` picks one at run time, so one build runs on any CPU.
//
// Matrices are in panels of LANES columns: of [rows, columns], element (i, j) is number
// (j / LANES * rows + i) * LANES + j % LANES, with padded columns zero. A word is four bytes: one
// fp32, or two bf16. bf16 operands come in two forms, `plain` as above, where a word holds columns
// 2i and 2i + 1 of a row, and `paired`, where it holds rows 2i and 2i + 1 of a column.
#pragma once

#include "../rows.h"

namespace groundkern {

constexpr int64_t LANES = 32;

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// C [M, N] = or += A B, or A^T B; all in panels, C in fp32. Sizes in words: K is half the inner
// dimension in bf16, where A is plain and A^T and B are paired. M and N are padded sizes.
struct Product {
  int64_t M, N, K;
  const uint32_t* A;
  int64_t A_panel;  // words from a panel to the next
  const uint32_t* B;
  int64_t B_panel;
  float* C;
  int64_t C_panel;
  bool add;
};

// What a panel of lanes (packed query rows) has per lane.
struct Lanes {
  const float* norm;    // [LANES]
  const float* weight;  // [LANES] of the head
  const int32_t* row;   // [LANES] in the block, any row where the lane is empty
  bool straight;        // row is row[0] + lane
};

// The gradient rows of a panel: for every key the row's factors at [key * stride + row].
struct RowFactors {
  const float* E;
  const float* F;
  int64_t stride;
};

constexpr int64_t WORDS = 512;  // logits of a row that are taken at a time

// linear_cross_entropy: of one row of logits [V], with z = softcap(logits).
struct RowSums {
  float top;      // the largest z
  int64_t word;   // the first that has it
  double others;  // sum of exp(z - top) over the words but the target
};

// What a row's gradient is made of: of block b of WORDS words, value exp(z - top [b]) times the
// cap's slope, with 0 at the target. Room for whole blocks.
struct RowTerms {
  float* value;  // null: not wanted
  float* top;
};

template <class T>
struct Words {
  RowSums (*sums)(const T* logits, int64_t V, float softcap, int64_t target,
                  const RowTerms& terms);
  // logits = factor exp(z - top), times the cap's slope
  void (*store)(const RowTerms& terms, int64_t V, float top, float factor, T* logits);
};

struct Level {
  const char* name;
  bool dots_bfloat16;
  bool wide;  // 512-bit vectors

  void (*multiply)(const Product&);
  void (*multiply_transposed)(const Product&);
  void (*multiply_bfloat16)(const Product&);
  void (*multiply_transposed_bfloat16)(const Product&);

  // One panel of scores [keys, LANES], keys a multiple of LANES.
  // scores -> softcap(scale scores), -inf where the lane's bit of the key is off: bit j % 32 of
  // bits [j / 32, LANES]. maximum [LANES]: the largest of each lane.
  void (*mask_scores)(float* scores, int64_t keys, const uint32_t* bits, float scale,
                      float softcap, float* maximum);
  // sum [LANES] of exp(scores - norm); the scores stay.
  void (*sum_exponentials)(const float* scores, int64_t keys, const float* norm, float* sum);
  // The same, and p = exp(scores - norm) in fp32 (may be `scores`) or paired bf16.
  void (*exponentials)(const float* scores, int64_t keys, const float* norm, float* sum, float* p);
  void (*exponentials_bfloat16)(const float* scores, int64_t keys, const float* norm, float* sum,
                                uint32_t* p);
  // Softmax backward, first sweep: sums [LANES] of p and of p dp; without softcap scores become p.
  void (*backward_sums)(float* scores, const float* dp, int64_t keys, const float* lse,
                        float softcap, float* sum_p, float* sum_p_dp);
  // Second sweep: scores become p correction, dp becomes scale p correction (dp - delta) slope.
  void (*softmax_backward)(float* scores, float* dp, int64_t keys, const float* lse,
                           const float* correction, const float* delta, float scale,
                           float softcap);
  // x [keys, LANES] fp32 -> bf16, plain and (where not null) paired.
  void (*narrow)(const float* x, int64_t keys, uint32_t* plain, uint32_t* paired);

  // Two rows [panels * LANES] of bf16, one behind the other, into paired panels `stride` apart.
  void (*pair)(const void* even, const void* odd, int64_t panels, int64_t stride, void* to);

  // attention_map. maximum [keys, stride] takes in scores - norm of the lanes with a weight.
  void (*raise_maximum)(const float* scores, int64_t keys, const Lanes& lanes, float* maximum,
                        int64_t stride);
  // total [keys, stride] takes in the head's share of the map; value [keys, LANES] is v . g.
  void (*add_to_map)(MapKind kind, const float* scores, const float* value, int64_t keys,
                     const Lanes& lanes, bool rectify, const float* maximum, float* total,
                     int64_t stride);
  // scores become a = dL / dlog p, p becomes exp(scores - norm), value the gradient of v . g;
  // sum_a and sum_weight [LANES]. With a softcap a and p come times its slope.
  void (*map_gradient)(MapKind kind, float* scores, float* value, float* p, int64_t keys,
                       const Lanes& lanes, const RowFactors& rows, bool rectify, float softcap,
                       float* sum_a, float* sum_weight);
  // scores = scale (scores - A p)
  void (*subtract_mean)(float* scores, const float* p, int64_t keys, const float* A, float scale);

  void (*logarithms)(float* x, int64_t count);  // x [count] -> log(x)

  Words<float> words;
  Words<bfloat16> words_bfloat16;
};

// The best level of this CPU, or the one that GROUNDKERN_CPU_ISA names.
const Level& level();

// The names that GROUNDKERN_CPU_ISA may take here, best first.
std::vector<const char*> level_names();

}  // namespace groundkern
