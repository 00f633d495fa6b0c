"""Calls of linear cross entropy that tests and benchmarks share."""

from collections.abc import Callable
from dataclasses import replace

import torch

from groundkern.ops.cases import Call, integers, randn
from groundkern.ops.linear_cross_entropy.api import linear_cross_entropy, linear_log_prob
from groundkern.selection import LabelBags, SoftTargets

TARGET = [3, -100, 96, 0, 41, 41, -100, 7]


def call(
    dtype, device, *, vocabulary: int = 97, dim: int = 24, bias: bool = False, **options
) -> Call:
    """Eight rows, two of them ignored."""
    inputs = {
        "hidden": randn(1, 8, dim, dtype=dtype, device=device),
        "weight": randn(2, vocabulary, dim, dtype=dtype, device=device),
    }
    if bias:
        inputs["bias"] = randn(3, vocabulary, dtype=dtype, device=device)
    options = {"target": integers(TARGET, device, torch.int64), **options}
    return Call(linear_cross_entropy, inputs, options)


def bags(device) -> LabelBags:
    """Image 0 repeats labels, 1 holds only the row's own, 2 nothing, 3 not the row's own."""
    return LabelBags(
        integers([3, 3, 5, 96, 3, 41, 11, 60, 61, 0, 0], device, torch.int64),
        integers([0, 5, 6, 6, 9], device, torch.int64),
        integers([0, 0, 0, -1, 1, 0, 3, 2], device, torch.int64),
    )


def _row_weight(device):
    return randn(4, 8, dtype=torch.float32, device=device) * (torch.arange(8, device=device) != 4)


def _smoothed(dtype, device) -> Call:
    return call(dtype, device, bags=bags(device), smoothing=0.3)


def _everything(dtype, device) -> Call:
    return call(
        dtype,
        device,
        bias=True,
        bags=bags(device),
        smoothing=0.3,
        softcap=3.0,
        row_weight=_row_weight(device),
        reduction="none",
    )


def _class_weight(device, vocabulary: int = 97):
    """Uneven, and 0 for some."""
    drawn = randn(6, vocabulary, dtype=torch.float32, device=device).abs()
    return drawn * (torch.arange(vocabulary, device=device) % 7 != 5)


def soft_targets(device) -> SoftTargets:
    """Rows that repeat labels, are one-hot, empty (row 2), short or do not sum to 1."""
    ids = [
        [3, 5, 3, 96],
        [0, -100, -100, -100],
        [-100, -100, -100, -100],
        [7, 8, 9, 10],
        [41, 40, -100, 41],
        [-100, 11, -100, 96],
        [1, 2, 1, 2],
        [60, 61, 62, 63],
    ]
    probabilities = randn(9, 8, 4, dtype=torch.float32, device=device).abs() / 3
    probabilities[3] = torch.tensor([0.0, 1.0, 0.0, 0.0], device=device)
    probabilities[7] = 0.25
    return SoftTargets(integers(ids, device, torch.int64), probabilities)


def _soft(dtype, device, **options) -> Call:
    return call(dtype, device, **{"target": soft_targets(device), **options})


def _weighted(dtype, device) -> Call:
    return call(dtype, device, class_weight=_class_weight(device), label_smoothing=0.2)


def _all_at_once(dtype, device) -> Call:
    """Every option that a call can have, its rows uneven."""
    c = _everything(dtype, device)
    more = {
        "temperature": 0.6,
        "label_smoothing": 0.15,
        "class_weight": _class_weight(device),
        "z_loss": 0.02,
        "entropy": True,
        "top_k": 5,
    }
    return replace(c, options={**c.options, **more})


def _soft_all_at_once(dtype, device) -> Call:
    c = _all_at_once(dtype, device)
    options = {n: x for n, x in c.options.items() if n not in ("bags", "smoothing")}
    options = {**options, "target": soft_targets(device), "reduction": "mean"}
    return replace(c, options=options)


def log_prob_and_entropy(*operands, **options):
    """`linear_log_prob` with its differentiable results first."""
    log_prob, lse, predicted, entropy, *top = linear_log_prob(*operands, entropy=True, **options)
    return log_prob, lse, entropy, predicted, *top


def _entropy(dtype, device) -> Call:
    c = call(dtype, device, bias=True, softcap=4.0, temperature=1.7, top_k=3)
    return replace(c, function=log_prob_and_entropy, differentiable=3)


def _certain_targets(dtype, device) -> Call:
    """p -> 1: 1 - p is far below fp32's spacing at 1."""
    c = call(dtype, device, reduction="none")
    target = c.options["target"]
    hidden = c.inputs["weight"][target.clamp(min=0)] * 1.5
    return replace(c, inputs={**c.inputs, "hidden": hidden.clone()})


def _common_logit(dtype, device) -> Call:
    """Every logit has 2^24 on top, unseen by a softmax; even integers keep fp32 logits exact."""
    c = call(dtype, device, reduction="none")
    hidden, weight = (c.inputs[n].clone() for n in ("hidden", "weight"))
    hidden[:, 0], weight[:, 0] = 2.0**12, 2.0**12
    hidden[:, 1:], weight[:, 1:] = hidden[:, 1:].round(), 2 * weight[:, 1:].round()
    return replace(c, inputs={"hidden": hidden, "weight": weight})


def _log_prob(dtype, device) -> Call:
    c = call(dtype, device, bias=True, softcap=4.0)
    return replace(c, function=linear_log_prob, differentiable=2)


def _leading_shape(dtype, device) -> Call:
    c = call(dtype, device, reduction="none", row_weight=_row_weight(device).view(2, 4))
    inputs = {**c.inputs, "hidden": c.inputs["hidden"].view(2, 4, -1)}
    return replace(
        c, inputs=inputs, options={**c.options, "target": c.options["target"].view(2, 4)}
    )


def _strided(dtype, device) -> Call:
    c = _smoothed(dtype, device)
    hidden = randn(5, 8, 48, dtype=dtype, device=device)[:, ::2]
    weight = randn(6, 24, 97, dtype=dtype, device=device).t()
    return replace(c, inputs={"hidden": hidden, "weight": weight})


def _stepped(x):
    """The same values, every second one of a longer tensor."""
    return torch.stack([x, x.clone().fill_(1)], -1).flatten(-2)[..., ::2]


def _strided_labels(dtype, device) -> Call:
    """Nothing but hidden and weight is contiguous."""
    c = _all_at_once(dtype, device)
    tensors = {n: _stepped(x) for n, x in c.options.items() if isinstance(x, torch.Tensor)}
    label_bags = LabelBags(*(_stepped(x) for x in bags(device).tensors()))
    return replace(
        c,
        inputs={**c.inputs, "bias": _stepped(c.inputs["bias"])},
        options={**c.options, **tensors, "bags": label_bags},
    )


def _soft_of_a_label(dtype, device) -> Call:
    """Rows whose log-probability is of a label that is not their likeliest, or not listed."""
    labels = [5, 1, 4, 10, 40, 11, 2, 0]
    soft = replace(soft_targets(device), label=integers(labels, device, torch.int64))
    return call(dtype, device, target=soft, reduction="none")


def _strided_soft_targets(dtype, device) -> Call:
    c, soft = _soft_all_at_once(dtype, device), soft_targets(device)
    target = SoftTargets(_stepped(soft.ids), soft.probabilities.t().contiguous().t())
    return replace(c, options={**c.options, "target": target})


def _all_ignored(dtype, device) -> Call:
    c = call(dtype, device)
    return replace(c, options={**c.options, "target": torch.full((8,), -100, device=device)})


def _no_rows(dtype, device) -> Call:
    c = call(dtype, device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    inputs = {**c.inputs, "hidden": c.inputs["hidden"][:0]}
    return replace(c, inputs=inputs, options={**c.options, "target": target})


CASES: dict[str, Callable[[torch.dtype, torch.device], Call]] = {
    "mean": call,
    "sum_weighted": lambda t, d: call(t, d, reduction="sum", row_weight=_row_weight(d)),
    "mean_weighted_bias": lambda t, d: call(t, d, bias=True, row_weight=_row_weight(d)),
    "softcap": lambda t, d: call(t, d, softcap=2.0, reduction="none"),
    "smoothed": _smoothed,
    "everything": _everything,
    "certain_targets": _certain_targets,
    "common_logit": _common_logit,
    "log_prob": _log_prob,
    "leading_shape": _leading_shape,
    "strided": _strided,
    "label_smoothing": lambda t, d: call(t, d, label_smoothing=0.3, reduction="none"),
    "class_weight": lambda t, d: call(t, d, class_weight=_class_weight(d)),
    "weighted_smoothing": _weighted,
    "weighted_bags": lambda t, d: call(
        t, d, bags=bags(d), smoothing=0.4, class_weight=_class_weight(d), reduction="none"
    ),
    "temperature": lambda t, d: call(t, d, temperature=0.5, z_loss=0.1, reduction="none"),
    "soft_targets": _soft,
    "soft_targets_of_rows": lambda t, d: _soft(t, d, reduction="none", label_smoothing=0.1),
    "top_k": lambda t, d: call(t, d, top_k=32, entropy=True),
    "all_at_once": _all_at_once,
    "soft_of_a_label": _soft_of_a_label,
    "soft_all_at_once": _soft_all_at_once,
    "entropy": _entropy,
    "strided_labels": _strided_labels,
    "strided_soft_targets": _strided_soft_targets,
    "all_ignored": _all_ignored,
    "no_rows": _no_rows,
    "one_entry": lambda t, d: replace(
        call(t, d, vocabulary=1, reduction="none"),
        options={"target": torch.zeros(8, dtype=torch.int64, device=d), "reduction": "none"},
    ),
}
