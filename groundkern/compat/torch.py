"""`torch.nn.functional.linear_cross_entropy` of torch 2.13."""

from typing import Any

import torch
from torch import Tensor

from groundkern import checks
from groundkern.compat import options as common
from groundkern.ops.linear_cross_entropy import api
from groundkern.precision import accumulation_dtype
from groundkern.selection import SoftTargets

_OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # since torch 2.13


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
) -> Tensor:
    """Cross entropy of `F.linear(input, linear_weight, linear_bias)`, as torch's function of that
    name; logits are never stored.

    Equals `F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, weight=weight,
    reduction=..., ignore_index=..., label_smoothing=...)`; sums are fp32 whatever the dtype.

    Args:
        input: [N, D] or [D]. fp32, bf16, fp16, fp64.
        linear_weight: [C, D], or [C, d_1, ..., d_K, D] for a loss at each of d_1 x ... x d_K
            places, which costs a call for each.
        target: int64 [N] or [], with places [N, d_1, ..., d_K]; or probabilities [N, C],
            [C], [N, C, d_1, ..., d_K]. These are as large as the logits: where few of them are not
            0, `groundkern.SoftTargets` is cheaper.
        linear_bias: [C] or [C, d_1, ..., d_K].
        weight: float [C], what each class counts for.
        reduction: "mean" divides by the sum of `weight[target]` over the rows that count (by N
            for probabilities, NaN where nothing counts), "sum", or "none".
        ignore_index: the target that marks an ignored row; None means -100.
        label_smoothing: the share in [0, 1] spread over all classes.
        options: None or `torch.nn.LinearCrossEntropyOptions`: how torch cuts the batch and what it
            accumulates in. No effect.

    Returns:
        The loss in input's dtype (fp32 under autocast), a scalar or of target's shape.

    Raises:
        ValueError: shapes that do not match; an unknown reduction; `ignore_index` or a gradient
            together with probabilities; class weights that require a gradient.
        TypeError: dtypes that do not match; `options` of another type.
    """
    common.check_reduction(reduction)
    common.check_share("label_smoothing", label_smoothing)
    if options is not None and not (_OPTIONS and isinstance(options, _OPTIONS)):
        wanted = "None or torch.nn.LinearCrossEntropyOptions"
        checks.fail("options", wanted, type(options).__name__, TypeError)
    classes, places = _check_shapes(input, linear_weight, linear_bias)
    soft = target.shape == (*input.shape[:-1], classes, *places)
    _check_target(target, soft, (*input.shape[:-1], *places), ignore_index)
    ignore_index = -100 if ignore_index is None else ignore_index
    class_weight = common.check_class_weight("weight", weight, classes)
    shared: dict[str, Any] = {
        "class_weight": class_weight,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
    }
    if places:
        rows = _at_places(input, linear_weight, linear_bias, target, soft, shared)
        loss = rows.sum() if reduction == "sum" else rows
    else:
        labels = _soft(target) if soft else target
        head: dict[str, Any] = {"bias": linear_bias, "reduction": reduction}
        loss = api.linear_cross_entropy(input, linear_weight, labels, **head, **shared).loss
    if reduction == "mean":
        divisor = _divisor(target, soft, class_weight, ignore_index, classes)
        loss = loss.sum() / divisor if places else common.nan_if_zero(loss, divisor)
    wide = torch.is_autocast_enabled(input.device.type)
    return loss if wide else loss.to(input.dtype)


def _check_shapes(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[int, torch.Size]:
    """The number of classes, and d_1, ..., d_K."""
    for name, x in (("input", input), ("linear_weight", linear_weight)):
        if not isinstance(x, Tensor):
            checks.fail(name, "a tensor", type(x).__name__, TypeError)
    checks.require(input.dim() in (1, 2), "input", "shape [N, D] or [D]", list(input.shape))
    shape, size = list(linear_weight.shape), input.shape[-1]
    good = len(shape) >= 2 and shape[-1] == size
    checks.require(good, "linear_weight", f"shape [C, ..., D={size}]", shape)
    places = linear_weight.shape[1:-1]
    batched = not places or input.dim() == 2
    checks.require(batched, "input", f"shape [N, D={size}] for a loss at places", list(input.shape))
    if not torch.is_autocast_enabled(input.device.type) and linear_weight.dtype != input.dtype:
        checks.fail("linear_weight", str(input.dtype), linear_weight.dtype, TypeError)
    if linear_bias is not None and list(linear_bias.shape) != shape[:-1]:
        checks.fail("linear_bias", f"shape {shape[:-1]}", list(linear_bias.shape))
    return shape[0], places


def _check_target(
    target: Tensor, soft: bool, shape: tuple[int, ...], ignore_index: int | None
) -> None:
    if not soft:
        checks.require(target.shape == shape, "target", f"shape {list(shape)}", list(target.shape))
        if target.dtype != torch.int64:
            checks.fail("target", "torch.int64", target.dtype, TypeError)
        return
    if not target.is_floating_point():
        checks.fail("target", "floating-point probabilities", target.dtype, TypeError)
    if target.requires_grad and torch.is_grad_enabled():
        checks.fail("target", "probabilities without gradient, such as its detach()", "a gradient")
    wanted = "None where the target is probabilities"
    checks.require(ignore_index is None, "ignore_index", wanted, ignore_index)


def _soft(probabilities: Tensor) -> SoftTargets:
    """[..., C] of every class."""
    ids = torch.arange(probabilities.shape[-1], device=probabilities.device)
    return SoftTargets(ids.expand(probabilities.shape), _wide(probabilities.detach()))


def _at_places(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    soft: bool,
    shared: dict[str, Any],
) -> Tensor:
    """The loss of each row at each place, [N, d_1, ..., d_K]: a head for each place. At least in
    fp32, or the sum of the places' gradients would be rounded at each."""
    places, count = linear_weight.shape[1:-1], input.shape[0]
    input, linear_weight = (_wide(x) for x in (input, linear_weight))
    heads = linear_weight.flatten(1, -2)  # [C, K, D]
    biases = None if linear_bias is None else _wide(linear_bias).flatten(1)  # [C, K]
    targets = target.reshape(count, -1, places.numel())  # [N, C or 1, K]
    losses = []
    for k in range(places.numel()):
        labels = _soft(targets[..., k]) if soft else targets[:, 0, k]
        bias = None if biases is None else biases[:, k].contiguous()
        head: dict[str, Any] = {"bias": bias, "reduction": "none"}
        call = api.linear_cross_entropy(input, heads[:, k].contiguous(), labels, **head, **shared)
        losses.append(call.loss)
    return torch.stack(losses, 1).view(count, *places)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _divisor(
    target: Tensor, soft: bool, class_weight: Tensor | None, ignore_index: int, classes: int
) -> Tensor:
    """What a mean divides by."""
    if soft:
        return torch.tensor(target.numel() // classes, device=target.device)
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum()
    each = class_weight[target.clamp(0, classes - 1)]
    return torch.where(counted, each, 0.0).sum()
