// The arguments of each op, taken and checked. It knows nothing of Python: arguments.h does.
//
// A tensor arrives as the tuple (address, dtype code, sizes, strides in elements); nothing of torch
// is included, so there is no ABI to match. Everything that can be checked is checked before memory
// is touched; it is up to the caller that the tuple describes memory which stays alive.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/isa.h"

namespace groundkern {
namespace {

float take_softcap(Arguments& given) {
  const double softcap = given.take<double>("softcap");
  if (!std::isfinite(softcap) || softcap < 0) {
    fail("softcap", "a positive finite number, or 0 for none", std::to_string(softcap));
  }
  return static_cast<float>(softcap);
}

int take_threads(Arguments& given) {
  const int threads = given.take<int>("threads");
  if (threads < 1 || threads > 1024) fail("threads", "1 to 1024", std::to_string(threads));
  return threads;
}

// The dtype of a view, if it is one of the first `count`.
Dtype dtype_among(const std::string& name, const View& view, int count, const std::string& wanted) {
  const int code = std::get<1>(view);
  if (code < 0 || code >= count) fail(name, wanted, "dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

Selection take_selection(Arguments& given, int64_t N, int64_t B, int64_t S) {
  Selection selection{};
  selection.rows = N;
  selection.sequence = given.array<const int32_t>("sequence", N);
  selection.start = given.array<const int32_t>("start", N);
  selection.stop = given.array<const int32_t>("stop", N);
  const auto bits = given.optional_view("bits"), set_index = given.optional_view("set_index");
  if (bits.has_value() != set_index.has_value()) {
    fail("set_index", "bits and set_index together", "one without the other");
  }
  int64_t sets = 0;
  if (bits) {
    selection.masks = (S + 31) / 32;
    const auto packed = output<2>("bits", *bits, Dtype::int32, {ANY, selection.masks});
    selection.bits = static_cast<const int32_t*>(packed.data);
    selection.set_index = array<const int32_t>("set_index", *set_index, N);
    sets = packed.size[0];
  }
  for (int64_t n = 0; n < N; ++n) {
    const int64_t least = n == 0 ? 0 : selection.sequence[n - 1];
    check_range("sequence", n, selection.sequence[n], least, B - 1);
    check_range("stop", n, selection.stop[n], 0, S);
    check_range("start", n, selection.start[n], 0, selection.stop[n]);
    if (bits) check_range("set_index", n, selection.set_index[n], -1, sets - 1);
  }
  return selection;
}

// What the ops over query rows share: dtype, q, k, selection, scale, softcap and threads.
template <class Op>
void take_attention(Arguments& given, Op& op) {
  const View q = given.view("q");
  auto& inputs = op.inputs;
  inputs.dtype = dtype_among("q", q, 3, "float32 (0), bfloat16 (1) or float16 (2)");
  const double scale = given.take<double>("scale");
  if (!std::isfinite(scale)) fail("scale", "a finite number", std::to_string(scale));
  inputs.q = tensor<3>("q", q, inputs.dtype, {ANY, ANY, ANY});
  const auto [N, Hq, D] = inputs.q.size;
  inputs.k = given.tensor<4>("k", inputs.dtype, {ANY, ANY, ANY, D});
  const auto [B, Hkv, S, unused] = inputs.k.size;
  if (D < 1) fail("k", "a head dimension >= 1", "0");
  if (Hkv < 1 || Hq % Hkv != 0) {
    fail("k", "heads that divide q's " + std::to_string(Hq), std::to_string(Hkv));
  }
  op.selection = take_selection(given, N, B, S);
  op.options.scale = static_cast<float>(scale);
  op.options.softcap = take_softcap(given);
  op.options.threads = take_threads(given);
}

// v [B, Hkv, S, Dv].
Tensor<4> values(const View& v, Dtype dtype, const Tensor<4>& k) {
  const auto result = tensor<4>("v", v, dtype, {k.size[0], k.size[1], k.size[2], ANY});
  if (result.size[3] < 1) fail("v", "a head dimension >= 1", "0");
  return result;
}

SideAttention take_side_attention(Arguments& given) {
  SideAttention op{};
  take_attention(given, op);
  op.inputs.v = values(given.view("v"), op.inputs.dtype, op.inputs.k);
  return op;
}

AttentionMap::Columns take_columns(Arguments& given, int64_t B, int64_t S) {
  const auto view = given.output<2>("columns", Dtype::int32, {B, ANY});
  const AttentionMap::Columns columns{static_cast<const int32_t*>(view.data), view.size[1]};
  for (int64_t b = 0; b < B; ++b) {
    int64_t last = -1;
    for (int64_t c = 0; c < columns.count; ++c) {
      const int32_t key = columns.keys[b * columns.count + c];
      if (key == -1) continue;
      check_range("columns", b, key, last + 1, S - 1);  // ascending
      last = key;
    }
  }
  return columns;
}

AttentionMap take_attention_map(Arguments& given) {
  const int kind = given.take<int>("kind");
  if (kind < 0 || kind > 3) fail("kind", "0 to 3", std::to_string(kind));
  AttentionMap op{};
  op.options.kind = static_cast<MapKind>(kind);
  const bool contributes = op.options.kind == MapKind::contribution, kl = kind > 1;
  take_attention(given, op);
  AttentionMap::Inputs& inputs = op.inputs;
  op.columns = take_columns(given, inputs.k.size[0], inputs.k.size[2]);
  const int64_t N = inputs.q.size[0], Hq = inputs.q.size[1];
  const auto v = given.optional_view("v"), g = given.optional_view("g");
  const auto head_weight = given.optional_view("head_weight");
  const auto target = given.optional_view("target"), lse = given.optional_view("lse");
  if (v.has_value() != contributes || g.has_value() != contributes) {
    fail("v", "v and g exactly for a contribution", "another choice");
  }
  if (head_weight.has_value() == contributes) {
    fail("head_weight", "either head_weight or v and g", "both or neither");
  }
  if (target.has_value() != kl) fail("target", "a target exactly for a KL", "another choice");
  if (contributes) {
    inputs.v = values(*v, inputs.dtype, inputs.k);
    inputs.g = tensor<3>("g", *g, inputs.dtype, {N, Hq, inputs.v.size[3]});
  } else {
    inputs.head_weight = tensor<2>("head_weight", *head_weight, Dtype::float32, {N, Hq});
  }
  if (kl) inputs.target = tensor<2>("target", *target, Dtype::float32, {N, op.columns.count});
  if (lse) inputs.lse = tensor<2>("lse", *lse, Dtype::float32, {N, Hq});
  op.options.over_columns = given.take<bool>("over_columns");
  op.options.rectify = given.take<bool>("rectify");
  op.options.lse_grad = given.take<bool>("lse_grad");
  if (lse && op.options.over_columns) fail("lse", "no lse with over_columns", "one");
  if (op.options.lse_grad && !lse) fail("lse_grad", "an lse", "none");
  return op;
}

// The map [N, C] or the KL [N], or its gradient.
float* map_or_kl(Arguments& given, const std::string& name, const AttentionMap& op) {
  const int64_t N = op.inputs.q.size[0];
  const bool kl = op.options.kind == MapKind::kl_mean || op.options.kind == MapKind::kl_each;
  if (kl) return given.array<float>(name, N);
  return static_cast<float*>(given.output<2>(name, Dtype::float32, {N, op.columns.count}).data);
}

LinearCrossEntropy::Labels take_labels(Arguments& given, const int64_t* target, int64_t N,
                                       int64_t V) {
  LinearCrossEntropy::Labels labels{};
  labels.target = target;
  for (int64_t n = 0; n < N; ++n) check_range("target", n, labels.target[n], 0, V - 1);
  const auto ids = given.optional_view("ids"), offsets = given.optional_view("offsets");
  const auto index = given.optional_view("index");
  if (ids.has_value() != offsets.has_value() || ids.has_value() != index.has_value()) {
    fail("ids", "ids, offsets and index together", "one without the others");
  }
  const auto weights = given.optional_view("weights");
  if (weights && !ids) fail("weights", "weights of given ids", "weights without ids");
  labels.own = given.optional_array<const float>("own", N);
  labels.class_weight = given.optional_array<const float>("class_weight", V);
  if (!ids) return labels;
  labels.ids = array<const int64_t>("ids", *ids, ANY);
  labels.offsets = array<const int64_t>("offsets", *offsets, ANY);
  labels.index = array<const int64_t>("index", *index, N);
  const int64_t T = std::get<2>(*ids)[0], G = std::get<2>(*offsets)[0] - 1;
  if (G < 0) fail("offsets", "at least one offset", "none");
  if (weights) labels.weights = array<const float>("weights", *weights, T);
  labels.lists = G;
  for (int64_t g = 0; g <= G; ++g) {
    const int64_t offset = labels.offsets[g], last = g == 0 ? 0 : labels.offsets[g - 1];
    check_range("offsets", g, offset, last, g == 0 ? 0 : T);
    labels.longest = std::max(labels.longest, offset - last);
  }
  for (int64_t i = 0; i < labels.offsets[G]; ++i) check_range("ids", i, labels.ids[i], 0, V - 1);
  for (int64_t n = 0; n < N; ++n) check_range("index", n, labels.index[n], -1, G - 1);
  return labels;
}

// hidden [N, D] and weight [V, D], or neither: then another library multiplies, and leaves its
// logits. Ours leave logits or scores.
void take_head(Arguments& given, LinearCrossEntropy& op) {
  LinearCrossEntropy::Inputs& inputs = op.inputs;
  const auto logits = given.optional_view("logits"), scores = given.optional_view("scores");
  const auto hidden = given.optional_view("hidden"), weight = given.optional_view("weight");
  if (hidden.has_value() != weight.has_value()) {
    fail("weight", "hidden and weight together", "one without the other");
  }
  if (!weight && !logits) fail("logits", "logits or a weight", "neither");
  if (weight && logits.has_value() == scores.has_value()) {
    fail("logits", "with a weight either logits or scores", "both or neither");
  }
  const std::string name = weight ? "weight" : "logits";
  inputs.dtype = dtype_among(name, weight ? *weight : *logits, 2, "float32 (0) or bfloat16 (1)");
  const std::vector<int64_t> shape{weight ? padded(inputs.V) : inputs.V, padded(inputs.N)};
  if (logits) op.saved.logits = output<2>("logits", *logits, inputs.dtype, shape).data;
  if (scores) {
    op.saved.scores =
        static_cast<float*>(output<2>("scores", *scores, Dtype::float32, shape).data);
  }
  if (!weight) return;
  if (inputs.dtype == Dtype::bfloat16 && !has_matrix_product(Dtype::bfloat16)) {
    fail("weight", "float32 (0) on a CPU that does not multiply bfloat16", "bfloat16 (1)");
  }
  inputs.weight = tensor<2>("weight", *weight, inputs.dtype, {inputs.V, ANY});
  inputs.D = inputs.weight.size[1];
  inputs.hidden = tensor<2>("hidden", *hidden, inputs.dtype, {inputs.N, inputs.D});
}

float* take_floats(Arguments& given, const std::string& name, const std::vector<int64_t>& shape) {
  return static_cast<float*>(given.output<2>(name, Dtype::float32, shape).data);
}

LinearCrossEntropy::Options take_loss_options(Arguments& given) {
  const double smoothing = given.take<double>("smoothing");
  if (!(smoothing >= 0 && smoothing < 1)) {
    fail("smoothing", "a share in [0, 1)", std::to_string(smoothing));
  }
  const double label_smoothing = given.take<double>("label_smoothing");
  if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
    fail("label_smoothing", "a share in [0, 1]", std::to_string(label_smoothing));
  }
  const double z_loss = given.take<double>("z_loss");
  if (!(z_loss >= 0 && std::isfinite(z_loss))) {
    fail("z_loss", "a finite factor >= 0", std::to_string(z_loss));
  }
  const double temperature = given.take<double>("temperature");
  if (!(temperature > 0 && std::isfinite(temperature))) {
    fail("temperature", "a positive finite number", std::to_string(temperature));
  }
  return {static_cast<float>(smoothing),   take_softcap(given),
          static_cast<float>(temperature), static_cast<float>(label_smoothing),
          static_cast<float>(z_loss),      take_threads(given)};
}

LinearCrossEntropy take_linear_cross_entropy(Arguments& given) {
  LinearCrossEntropy op{};
  LinearCrossEntropy::Inputs& inputs = op.inputs;
  inputs.V = given.take<int64_t>("vocabulary");
  if (inputs.V < 1 || inputs.V > MAX_SIZE) {
    fail("vocabulary", "1 to 2^31 - 1", std::to_string(inputs.V));
  }
  op.options = take_loss_options(given);
  const auto target = tensor<1>("target", given.view("target"), Dtype::int64, {ANY});
  inputs.N = target.size[0];
  take_head(given, op);
  op.labels = take_labels(given, static_cast<const int64_t*>(target.data), inputs.N, inputs.V);
  const int64_t width = padded(inputs.N), blocks = (inputs.V + ENTRIES - 1) / ENTRIES;
  op.saved.tops = take_floats(given, "tops", {blocks, width});
  op.saved.terms = take_floats(given, "terms", {ROW_TERMS, width});
  const auto slopes = given.optional_view("slopes");
  const bool capped = op.labels.ids != nullptr && op.options.softcap > 0.0f;
  if (slopes.has_value() != (capped && op.saved.scores == nullptr)) {
    fail("slopes", "slopes exactly for ids with a softcap and without scores", "another choice");
  }
  if (slopes) {
    const auto rows = output<2>("slopes", *slopes, Dtype::float32, {inputs.N, op.labels.longest});
    op.saved.slopes = static_cast<float*>(rows.data);
  }
  return op;
}

LinearCrossEntropy::Gradients take_gradients(Arguments& given, const LinearCrossEntropy& op) {
  const LinearCrossEntropy::Inputs& inputs = op.inputs;
  const bool own = inputs.weight.data != nullptr;
  const auto dlogits = given.optional_view("dlogits"), dhidden = given.optional_view("dhidden");
  const auto dweight = given.optional_view("dweight");
  if (dhidden.has_value() != own) {
    fail("dhidden", "dhidden and weight together", "one without the other");
  }
  if (dlogits.has_value() == own) fail("dlogits", "either dlogits or weight", "both or neither");
  if (dweight && !own) fail("dweight", "dweight only with weight", "dweight alone");
  LinearCrossEntropy::Gradients to{};
  to.dbias = given.optional_array<float>("dbias", inputs.V);
  if (to.dbias != nullptr && !own) fail("dbias", "dbias only with weight", "dbias alone");
  if (dlogits) {
    const int64_t width = padded(inputs.N);
    to.dlogits = output<2>("dlogits", *dlogits, inputs.dtype, {inputs.V, width}).data;
  } else {
    to.dhidden = output<2>("dhidden", *dhidden, inputs.dtype, {inputs.N, inputs.D});
  }
  to.dtype = inputs.dtype;
  to.add = given.take<bool>("add");
  if (dweight) {
    const bool float32 = std::get<1>(*dweight) == static_cast<int>(Dtype::float32);
    if (to.add || float32) to.dtype = Dtype::float32;
    to.dweight = output<2>("dweight", *dweight, to.dtype, {inputs.V, inputs.D});
  }
  return to;
}

}  // namespace

void forward_side_attention(Arguments& given) {
  const SideAttention op = take_side_attention(given);
  const int64_t N = op.inputs.q.size[0], Hq = op.inputs.q.size[1], Dv = op.inputs.v.size[3];
  const SideAttention::Results to{given.output<3>("out", op.inputs.dtype, {N, Hq, Dv}),
                                  given.output<2>("lse", Dtype::float32, {N, Hq})};
  given.run([&] { side_attention_forward(op, to); });
}

void backward_side_attention(Arguments& given) {
  const SideAttention op = take_side_attention(given);
  const Dtype dtype = op.inputs.dtype;
  const auto [N, Hq, D] = op.inputs.q.size;
  const auto [B, Hkv, S, Dv] = op.inputs.v.size;
  const SideAttention::Upstream from{given.tensor<3>("dout", dtype, {N, Hq, Dv}),
                                     given.tensor<2>("dlse", Dtype::float32, {N, Hq}),
                                     given.tensor<2>("lse", Dtype::float32, {N, Hq})};
  const SideAttention::Gradients to{given.output<3>("dq", dtype, {N, Hq, D}),
                                    given.output<4>("dk", dtype, {B, Hkv, S, D}),
                                    given.output<4>("dv", dtype, {B, Hkv, S, Dv})};
  given.run([&] { side_attention_backward(op, from, to); });
}

void forward_attention_map(Arguments& given) {
  const AttentionMap op = take_attention_map(given);
  float* const out = map_or_kl(given, "out", op);
  given.run([&] { attention_map_forward(op, out); });
}

void backward_attention_map(Arguments& given) {
  const AttentionMap op = take_attention_map(given);
  const AttentionMap::Inputs& inputs = op.inputs;
  const auto dv = given.optional_view("dv"), dg = given.optional_view("dg");
  const auto dhead_weight = given.optional_view("dhead_weight"), dlse = given.optional_view("dlse");
  const bool contributes = op.options.kind == MapKind::contribution;
  if (dv.has_value() != contributes || dg.has_value() != contributes ||
      dhead_weight.has_value() == contributes) {
    fail("dv", "a gradient for each of v, g and head_weight given", "another choice");
  }
  if (dlse.has_value() != op.options.lse_grad) {
    fail("dlse", "a dlse exactly with lse_grad", "another choice");
  }
  const auto [N, Hq, D] = inputs.q.size;
  const auto [B, Hkv, S, unused] = inputs.k.size;
  const int64_t Dv = inputs.v.size[3];
  const float* const upstream = map_or_kl(given, "upstream", op);
  AttentionMap::Gradients to{};
  to.dq = given.output<3>("dq", inputs.dtype, {N, Hq, D});
  to.dk = given.output<4>("dk", inputs.dtype, {B, Hkv, S, D});
  if (contributes) {
    to.dv = output<4>("dv", *dv, inputs.dtype, {B, Hkv, S, Dv});
    to.dg = output<3>("dg", *dg, inputs.dtype, {N, Hq, Dv});
  } else {
    to.dhead_weight = output<2>("dhead_weight", *dhead_weight, Dtype::float32, {N, Hq});
  }
  if (dlse) to.dlse = output<2>("dlse", *dlse, Dtype::float32, {N, Hq});
  given.run([&] { attention_map_backward(op, upstream, to); });
}

void forward_linear_cross_entropy(Arguments& given) {
  LinearCrossEntropy op = take_linear_cross_entropy(given);
  const int64_t N = op.inputs.N;
  op.inputs.bias = given.optional_array<const float>("bias", op.inputs.V);
  LinearCrossEntropy::Results to{};
  to.loss = given.array<float>("loss", N);
  to.log_prob = given.array<float>("log_prob", N);
  to.lse = given.array<float>("lse", N);
  to.entropy = given.optional_array<float>("entropy", N);
  to.predicted = given.array<int64_t>("predicted", N);
  const auto ids = given.optional_view("top_ids"), values = given.optional_view("top_log_probs");
  if (ids.has_value() != values.has_value()) {
    fail("top_ids", "top_ids and top_log_probs together", "one without the other");
  }
  if (ids) {
    const auto likeliest = output<2>("top_ids", *ids, Dtype::int64, {N, ANY});
    to.k = likeliest.size[1];
    if (to.k < 1 || to.k > MOST_TOP) fail("top_ids", "1 to 32 columns", std::to_string(to.k));
    to.top_ids = static_cast<int64_t*>(likeliest.data);
    const auto rows = output<2>("top_log_probs", *values, Dtype::float32, {N, to.k});
    to.top_log_probs = static_cast<float*>(rows.data);
  }
  given.run([&] { linear_cross_entropy_forward(op, to); });
}

void backward_linear_cross_entropy(Arguments& given) {
  const LinearCrossEntropy op = take_linear_cross_entropy(given);
  const int64_t N = op.inputs.N;
  const LinearCrossEntropy::Upstream from{given.optional_array<const float>("dloss", N),
                                          given.optional_array<const float>("dlog_prob", N),
                                          given.optional_array<const float>("dlse", N),
                                          given.optional_array<const float>("dentropy", N)};
  const bool spread = op.options.label_smoothing > 0.0f && op.options.softcap > 0.0f;
  if ((from.dentropy != nullptr || spread) && op.saved.scores == nullptr) {
    fail("scores", "scores for dentropy, and for label_smoothing with a softcap", "None");
  }
  const LinearCrossEntropy::Gradients to = take_gradients(given, op);
  given.run([&] { linear_cross_entropy_backward(op, from, to); });
}

}  // namespace groundkern
