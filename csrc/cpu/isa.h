// The inner loops of the CPU kernels. isa.cpp compiles them for several instruction sets (ISAs),
// and `chosen_isa()` picks one at run time, so one build runs on any CPU.
//
// Matrices are stored in panels of LANES columns: element (i, j) of [rows, columns] is number
// (j / LANES * rows + i) * LANES + j % LANES, and the columns that pad the last panel are zero. A
// product reads its operands in units of four bytes: one fp32 or two bf16. A bf16 matrix has two
// forms: `plain` as above, whose units hold columns 2i and 2i + 1 of a row, and `paired`, whose
// units hold rows 2i and 2i + 1 of a column.
#pragma once

#include "arithmetic.h"

namespace groundkern {

constexpr int64_t LANES = 32;
constexpr int64_t TALLEST = 8;  // rows of the largest register tile
constexpr int64_t HALF = LANES / 2;

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
inline int64_t whole_tiles(int64_t rows) { return (rows + TALLEST - 1) / TALLEST * TALLEST; }

// Memory that a later product reads: `rows` rows of `bytes`, `stride` bytes from one to the next.
struct Ahead {
  const void* data;
  int64_t rows, bytes, stride;
};

// C [M, N] = or += A B, or A^T B, with all of them in panels and C in fp32; A may also be stored
// row by row. K, A_panel and B_panel count units: K is half the inner dimension in bf16, where A is
// plain and A^T and B are paired. M is a multiple of TALLEST, N of HALF.
struct Product {
  int64_t M, N, K;
  const uint32_t* A;
  int64_t A_panel;  // units from a panel to the next; if A is in rows, elements from row to row
  const uint32_t* B;
  int64_t B_panel;
  float* C;
  int64_t C_panel;
  bool add;
  Ahead ahead = {};  // brought into the second cache meanwhile
};

struct Multiply {
  void (*panels)(const Product&);
  void (*rows)(const Product&);
  void (*transposed)(const Product&);
};

// The packed query rows of a panel, one in each lane.
struct Lanes {
  const float* norm;    // [LANES]
  const float* weight;  // [LANES]: of the lane's head
  const int32_t*
      row;        // [LANES]: in the block; an empty lane has weight 0 and some other lane's row
  bool straight;  // row[lane] is row[0] + lane
};

// One head's scores of a panel of lanes.
struct PanelScores {
  float* scores;  // [keys, LANES]
  float* value;   // [keys, LANES]: v . g, contribution only
  int64_t keys;   // a multiple of LANES
};

// What map_gradient reads of the gradient of the map: of key j and row n, element j * stride + n.
struct RowFactors {
  const float* E;
  const float* F;
  int64_t stride;
};

// What map_gradient sums over keys, [LANES] each: a, the gradient of the head's weight, and p
// without the slope of a softcap.
struct MapSums {
  float *a, *weight, *p;
};

// What a KL or a map does with a head.
struct MapOptions {
  MapKind kind;
  bool rectify;
  float softcap;
};

// Rows of LANES elements, `stride` apart in memory, to and from scores [rows, LANES].
template <class T>
struct LaneRows {
  // scores = x times factor [LANES]
  void (*read)(const T* x, int64_t stride, int64_t rows, const float* factor, float* scores);
  void (*write)(const float* scores, int64_t rows, int64_t stride, T* x);
};

// A block's kept scores, and what each of its rows makes of them: the gradient of the logit at x is
// the softcap's slope times exp(x) (factor + entropy x) - spread weight.
struct KeptScores {
  const float* x;  // z less top
  int64_t stride;  // from an entry to the next
  const float *top, *factor, *entropy, *spread;  // [LANES]
  const float* weight;                           // [entries]; null: 1
  float softcap;                                 // 0: none
};

struct Isa {
  const char* name;
  bool dots_bfloat16;
  bool wide;  // 512-bit vectors

  Multiply multiply, multiply_bfloat16;

  // One panel of scores [keys, LANES]; keys is a multiple of LANES.
  // scores -> softcap(scale scores), or -inf where the key's mask bit is off: bit j % 32 of
  // bits [keys / 32, LANES]. maximum [LANES]: the largest score of each lane.
  void (*mask_scores)(float* scores, int64_t keys, const uint32_t* bits, float scale, float softcap,
                      float* maximum);
  // sum [LANES] of exp(scores - norm [LANES]); does not change the scores.
  void (*sum_exponentials)(const float* scores, int64_t keys, const float* norm, float* sum);
  // Also stores p = exp(scores - norm) [keys, LANES], in fp32 (p may be `scores`) or in paired
  // bf16.
  void (*exponentials)(const float* scores, int64_t keys, const float* norm, float* sum, float* p);
  void (*exponentials_bfloat16)(const float* scores, int64_t keys, const float* norm, float* sum,
                                uint32_t* p);
  // Softmax backward, first sweep: sum_p and sum_p_dp [LANES] of p and p dp; dp [keys, LANES].
  // Without a softcap the scores become p.
  void (*backward_sums)(float* scores, const float* dp, int64_t keys, const float* lse,
                        float softcap, float* sum_p, float* sum_p_dp);
  // Second sweep: scores become p correction, dp becomes scale p correction (dp - delta) dcap, with
  // lse, correction and delta [LANES].
  void (*softmax_backward)(float* scores, float* dp, int64_t keys, const float* lse,
                           const float* correction, const float* delta, float scale, float softcap);
  // x [keys, LANES] fp32 to bf16, plain and paired (either may be null); and paired bf16 times
  // factor [LANES] to fp32.
  void (*narrow)(const float* x, int64_t keys, uint32_t* plain, uint32_t* paired);
  void (*widen)(const uint32_t* paired, int64_t keys, const float* factor, float* x);

  // Two rows [panels * LANES] of bf16 into paired panels that lie `stride` elements apart.
  void (*pair)(const void* even, const void* odd, int64_t panels, int64_t stride, void* to);

  // attention_map. maximum and total are [keys, rows of the block], `stride` the number of rows.
  // maximum = max(maximum, scores - norm) over the lanes whose weight is positive.
  void (*raise_maximum)(const float* scores, int64_t keys, const Lanes& lanes, float* maximum,
                        int64_t stride);
  // total += the head's share of the map.
  void (*add_to_map)(const MapOptions& options, const PanelScores& head, const Lanes& lanes,
                     const float* maximum, float* total, int64_t stride);
  // scores become a = dL / dlog p, p [keys, LANES] becomes exp(scores - norm), value becomes the
  // gradient of v . g. With a softcap, a and p are multiplied by its slope.
  void (*map_gradient)(const MapOptions& options, const PanelScores& head, const Lanes& lanes,
                       const RowFactors& rows, float* p, const MapSums& sums);
  // scores = scale (scores - A [LANES] p), where a NaN in A does not reach keys whose p is 0.
  void (*subtract_mean)(float* scores, const float* p, int64_t keys, const float* A, float scale);

  void (*logarithms)(float* x, int64_t count);  // x [count] -> log(x)

  // linear_cross_entropy. scores [entries, LANES] of a block of vocabulary entries
  // -> softcap(scores + bias [entries]), where bias may be null; top [LANES]: the largest score of
  // each lane, entry [LANES]: the first entry that has it.
  void (*top_entries)(float* scores, int64_t entries, const float* bias, float softcap, float* top,
                      int32_t* entry);
  // scores -> exp(scores - norm [LANES]) times the slope of the softcap; sum [LANES] without the
  // slope. This, `exponentials` (in bf16 too), `moments` and `less_norm` take a multiple of 32
  // entries, and sum in the same order.
  void (*capped_exponentials)(float* scores, int64_t entries, const float* norm, float softcap,
                              float* sum);
  // scores -> softcap(scores + bias [entries]) / temperature, where bias may be null.
  void (*temper)(float* scores, int64_t entries, const float* bias, float softcap,
                 float temperature);
  // With x = scores - norm [LANES]: sum [LANES] of exp(x) x, of 0 where the exponential is 0.
  void (*moments)(const float* scores, int64_t entries, const float* norm, float* sum);
  // sum [LANES] of x weight [entries], of 0 where the weight is 0; a null weight is 1.
  void (*weighted_sums)(const float* scores, int64_t entries, const float* norm,
                        const float* weight, float* sum);
  // scores -> x; sum [LANES] of exp(x).
  void (*less_norm)(float* scores, int64_t entries, const float* norm, float* sum);
  // scores -= spread [LANES] weight [entries]; a null weight is 1.
  void (*subtract_spread)(float* scores, int64_t entries, const float* spread, const float* weight);
  // to [entries, LANES] = the gradient of the logits.
  void (*score_gradient)(const KeptScores& of, int64_t entries, float* to);

  LaneRows<float> lane_rows;
  LaneRows<bfloat16> lane_rows_bfloat16;
};

// The best ISA of this CPU, or the one that GROUNDKERN_CPU_ISA names.
const Isa& chosen_isa();

// The names that GROUNDKERN_CPU_ISA may have on this CPU, best first.
std::vector<const char*> isa_names();

}  // namespace groundkern
