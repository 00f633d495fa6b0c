// linear_cross_entropy on the CPU, backward. What the forward saved becomes the gradient of the
// logits, one slice of vocabulary entries at a time, which stays in cache for its two products:
// dweight [V, D] with hidden, right after each block of entries, and dhidden [N, D] with weight, of
// which a task owns a tile. Each tile adds the entries in ascending order, so the sums do not
// depend on the threads.
#include "head.h"

namespace groundkern {
namespace {

constexpr double WORK = 32;     // multiply-adds that take as long as a logit without its products
constexpr int64_t DEPTH = 256;  // rows of weight packed at a time
constexpr int64_t SLICE = int64_t{1} << 20;  // elements of the gradient at a time

// Rows [n, n + rows) and columns [d, d + columns) of dhidden.
struct Tile {
  int64_t n, d, rows, columns;
  int64_t tall() const { return whole_tiles(rows); }
};

// The tiles of dhidden: at least one for every thread. Those of few rows are narrower, so that
// threads end at about the same time.
struct Tiles {
  int64_t N, D, rows = 512, columns = N > 256 ? 256 : 128, down, count;

  Tiles(int64_t N, int64_t D, int threads) : N(N), D(D) {
    cut();
    while (count < threads && rows > 64) rows /= 2, cut();
    while (count < threads && columns > 64) columns /= 2, cut();
  }

  void cut() {
    down = (N + rows - 1) / rows;
    count = down * ((D + columns - 1) / columns);
  }

  Tile at(int64_t item) const {
    const int64_t n = item % down * rows, d = item / down * columns;
    return {n, d, std::min(rows, N - n), std::min(columns, D - d)};
  }
};

template <class T>
struct Backward : Head<T> {
  using Base = Head<T>;
  using Base::blocks, Base::D, Base::isa, Base::lists, Base::N, Base::op, Base::own, Base::panels,
      Base::PER_UNIT, Base::products, Base::V, Base::width;

  const LinearCrossEntropy::Gradients& to;
  const bool trained = to.dweight.data != nullptr;
  const int64_t even = (N + 1) / 2 * 2;
  const int64_t slice = std::max(SLICE / std::max(width, LANES) / DEPTH, int64_t{1}) * DEPTH;
  const int threads = Base::threads(blocks, WORK + (trained ? static_cast<double>(D) : 0.0));
  const Buffer<T> hidden{trained ? even * padded(D) : 0};         // [even, D] paired
  const Buffer<T> dlogits{own ? slice * width : 0};               // [slice, N] paired
  const Buffer<T> rows{trained ? threads * ENTRIES * width : 0};  // [ENTRIES, width]: one block's
  const Buffer<float> scratch{threads * ENTRIES * LANES};
  // [width], of every row, with x = z - top and e = exp(x): the gradient of an entry's logit is the
  // softcap's slope times e (factor + entropy x) - spread c, where c is the weight of the entry's
  // class. A label of the row's list subtracts `label` times its weight. `target`: the whole
  // gradient of the target's logit, which is not a difference of numbers close to each other.
  std::vector<float> factor, entropy, spread, label, target;

  Backward(const LinearCrossEntropy& op_, const LinearCrossEntropy::Upstream& from,
           const LinearCrossEntropy::Gradients& to)
      : Base(op_), to(to), factor(width), entropy(width), spread(width), label(width),
        target(width) {
    for (int64_t n = 0; n < N; ++n) terms(n, from);
  }

  void terms(int64_t n, const LinearCrossEntropy::Upstream& from) {
    const double dloss = from.dloss != nullptr ? from.dloss[n] : 0.0;
    const double dlog_prob = from.dlog_prob != nullptr ? from.dlog_prob[n] : 0.0;
    const double dlse = from.dlse != nullptr ? from.dlse[n] : 0.0;
    const double dentropy = from.dentropy != nullptr ? from.dentropy[n] : 0.0;
    const float top = op.saved.terms[TOP * width + n];
    const float z_target = op.saved.terms[TARGET_LESS_TOP * width + n];
    const float others = op.saved.terms[OTHERS * width + n];
    const double H = op.saved.terms[ENTROPY * width + n];
    const double own_share = std::exp(double{z_target}), sum = others + own_share;
    const double log_sum = log_of_sum(others, z_target), temperature = op.options.temperature;
    const double z_loss = op.options.z_loss;
    const double squared = z_loss > 0.0 ? 2.0 * z_loss * (top + log_sum) : 0.0;
    const RowWeights t = Base::weights(n);

    double all = dloss * (t.own + t.list + t.spread + squared) - dlog_prob + dlse;
    double rest = dloss * (t.list + t.spread + squared) + dlse;  // at the target
    if (dentropy != 0.0) {
      all += dentropy * (log_sum - H);
      rest -= dentropy * (double{target_log_prob(others, z_target)} + H);
    }
    factor[n] = static_cast<float>(all / sum / temperature);
    entropy[n] = static_cast<float>(-dentropy / sum / temperature);
    label[n] = static_cast<float>(dloss * t.label / temperature);
    spread[n] = static_cast<float>(dloss * t.entry / temperature);

    const float* const c = Base::class_weight(op.labels.target[n]);
    double at_target = (dlog_prob - dloss * t.own) * (others / sum);
    if (own_share != 0.0) at_target += rest * (own_share / sum);
    if (t.entry != 0.0) at_target -= dloss * t.entry * (c == nullptr ? 1.0 : *c);
    target[n] = static_cast<float>(at_target / temperature) * cap_slope(z_target + top, Base::cap);
  }

  void run() const {
    if (!own) return some_blocks(0, blocks);
    if (trained) pack_hidden();
    const Tiles tiles(N, D, op.options.threads);
    const int workers = Base::threads(tiles.count, static_cast<double>(D));
    const Buffer<T> B(workers * DEPTH * tiles.columns);
    const Buffer<float> C(tiles.count * tiles.rows * tiles.columns);
    for (int64_t y = 0; y < V; y += slice) {
      some_blocks(y / ENTRIES, std::min(blocks, (y + slice) / ENTRIES));
      parallel_for(tiles.count, workers, [&](int64_t item, int thread) {
        add_to_tile(tiles.at(item), y, B.data() + thread * DEPTH * tiles.columns,
                    C.data() + item * tiles.rows * tiles.columns);
      });
    }
    parallel_for(tiles.count, workers, [&](int64_t item, int) {
      const Tile tile = tiles.at(item);
      for (int64_t i = 0; i < tile.rows; ++i) {
        get_row(C.data() + item * tiles.rows * tiles.columns, tile.columns, tile.tall(), i, 1.0f,
                to.dhidden.template row<T>(tile.n + i, tile.d));
      }
    });
  }

  void some_blocks(int64_t first, int64_t last) const {
    parallel_for(last - first, threads, [&](int64_t i, int thread) {
      float* const scores = scratch.data() + thread * ENTRIES * LANES;
      T* const gradient = rows.data() + thread * ENTRIES * width;
      for (int64_t panel = 0; panel < panels; ++panel) block(first + i, panel, scores, gradient);
      for (int64_t d = 0; trained && d < D; d += LANES) dweight(first + i, d, gradient, scores);
    });
  }

  T* paired(int64_t block, int64_t panel) const {
    return dlogits.data() + (panel * slice + block * ENTRIES % slice) * LANES;
  }

  void pack_hidden() const {
    for (int64_t n = 0; n < N; n += 2) {
      put_paired(op.inputs.hidden.template row<T>(n),
                 n + 1 < N ? op.inputs.hidden.template row<T>(n + 1) : nullptr, D, even, n,
                 hidden.data());
    }
  }

  void block(int64_t b, int64_t panel, float* scores, T* gradient) const {
    const int64_t first = b * ENTRIES, count = Base::count(b), lanes = Base::lanes(panel);
    if (op.saved.scores != nullptr) {
      from_scores(b, panel, scores);
    } else {
      from_exponentials(b, panel, scores);
    }
    const int64_t row = panel * LANES;
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t w = op.labels.target[row + l] - first;
      if (w >= 0 && w < count) scores[w * LANES + l] = target[row + l];
    }
    lists.among(row, row + lanes, b,
                [&](const Lists::Label& of, int64_t i, int64_t low, int64_t high) {
                  for (int64_t n = low; n < high; ++n) {
                    if (of.id == op.labels.target[n]) continue;
                    const float share = label[n] * of.weight * slope(b, of.id, n, i);
                    scores[(of.id - first) * LANES + n - row] -= share;
                  }
                });
    for (int64_t y = 0; y < count && lanes < LANES; ++y) {  // empty lanes may hold anything
      std::fill(scores + y * LANES + lanes, scores + (y + 1) * LANES, 0.0f);
    }
    for (int64_t y = 0; y < count && to.dbias != nullptr; ++y) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < LANES; ++l) sum += scores[y * LANES + l];
      to.dbias[first + y] += sum;
    }
    if (!own) {
      T* const rows = static_cast<T*>(to.dlogits) + first * width + panel * LANES;
      return Base::lane_rows.write(scores, count, width, rows);
    }
    Base::pair(b, scores, paired(b, panel));
    if (trained) Base::lane_rows.write(scores, padded(count), width, gradient + panel * LANES);
  }

  // scores [count, LANES] = the gradient of a block's logits, apart from targets and lists.
  void from_exponentials(int64_t b, int64_t panel, float* scores) const {
    float factors[LANES] = {};
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {
      const int64_t n = panel * LANES + l;
      factors[l] = factor[n] * exponential(below(b, n));
    }
    Base::read(b, panel, factors, scores);
    if (!Base::smooths()) return;
    isa.subtract_spread(scores, Base::count(b), spread.data() + panel * LANES,
                        Base::class_weight(b * ENTRIES));
  }

  void from_scores(int64_t b, int64_t panel, float* scores) const {
    const int64_t count = Base::count(b), row = panel * LANES;
    float factors[LANES] = {}, of_entropy[LANES] = {};
    for (int64_t l = 0; l < Base::lanes(panel); ++l) {
      const int64_t n = row + l;
      const float share = exponential(below(b, n));
      if (share == 0.0f) continue;
      factors[l] = share * (factor[n] + entropy[n] * below(b, n));
      of_entropy[l] = share * entropy[n];
    }
    isa.score_gradient({op.saved.scores + Base::place(b, panel), Base::stride,
                        op.saved.tops + b * width + row, factors, of_entropy, spread.data() + row,
                        Base::class_weight(b * ENTRIES), Base::cap},
                       count, scores);
    std::fill(scores + count * LANES, scores + padded(count) * LANES, 0.0f);
  }

  // The block's top less the row's.
  float below(int64_t b, int64_t n) const {
    const float own_top = op.saved.tops[b * width + n], top = op.saved.terms[TOP * width + n];
    return own_top == top ? 0.0f : own_top - top;
  }

  // The softcap's slope at label i of row n's list, whose id is y.
  float slope(int64_t b, int64_t y, int64_t n, int64_t i) const {
    if (op.saved.slopes != nullptr) return op.saved.slopes[n * op.labels.longest + i];
    if (op.saved.scores == nullptr) return 1.0f;
    const float* const kept = op.saved.scores + Base::place(b, n / LANES);
    const float x = kept[(y - b * ENTRIES) * Base::stride + n % LANES];
    return cap_slope(x + op.saved.tops[b * width + n], Base::cap);
  }

  // Columns [d, d + LANES) of dweight, in the rows of a block.
  void dweight(int64_t b, int64_t d, const T* gradient, float* C) const {
    const int64_t first = b * ENTRIES, count = Base::count(b);
    products.rows(whole_tiles(count), LANES, even, gradient, width,
                  {hidden.data() + d * even, even}, {C, ENTRIES});
    if (to.dtype == op.inputs.dtype) {
      put(C, count, std::min(LANES, D - d), to.dweight.template row<T>(first, d), Base::lane_rows);
    } else {
      put(C, count, std::min(LANES, D - d), to.dweight.template row<float>(first, d),
          isa.lane_rows);
    }
  }

  template <class X>
  void put(const float* C, int64_t count, int64_t columns, X* rows,
           const LaneRows<X>& lane_rows) const {
    if (columns == LANES && !to.add) return lane_rows.write(C, count, D, rows);
    for (int64_t y = 0; y < count; ++y) {
      for (int64_t c = 0; c < columns; ++c) {
        const float before = to.add ? to_float(rows[y * D + c]) : 0.0f;
        rows[y * D + c] = from_float<X>(before + C[y * LANES + c]);
      }
    }
  }

  // Adds the products of the entries from y to the end of the slice.
  void add_to_tile(const Tile& tile, int64_t y, T* B, float* C) const {
    const int64_t end = std::min(V, y + slice);
    for (int64_t k = y; k < end; k += DEPTH) {
      const int64_t depth = std::min(DEPTH, end - k);
      for (int64_t i = 0; i < depth; i += 2) {
        const T* const upper = op.inputs.weight.template row<T>(k + i, tile.d);
        const T* const lower =
            i + 1 < depth ? op.inputs.weight.template row<T>(k + i + 1, tile.d) : nullptr;
        if (PER_UNIT == 2 && lower != nullptr && tile.columns % LANES == 0) {
          isa.pair(upper, lower, tile.columns / LANES, DEPTH * LANES, B + i * LANES);
        } else {
          put_paired(upper, lower, tile.columns, DEPTH, i, B);
        }
      }
      Ahead next{};
      if (k + DEPTH < V) {
        next = {op.inputs.weight.template row<T>(k + DEPTH, tile.d), std::min(DEPTH, V - k - DEPTH),
                tile.columns * static_cast<int64_t>(sizeof(T)),
                op.inputs.weight.stride[0] * static_cast<int64_t>(sizeof(T))};
      }
      products.transposed(tile.tall(), padded(tile.columns), depth,
                          {paired(k / ENTRIES, tile.n / LANES), slice}, {B, DEPTH},
                          {C, tile.tall()}, k > 0, next);
    }
  }
};

}  // namespace

void linear_cross_entropy_backward(const LinearCrossEntropy& op,
                                   const LinearCrossEntropy::Upstream& from,
                                   const LinearCrossEntropy::Gradients& to) {
  if (op.inputs.dtype == Dtype::bfloat16) {
    Backward<bfloat16>(op, from, to).run();
  } else {
    Backward<float>(op, from, to).run();
  }
}

}  // namespace groundkern
