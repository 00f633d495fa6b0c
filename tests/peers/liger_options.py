"""Liger-Kernel 0.8.2, test/transformers/test_cross_entropy.py: 185 cases.

That loss takes logits. Here they come from a head: at CI's sizes hidden is the logits and the
weight the identity, so that dx is the gradient of the logits, elementwise; 32,000 labels have a
head of 64 dimensions, whose dx sums over the labels, so that each element is held to the largest.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.compat import liger
from tests import closeness
from tests.peers import truth
from tests.peers.case import (
    FLOATS,
    Values,
    assert_allclose,
    gradients,
    grid,
    leaves,
    rounds_before_products,
)

SUITE = "Liger cross entropy"
SHAPES = {"B T V": [(2, 4096, 32000), (3, 423, 32000)]}
REDUCTIONS = ["sum", "mean", "none"]
DTYPES = {"dtype atol rtol": [("bf16", 1e-8, 5e-2), ("fp32", 1e-8, 1e-6)]}
BOTH = [True, False]
MIXED = "ignore_index lse_square_scale label_smoothing softcap"
OPTIONS = ("lse_square_scale", "label_smoothing", "reduction", "ignore_index")
RANK = 64


def small(values: Values) -> Values:
    rows = {4096: 64, 1024: 64, 423: 23}.get(values["T"], values["T"])
    return {**values, "T": rows, "V": min(values["V"], 384)}


def _head(v: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] and weight [V, D] whose logits are standard normal, and target [N]."""
    count, size = v["B"] * v["T"], v["V"]
    if size <= 512:
        x, weight = torch.randn(count, size, dtype=dtype), torch.eye(size, dtype=dtype)
    else:
        x = torch.randn(count, RANK, dtype=dtype) * RANK**-0.5
        weight = torch.randn(size, RANK, dtype=dtype)
    return x, weight, torch.randint(0, size, (count,))


def _ignored(v: Values, target: Tensor) -> Tensor:
    named = v.get("ignore_index")
    return target if named is None else truth.some_ignored(target, named)


def _class_weight(v: Values, dtype: torch.dtype) -> Tensor | None:
    return torch.rand(v["V"]).to(dtype) if v.get("class_weights") else None


def check(v: Values) -> None:
    """The loss, its z loss, and dx; twice the loss's gradient where it is not the last layer."""
    dtype = FLOATS[v["dtype"]]
    x, weight, target = _head(v, dtype)
    target = _ignored(v, target)
    class_weight = _class_weight(v, torch.float32 if "softcap" in v else dtype)
    options = {name: v[name] for name in OPTIONS if v.get(name) is not None}
    returned = v.get("return_z_loss", False)
    (ours,), (theirs,) = leaves(x), leaves(x)
    module = liger.LigerFusedLinearCrossEntropyLoss(
        class_weight,
        softcap=v.get("softcap"),
        return_z_loss=returned,
        **options,
    )
    result = module(weight, ours, target)
    loss = result.loss if returned else result
    z = truth.logits(theirs, weight, None, v.get("softcap"))
    wide = None if class_weight is None else class_weight.float()
    expected, expected_z = truth.with_z_loss(z, target, wide, **options)
    tolerance = v["atol"], v["rtol"]
    assert_allclose("loss", loss, expected, *tolerance)
    if returned:
        assert_allclose("z loss", result.z_loss, expected_z, *tolerance)
    factor = 3.0 if v.get("not_last") else 1.0
    upstream = torch.full_like(loss, factor)
    (a,), (b,) = (
        gradients(*pair, upstream=upstream) for pair in ((loss, ours), (expected, theirs))
    )
    if rounds_before_products(dtype):
        (wide_x,) = leaves(x.double())
        z = truth.logits(wide_x, weight.double(), None, v.get("softcap"))
        total, _ = truth.with_z_loss(z, target, wide, **options)
        (exact,) = gradients(total, wide_x, upstream=upstream)
        closeness.assert_close("dx", a, b, exact, closeness.GRADIENTS)
        return
    if len(weight) != weight.shape[1]:
        tolerance = v["atol"] + v["rtol"] * float(b.abs().max()), 0.0
    assert_allclose("dx", a, b, *tolerance)


def check_functional(v: Values) -> None:
    """The function against the module, every option at once."""
    x, weight, target = _head(v, FLOATS[v["dtype"]])
    (a,), (b,) = leaves(x), leaves(x)
    options = {"lse_square_scale": 1e-4, "label_smoothing": 0.1, "softcap": 30.0}
    options |= {"ignore_index": 0, "return_z_loss": True}
    one = liger.liger_fused_linear_cross_entropy(a, weight, target, **options)
    other = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, b, target)
    upstream = torch.randn(())
    for p, q in zip(one[:2], other[:2]):
        assert_allclose("loss", p, q, v["atol"], v["rtol"])
    pair = gradients(one.loss, a, upstream=upstream), gradients(other.loss, b, upstream=upstream)
    assert_allclose("dx", pair[0][0], pair[1][0], v["atol"], v["rtol"])


def check_fp32_inside(v: Values) -> None:
    """bf16 logits lose nothing further: the same loss and gradient as from fp32 copies of them."""
    x, weight, target = _head(v, torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        (a,) = leaves(x.to(dtype))
        loss = liger.LigerFusedLinearCrossEntropyLoss()(weight.to(dtype), a, target)
        results.append((loss, gradients(loss, a)[0]))
    (loss, dx), (wide_loss, wide_dx) = results
    assert_allclose("loss", loss, wide_loss, 1e-8, 1e-5)
    assert_allclose("dx", dx, wide_dx.bfloat16(), 2e-8, 2**-7)


def check_out_of_bounds(v: Values) -> None:
    """One target above the vocabulary, then one below 0."""
    x, weight, target = _head(v, torch.float32)
    target = truth.some_ignored(target, v["ignore_index"])
    at = int((target != v["ignore_index"]).nonzero()[0])
    module = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=v["ignore_index"])
    for label in (v["V"], -1):
        target[at] = label
        with pytest.raises(ValueError, match="target"):
            module(weight, x, target)


def check_forward_only(v: Values) -> None:
    x, weight, target = _head(v, FLOATS[v["dtype"]])
    (x,) = leaves(x)
    target = truth.some_ignored(target, v["ignore_index"])
    options = {name: v[name] for name in ("reduction", "ignore_index")}
    with torch.no_grad():
        loss = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, x, target)
        expected = F.cross_entropy(truth.logits(x, weight, None, None).float(), target, **options)
    assert_allclose("loss", loss, expected, v["atol"], v["rtol"])
    assert not loss.requires_grad


def check_output(v: Values) -> None:
    x = torch.tensor([[2.0, 0.5, -1.0], [0.1, 1.5, 0.3], [0.7, -0.2, 0.9]], requires_grad=True)
    target, weight = torch.tensor([0, 1, 2]), torch.eye(3)
    result = liger.liger_fused_linear_cross_entropy(x, weight, target, **v)
    if not any(v.values()):
        assert result.shape == () and gradients(result, x)[0].shape == x.shape
        return
    predicted = x.argmax(-1)
    assert result.loss.shape == () and gradients(result.loss, x)[0].shape == x.shape
    assert (result.z_loss is not None) == v["return_z_loss"]
    assert (result.token_accuracy is not None) == v["return_token_accuracy"]
    assert (result.predicted_tokens is not None) == v["return_predicted_tokens"]
    if v["return_token_accuracy"]:
        accuracy = (predicted == target).float().mean()
        assert_allclose("accuracy", result.token_accuracy, accuracy, 1e-6, 0.0)
    if v["return_predicted_tokens"]:
        assert torch.equal(result.predicted_tokens, predicted)


def check_predicted_tokens(v: Values) -> None:
    x, weight, target = _head(v, FLOATS[v["dtype"]])
    (x,) = leaves(x)
    target[torch.randperm(len(target))[: len(target) // 4]] = v["ignore_index"]
    module = liger.LigerFusedLinearCrossEntropyLoss(
        ignore_index=v["ignore_index"], return_predicted_tokens=True
    )
    result = module(weight, x, target)
    counted = target != v["ignore_index"]
    expected = torch.where(counted, x.float().argmax(-1), -1)
    assert torch.equal(result.predicted_tokens, expected)
    assert gradients(result.loss, x)[0].isfinite().all()


def check_confident(v: Values) -> None:
    """p -> 1 at the target: its gradient is p - (1 - e), which must not cancel. As exact as 4 times
    torch's own from the same bf16 or fp16 logits. The head is the identity also at 4,096 labels."""
    dtype, count = FLOATS[v["dtype"]], v["B"] * v["T"]
    logits, target = torch.randn(count, v["V"]), torch.randint(0, v["V"], (count,))
    rows = torch.arange(count)
    logits[rows, target] = logits.max(-1).values + 10.0
    x, weight = logits.to(dtype), torch.eye(v["V"], dtype=dtype)
    options = {name: v[name] for name in ("reduction", "label_smoothing")}
    (ours, theirs), (wide,) = leaves(x, x), leaves(x.float())
    module = liger.LigerFusedLinearCrossEntropyLoss(**options)
    (a,) = gradients(module(weight, ours, target), ours)
    (b,) = gradients(F.cross_entropy(theirs, target, **options), theirs)
    (exact,) = gradients(F.cross_entropy(wide, target, **options), wide)
    a, b, exact = (g[rows, target].double() for g in (a, b, exact))
    error, allowed = (a - exact).abs().max(), 4 * (b - exact).abs().max()
    assert error <= max(float(allowed), torch.finfo(dtype).tiny), f"{error:.3e} > {allowed:.3e}"


def _all(test: str, axes: dict, shapes: dict = SHAPES, **fixed) -> list:
    return grid(SUITE, test, check, {**shapes, **axes, **DTYPES}, small, **fixed)


IGNORE = {"B T V ignore_index": [(2, 4096, 32000, 2), (3, 423, 32000, -123)]}
SMOOTH = {"B T V label_smoothing": [(2, 4096, 32000, 0.1), (3, 423, 32000, 0.1)]}
SMOOTH_IGNORE = [(2, 4096, 32000, 1, 0.1), (3, 423, 32000, -300, 0.2)]
CAPPED = {"B T V softcap": [(2, 4096, 32000, 30.0), (3, 423, 32000, 30.0)]}
EACH = {"reduction": REDUCTIONS}
FLAGS = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")
MIXTURES = {MIXED: [(-100, 1e-4, 0.1, 30.0), (42, 1e-5, 0.2, 40.0)]}
FORWARD = {
    "B T V ignore_index": [(2, 4096, 32000, -100), (3, 423, 32000, 2)],
    "reduction": REDUCTIONS,
    "dtype atol rtol": [("fp32", 1e-4, 1e-4), ("fp16", 1e-2, 1e-2), ("bf16", 1e-2, 1e-2)],
}
CASES = [
    *_all("test_correctness", EACH),
    *grid(
        SUITE,
        "test_correctness_functional",
        check_functional,
        {"B T V": [(2, 2, 8), (9, 7, 41)], **DTYPES},
    ),
    *_all("test_correctness_with_ignore_index", EACH, IGNORE),
    *_all("test_correctness_with_label_smoothing_once", {}, SMOOTH),
    *_all(
        "test_correctness_with_label_smoothing_with_ignore_index_once",
        {},
        {"B T V ignore_index label_smoothing": SMOOTH_IGNORE},
    ),
    *_all("test_correctness_with_softcap_once", EACH, CAPPED),
    *_all(
        "test_correctness_with_z_loss_once",
        {"return_z_loss": BOTH, "lse_square_scale": [1e-4, 1e-5]},
    ),
    *_all(
        "test_correctness_with_z_loss_with_other_params_once",
        {
            "return_z_loss lse_square_scale": [(True, 1e-4), (False, 1e-5)],
            "label_smoothing ignore_index reduction": [(0.1, 42, "mean"), (0.2, -42, "sum")],
        },
    ),
    *_all("test_correctness_with_weight_once", EACH, class_weights=True),
    *_all(
        "test_correctness_with_weight_with_other_params_once",
        {**EACH, **MIXTURES},
        class_weights=True,
    ),
    *_all("test_correctness_not_last_layer", {"reduction": ["sum", "mean"]}, not_last=True),
    *grid(
        SUITE,
        "test_correctness_not_last_layer_with_other_params",
        check,
        {
            "B T V": [(2, 1024, 32000), (3, 423, 32000)],
            **MIXTURES,
            "reduction": ["sum", "mean"],
            "dtype atol rtol": [("bf16", 1e-8, 5e-2), ("fp32", 1e-8, 1e-5)],
        },
        small,
        not_last=True,
    ),
    *grid(SUITE, "test_float32_internal", check_fp32_inside, {"B T V": [(4, 1, 128256)]}, small),
    *grid(
        SUITE, "test_correctness_with_out_of_bounds_target_once", check_out_of_bounds, IGNORE, small
    ),
    *grid(SUITE, "test_correctness_with_forward_only", check_forward_only, FORWARD, small),
    *grid(
        SUITE,
        "test_liger_cross_entropy_structured_output",
        check_output,
        dict.fromkeys(FLAGS, BOTH),
    ),
    *grid(
        SUITE,
        "test_correctness_with_predicted_tokens",
        check_predicted_tokens,
        {
            "B T V": [(2, 128, 512), (3, 47, 31)],
            "ignore_index": [-100, 2],
            "dtype": ["fp32", "bf16"],
        },
        seed=42,
    ),
    *grid(
        SUITE,
        "test_correctness_true_class_grad_confident_predictions",
        check_confident,
        {
            "B T V": [(2, 64, 4096)],
            "dtype": ["bf16", "fp16"],
            "label_smoothing": [0.0, 0.1],
            "reduction": ["sum", "mean"],
        },
        small,
    ),
]
