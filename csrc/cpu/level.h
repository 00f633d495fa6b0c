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
constexpr int64_t TALLEST = 8;  // rows of the largest register tile
constexpr int64_t HALF = LANES / 2;

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
inline int64_t whole_tiles(int64_t rows) { return (rows + TALLEST - 1) / TALLEST * TALLEST; }

// C [M, N] = or += A B, or A^T B; all in panels, C in fp32; A may be in rows as its owner has it.
// Sizes in words: K is half the inner dimension in bf16, where A is plain and A^T and B are paired.
// M is a multiple of TALLEST, N of HALF a panel.
struct Product {
  int64_t M, N, K;
  const uint32_t* A;
  int64_t A_panel;  // words from a panel to the next; of a matrix in rows, elements from row to row
  const uint32_t* B;
  int64_t B_panel;
  float* C;
  int64_t C_panel;
  bool add;
};

struct Multiply {
  void (*panels)(const Product&);
  void (*rows)(const Product&);
  void (*transposed)(const Product&);
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

// Rows of LANES elements, `stride` apart, to and from scores [words, LANES].
template <class T>
struct Words {
  void (*read)(const T* x, int64_t stride, int64_t words, const float* factor, float* scores);
  void (*write)(const float* scores, int64_t words, int64_t stride, T* x);
};

struct Level {
  const char* name;
  bool dots_bfloat16;
  bool wide;  // 512-bit vectors

  Multiply multiply, multiply_bfloat16;

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
  // x [keys, LANES] fp32 -> bf16, plain and paired, each where not null; and from paired, times
  // factor [LANES].
  void (*narrow)(const float* x, int64_t keys, uint32_t* plain, uint32_t* paired);
  void (*widen)(const uint32_t* paired, int64_t keys, const float* factor, float* x);

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

  // linear_cross_entropy. scores [words, LANES] -> softcap(scores + bias [words]), bias may be null;
  // top [LANES]: the largest of each lane, word [LANES]: the first that has it.
  void (*top_words)(float* scores, int64_t words, const float* bias, float softcap, float* top,
                    int32_t* word);
  // scores -> exp(scores - norm), times the cap's slope; sum [LANES] without the slope.
  void (*capped_exponentials)(float* scores, int64_t words, const float* norm, float softcap,
                              float* sum);

  Words<float> words;
  Words<bfloat16> words_bfloat16;
};

// The best level of this CPU, or the one that GROUNDKERN_CPU_ISA names.
const Level& level();

// The names that GROUNDKERN_CPU_ISA may take here, best first.
std::vector<const char*> level_names();

}  // namespace groundkern
