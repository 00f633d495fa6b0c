// groundkern._C: the only file that knows pybind11.
//
// A tensor arrives as the tuple (address, dtype code, sizes, strides in elements); nothing of torch
// is included, so there is no ABI to match. Everything that can be checked is checked before memory
// is touched; that the tuple describes memory its owner keeps alive is the caller's word.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/level.h"
#include "views.h"

namespace groundkern {
namespace {

namespace py = pybind11;

float check_softcap(double softcap) {
  if (!std::isfinite(softcap) || softcap < 0) {
    fail("softcap", "a positive finite number, or 0 for none", std::to_string(softcap));
  }
  return static_cast<float>(softcap);
}

int check_threads(int threads) {
  if (threads < 1 || threads > 1024) fail("threads", "1 to 1024", std::to_string(threads));
  return threads;
}

// What the ops over query rows share: dtype, q, k, rows, scale, softcap and threads.
template <class Op>
void take_queries(Op& op, const View& q, const View& k, const View& sequence, const View& start,
                  const View& stop, const std::optional<View>& words,
                  const std::optional<View>& set_index, double scale, double softcap,
                  int threads) {
  const int code = std::get<1>(q);
  if (code < 0 || code > static_cast<int>(Dtype::float16)) {
    fail("q", "float32 (0), bfloat16 (1) or float16 (2)", "dtype code " + std::to_string(code));
  }
  if (!std::isfinite(scale)) fail("scale", "a finite number", std::to_string(scale));
  op.dtype = static_cast<Dtype>(code);
  op.q = tensor<3>("q", q, op.dtype, {ANY, ANY, ANY});
  const auto [N, Hq, D] = op.q.size;
  op.k = tensor<4>("k", k, op.dtype, {ANY, ANY, ANY, D});
  const auto [B, Hkv, S, unused] = op.k.size;
  if (D < 1) fail("k", "a head dimension >= 1", "0");
  if (Hkv < 1 || Hq % Hkv != 0) {
    fail("k", "heads that divide q's " + std::to_string(Hq), std::to_string(Hkv));
  }
  op.rows = rows_of(N, B, S, sequence, start, stop, words, set_index);
  op.scale = static_cast<float>(scale);
  op.softcap = check_softcap(softcap);
  op.threads = check_threads(threads);
}

SideAttention side_attention(const View& q, const View& k, const View& v, const View& sequence,
                             const View& start, const View& stop, const std::optional<View>& words,
                             const std::optional<View>& set_index, double scale, double softcap,
                             int threads) {
  SideAttention op{};
  take_queries(op, q, k, sequence, start, stop, words, set_index, scale, softcap, threads);
  op.v = tensor<4>("v", v, op.dtype, {op.k.size[0], op.k.size[1], op.k.size[2], ANY});
  if (op.v.size[3] < 1) fail("v", "a head dimension >= 1", "0");
  return op;
}

void forward(const View& q, const View& k, const View& v, const View& sequence, const View& start,
             const View& stop, const std::optional<View>& words,
             const std::optional<View>& set_index, const View& out, const View& lse, double scale,
             double softcap, int threads) {
  const SideAttention op = side_attention(q, k, v, sequence, start, stop, words, set_index, scale,
                                          softcap, threads);
  const int64_t N = op.q.size[0], Hq = op.q.size[1], Dv = op.v.size[3];
  const auto out_ = output<3>("out", out, op.dtype, {N, Hq, Dv});
  const auto lse_ = output<2>("lse", lse, Dtype::float32, {N, Hq});
  side_attention_forward(op, out_, lse_);
}

void backward(const View& dout, const View& dlse, const View& q, const View& k, const View& v,
              const View& lse, const View& sequence, const View& start, const View& stop,
              const std::optional<View>& words,
              const std::optional<View>& set_index, const View& dq, const View& dk, const View& dv,
              double scale, double softcap, int threads) {
  const SideAttention op = side_attention(q, k, v, sequence, start, stop, words, set_index, scale,
                                          softcap, threads);
  const int64_t N = op.q.size[0], Hq = op.q.size[1], D = op.q.size[2], Dv = op.v.size[3];
  const int64_t B = op.k.size[0], Hkv = op.k.size[1], S = op.k.size[2];
  const auto dout_ = tensor<3>("dout", dout, op.dtype, {N, Hq, Dv});
  const auto dlse_ = tensor<2>("dlse", dlse, Dtype::float32, {N, Hq});
  const auto lse_ = tensor<2>("lse", lse, Dtype::float32, {N, Hq});
  const auto dq_ = output<3>("dq", dq, op.dtype, {N, Hq, D});
  const auto dk_ = output<4>("dk", dk, op.dtype, {B, Hkv, S, D});
  const auto dv_ = output<4>("dv", dv, op.dtype, {B, Hkv, S, Dv});
  side_attention_backward(op, dout_, dlse_, lse_, dq_, dk_, dv_);
}

const int64_t* long_indices(const std::string& name, const View& view, int64_t count) {
  return static_cast<const int64_t*>(tensor<1>(name, view, Dtype::int64, {count}).data);
}

void take_bags(LinearCrossEntropy& op, const View& ids, const View& offsets, const View& index) {
  const auto ids_ = tensor<1>("ids", ids, Dtype::int64, {ANY});
  const auto offsets_ = tensor<1>("offsets", offsets, Dtype::int64, {ANY});
  const int64_t T = ids_.size[0], G = offsets_.size[0] - 1;
  if (G < 0) fail("offsets", "at least one offset", "none");
  op.ids = static_cast<const int64_t*>(ids_.data);
  op.offsets = static_cast<const int64_t*>(offsets_.data);
  op.index = long_indices("index", index, op.N);
  op.bags = G;
  for (int64_t g = 0; g <= G; ++g) {
    check_range("offsets", g, op.offsets[g], g == 0 ? 0 : op.offsets[g - 1], g == 0 ? 0 : T);
    if (g > 0) op.longest = std::max(op.longest, op.offsets[g] - op.offsets[g - 1]);
  }
  for (int64_t i = 0; i < op.offsets[G]; ++i) check_range("ids", i, op.ids[i], 0, op.V - 1);
  for (int64_t n = 0; n < op.N; ++n) check_range("index", n, op.index[n], -1, G - 1);
}

const float* upstream(const std::string& name, const std::optional<View>& view, int64_t N) {
  if (!view) return nullptr;
  return static_cast<const float*>(tensor<1>(name, *view, Dtype::float32, {N}).data);
}

template <int Rank>
float* floats(const std::string& name, const View& view, const std::vector<int64_t>& shape) {
  return static_cast<float*>(output<Rank>(name, view, Dtype::float32, shape).data);
}

// What both directions of linear_cross_entropy take.
LinearCrossEntropy head(const View& logits, int64_t vocabulary, const std::optional<View>& hidden,
                        const std::optional<View>& weight, const View& target,
                        const std::optional<View>& ids, const std::optional<View>& offsets,
                        const std::optional<View>& index, const View& tops, const View& terms,
                        const std::optional<View>& slopes, double smoothing, double softcap,
                        int threads) {
  const int code = std::get<1>(logits);
  if (code != static_cast<int>(Dtype::float32) && code != static_cast<int>(Dtype::bfloat16)) {
    fail("logits", "float32 (0) or bfloat16 (1)", "dtype code " + std::to_string(code));
  }
  if (vocabulary < 1 || vocabulary > MAX_SIZE) {
    fail("vocabulary", "1 to 2^31 - 1", std::to_string(vocabulary));
  }
  if (!(smoothing >= 0 && smoothing < 1)) {
    fail("smoothing", "a share in [0, 1)", std::to_string(smoothing));
  }
  if (ids.has_value() != offsets.has_value() || ids.has_value() != index.has_value()) {
    fail("ids", "ids, offsets and index together", "one without the others");
  }
  if (hidden.has_value() != weight.has_value()) {
    fail("weight", "hidden and weight together", "one without the other");
  }
  LinearCrossEntropy op{};
  op.dtype = static_cast<Dtype>(code);
  op.V = vocabulary;
  const auto target_ = tensor<1>("target", target, Dtype::int64, {ANY});
  op.N = target_.size[0];
  op.target = static_cast<const int64_t*>(target_.data);
  const int64_t width = padded(op.N), words = weight ? padded(op.V) : op.V;
  op.logits = output<2>("logits", logits, op.dtype, {words, width}).data;
  if (weight) {
    if (op.dtype == Dtype::bfloat16 && !has_matrix_product(Dtype::bfloat16)) {
      fail("weight", "float32 (0) on a CPU that does not multiply bfloat16", "bfloat16 (1)");
    }
    op.weight = tensor<2>("weight", *weight, op.dtype, {op.V, ANY});
    op.D = op.weight.size[1];
    op.hidden = tensor<2>("hidden", *hidden, op.dtype, {op.N, op.D});
  }
  for (int64_t n = 0; n < op.N; ++n) check_range("target", n, op.target[n], 0, op.V - 1);
  if (ids) take_bags(op, *ids, *offsets, *index);
  op.softcap = check_softcap(softcap);
  op.tops = floats<2>("tops", tops, {(op.V + WORDS - 1) / WORDS, width});
  op.terms = floats<2>("terms", terms, {ROW_TERMS, width});
  if (slopes.has_value() != (ids.has_value() && op.softcap > 0.0f)) {
    fail("slopes", "them for bags with a softcap", "another choice");
  }
  if (slopes) op.slopes = floats<2>("slopes", *slopes, {op.N, op.longest});
  op.smoothing = static_cast<float>(smoothing);
  op.threads = check_threads(threads);
  return op;
}

void head_forward(const View& logits, int64_t vocabulary, const std::optional<View>& hidden,
                  const std::optional<View>& weight, const std::optional<View>& bias,
                  const View& target, const std::optional<View>& ids,
                  const std::optional<View>& offsets, const std::optional<View>& index,
                  const View& tops, const View& terms, const std::optional<View>& slopes,
                  const View& loss, const View& log_prob, const View& lse, const View& predicted,
                  double smoothing, double softcap, int threads) {
  LinearCrossEntropy op = head(logits, vocabulary, hidden, weight, target, ids, offsets, index,
                               tops, terms, slopes, smoothing, softcap, threads);
  if (bias) op.bias = static_cast<float*>(tensor<1>("bias", *bias, Dtype::float32, {op.V}).data);
  CrossEntropyResults results{};
  results.loss = floats<1>("loss", loss, {op.N});
  results.log_prob = floats<1>("log_prob", log_prob, {op.N});
  results.lse = floats<1>("lse", lse, {op.N});
  const auto predicted_ = output<1>("predicted", predicted, Dtype::int64, {op.N});
  results.predicted = static_cast<int64_t*>(predicted_.data);
  linear_cross_entropy_forward(op, results);
}

void head_backward(const View& logits, int64_t vocabulary, const std::optional<View>& hidden,
                   const std::optional<View>& weight, const View& target,
                   const std::optional<View>& ids, const std::optional<View>& offsets,
                   const std::optional<View>& index, const View& tops, const View& terms,
                   const std::optional<View>& slopes, const std::optional<View>& dloss,
                   const std::optional<View>& dlog_prob, const std::optional<View>& dlse,
                   const std::optional<View>& dlogits, const std::optional<View>& dhidden,
                   const std::optional<View>& dweight, const std::optional<View>& dbias, bool add,
                   double smoothing, double softcap, int threads) {
  const LinearCrossEntropy op = head(logits, vocabulary, hidden, weight, target, ids, offsets,
                                     index, tops, terms, slopes, smoothing, softcap, threads);
  const CrossEntropyUpstream from{upstream("dloss", dloss, op.N),
                                  upstream("dlog_prob", dlog_prob, op.N),
                                  upstream("dlse", dlse, op.N)};
  if (dhidden.has_value() != weight.has_value()) {
    fail("dhidden", "it and weight together", "one without the other");
  }
  if (dlogits.has_value() == weight.has_value()) {
    fail("dlogits", "it or weight", "both or none");
  }
  if (dweight && !weight) fail("dweight", "it with weight", "it alone");
  if (dbias && !weight) fail("dbias", "it with weight", "it alone");
  CrossEntropyGradients to{};
  if (dlogits) {
    to.dlogits = output<2>("dlogits", *dlogits, op.dtype, {op.V, padded(op.N)}).data;
  } else {
    to.dhidden = output<2>("dhidden", *dhidden, op.dtype, {op.N, op.D});
  }
  if (dbias) to.dbias = floats<1>("dbias", *dbias, {op.V});
  to.dtype = op.dtype;
  to.add = add;
  if (dweight) {
    if (add || std::get<1>(*dweight) == static_cast<int>(Dtype::float32)) to.dtype = Dtype::float32;
    to.dweight = output<2>("dweight", *dweight, to.dtype, {op.V, op.D});
  }
  linear_cross_entropy_backward(op, from, to);
}

void take_columns(AttentionMap& op, const View& columns) {
  const auto view = output<2>("columns", columns, Dtype::int32, {op.k.size[0], ANY});
  op.columns = static_cast<const int32_t*>(view.data);
  op.column_count = view.size[1];
  for (int64_t b = 0; b < view.size[0]; ++b) {
    int64_t last = -1;
    for (int64_t c = 0; c < op.column_count; ++c) {
      const int32_t key = op.columns[b * op.column_count + c];
      if (key == -1) continue;
      check_range("columns", b, key, last + 1, op.k.size[2] - 1);  // ascending
      last = key;
    }
  }
}

AttentionMap attention_map(int kind, const View& q, const View& k, const std::optional<View>& v,
                           const std::optional<View>& g, const std::optional<View>& head_weight,
                           const std::optional<View>& target, const View& sequence,
                           const View& start, const View& stop, const View& columns,
                           const std::optional<View>& words, const std::optional<View>& set_index,
                           const std::optional<View>& lse, bool over_columns, bool rectify,
                           double scale, double softcap, int threads) {
  if (kind < 0 || kind > 3) fail("kind", "0 to 3", std::to_string(kind));
  AttentionMap op{};
  op.kind = static_cast<MapKind>(kind);
  const bool contributes = op.kind == MapKind::contribution, kl = kind > 1;
  take_queries(op, q, k, sequence, start, stop, words, set_index, scale, softcap, threads);
  take_columns(op, columns);
  const int64_t N = op.q.size[0], Hq = op.q.size[1];
  if (v.has_value() != contributes || g.has_value() != contributes) {
    fail("v", "v and g for a contribution alone", "another choice");
  }
  if (head_weight.has_value() == contributes) fail("head_weight", "it or v and g", "both or none");
  if (target.has_value() != kl) fail("target", "it for a KL alone", "another choice");
  if (contributes) {
    op.v = tensor<4>("v", *v, op.dtype, {op.k.size[0], op.k.size[1], op.k.size[2], ANY});
    op.g = tensor<3>("g", *g, op.dtype, {N, Hq, op.v.size[3]});
    if (op.v.size[3] < 1) fail("v", "a head dimension >= 1", "0");
  } else {
    op.head_weight = tensor<2>("head_weight", *head_weight, Dtype::float32, {N, Hq});
  }
  if (kl) op.target = tensor<2>("target", *target, Dtype::float32, {N, op.column_count});
  if (lse) op.lse = tensor<2>("lse", *lse, Dtype::float32, {N, Hq});
  op.over_columns = over_columns;
  op.rectify = rectify;
  return op;
}

// The map [N, C], or the KL [N].
float* map_or_kl(const std::string& name, const View& view, const AttentionMap& op) {
  const int64_t N = op.q.size[0];
  if (op.kind == MapKind::kl_mean || op.kind == MapKind::kl_each) {
    return static_cast<float*>(output<1>(name, view, Dtype::float32, {N}).data);
  }
  return static_cast<float*>(output<2>(name, view, Dtype::float32, {N, op.column_count}).data);
}

void map_forward(int kind, const View& q, const View& k, const std::optional<View>& v,
                 const std::optional<View>& g, const std::optional<View>& head_weight,
                 const std::optional<View>& target, const View& sequence, const View& start,
                 const View& stop, const View& columns, const std::optional<View>& words,
                 const std::optional<View>& set_index, const std::optional<View>& lse,
                 const View& out, bool over_columns, bool rectify, double scale, double softcap,
                 int threads) {
  const AttentionMap op =
      attention_map(kind, q, k, v, g, head_weight, target, sequence, start, stop, columns, words,
                    set_index, lse, over_columns, rectify, scale, softcap, threads);
  attention_map_forward(op, map_or_kl("out", out, op));
}

void map_backward(int kind, const View& q, const View& k, const std::optional<View>& v,
                  const std::optional<View>& g, const std::optional<View>& head_weight,
                  const std::optional<View>& target, const View& sequence, const View& start,
                  const View& stop, const View& columns, const std::optional<View>& words,
                  const std::optional<View>& set_index, const std::optional<View>& lse,
                  const View& upstream, const View& dq, const View& dk,
                  const std::optional<View>& dv, const std::optional<View>& dg,
                  const std::optional<View>& dhead_weight, bool over_columns, bool rectify,
                  double scale, double softcap, int threads) {
  const AttentionMap op =
      attention_map(kind, q, k, v, g, head_weight, target, sequence, start, stop, columns, words,
                    set_index, lse, over_columns, rectify, scale, softcap, threads);
  if (dv.has_value() != v.has_value() || dg.has_value() != g.has_value() ||
      dhead_weight.has_value() != head_weight.has_value()) {
    fail("dv", "a gradient for each of v, g and head_weight given", "another choice");
  }
  const auto [N, Hq, D] = op.q.size;
  const auto [B, Hkv, S, unused] = op.k.size;
  const int64_t Dv = op.v.size[3];
  const float* const upstream_ = map_or_kl("upstream", upstream, op);
  const auto dq_ = output<3>("dq", dq, op.dtype, {N, Hq, D});
  const auto dk_ = output<4>("dk", dk, op.dtype, {B, Hkv, S, D});
  const auto dv_ = dv ? output<4>("dv", *dv, op.dtype, {B, Hkv, S, Dv}) : Tensor<4>{};
  const auto dg_ = dg ? output<3>("dg", *dg, op.dtype, {N, Hq, Dv}) : Tensor<3>{};
  const auto dhead_weight_ =
      dhead_weight ? output<2>("dhead_weight", *dhead_weight, Dtype::float32, {N, Hq}) : Tensor<2>{};
  attention_map_backward(op, upstream_, dq_, dk_, dv_, dg_, dhead_weight_);
}

}  // namespace
}  // namespace groundkern

// The module exposes raw memory to Python: call it through groundkern's *_kernels.py.
PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "groundkern's C++ kernels; a tensor is (address, dtype code, sizes, strides).";
  module.attr("float32") = static_cast<int>(groundkern::Dtype::float32);
  module.attr("bfloat16") = static_cast<int>(groundkern::Dtype::bfloat16);
  module.attr("float16") = static_cast<int>(groundkern::Dtype::float16);
  module.attr("int32") = static_cast<int>(groundkern::Dtype::int32);
  module.attr("int64") = static_cast<int>(groundkern::Dtype::int64);
  module.def("attention_map_forward", &groundkern::map_forward, release(), py::kw_only(),
             py::arg("kind"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("g"),
             py::arg("head_weight"), py::arg("target"), py::arg("sequence"), py::arg("start"),
             py::arg("stop"), py::arg("columns"), py::arg("words"), py::arg("set_index"),
             py::arg("lse"), py::arg("out"), py::arg("over_columns"), py::arg("rectify"),
             py::arg("scale"), py::arg("softcap"), py::arg("threads"));
  module.def("attention_map_backward", &groundkern::map_backward, release(), py::kw_only(),
             py::arg("kind"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("g"),
             py::arg("head_weight"), py::arg("target"), py::arg("sequence"), py::arg("start"),
             py::arg("stop"), py::arg("columns"), py::arg("words"), py::arg("set_index"),
             py::arg("lse"), py::arg("upstream"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
             py::arg("dg"), py::arg("dhead_weight"), py::arg("over_columns"), py::arg("rectify"),
             py::arg("scale"), py::arg("softcap"), py::arg("threads"));
  module.def("cpu_levels", &groundkern::level_names);
  module.def("cpu_level", [] { return std::string(groundkern::level().name); });
  module.def("has_matrix_product", [](int dtype) {
    return groundkern::has_matrix_product(static_cast<groundkern::Dtype>(dtype));
  });
  module.attr("lanes") = groundkern::LANES;
  module.attr("words") = groundkern::WORDS;
  module.attr("terms") = static_cast<int>(groundkern::ROW_TERMS);
  module.def("linear_cross_entropy_forward", &groundkern::head_forward, release(), py::kw_only(),
             py::arg("logits"), py::arg("vocabulary"), py::arg("hidden"), py::arg("weight"),
             py::arg("bias"), py::arg("target"), py::arg("ids"), py::arg("offsets"),
             py::arg("index"), py::arg("tops"), py::arg("terms"), py::arg("slopes"),
             py::arg("loss"), py::arg("log_prob"), py::arg("lse"), py::arg("predicted"),
             py::arg("smoothing"), py::arg("softcap"), py::arg("threads"));
  module.def("linear_cross_entropy_backward", &groundkern::head_backward, release(),
             py::kw_only(), py::arg("logits"), py::arg("vocabulary"), py::arg("hidden"),
             py::arg("weight"), py::arg("target"), py::arg("ids"), py::arg("offsets"),
             py::arg("index"), py::arg("tops"), py::arg("terms"), py::arg("slopes"),
             py::arg("dloss"), py::arg("dlog_prob"), py::arg("dlse"), py::arg("dlogits"),
             py::arg("dhidden"), py::arg("dweight"), py::arg("dbias"), py::arg("add"),
             py::arg("smoothing"), py::arg("softcap"), py::arg("threads"));
  module.def("side_attention_forward", &groundkern::forward, release(), py::kw_only(), py::arg("q"),
             py::arg("k"), py::arg("v"), py::arg("sequence"), py::arg("start"), py::arg("stop"),
             py::arg("words"), py::arg("set_index"), py::arg("out"), py::arg("lse"),
             py::arg("scale"), py::arg("softcap"), py::arg("threads"));
  module.def("side_attention_backward", &groundkern::backward, release(), py::kw_only(),
             py::arg("dout"), py::arg("dlse"), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("lse"), py::arg("sequence"), py::arg("start"), py::arg("stop"),
             py::arg("words"), py::arg("set_index"), py::arg("dq"), py::arg("dk"),
             py::arg("dv"), py::arg("scale"), py::arg("softcap"), py::arg("threads"));
}
