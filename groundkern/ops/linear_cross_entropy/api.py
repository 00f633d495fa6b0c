"""The public functions `linear_cross_entropy` and `linear_log_prob`."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from groundkern import backends, checks
from groundkern.ops.linear_cross_entropy import Inputs, Labels, Options, op
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import LabelBags

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropy(NamedTuple):
    """loss: scalar or [...] fp32, differentiable. log_prob, lse and predicted: [...], detached."""

    loss: Tensor
    log_prob: Tensor
    lse: Tensor
    predicted: Tensor


class LogProb(NamedTuple):
    """log_prob and lse: [...] fp32, differentiable; predicted: [...] int64, the likeliest id."""

    log_prob: Tensor
    lse: Tensor
    predicted: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    bags: LabelBags | None = None,
    smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    ignore_index: int = -100,
    softcap: float | None = None,
    group: "ProcessGroup | None" = None,
    weight_grad: Tensor | None = None,
    backend: str = "auto",
) -> CrossEntropy:
    """Cross entropy of `hidden @ weight.T` rows, smoothed over each image's other labels; logits
    are never stored.

    Without bags equals `F.cross_entropy(F.linear(hidden, weight, bias).float(), target,
    ignore_index=...)`; torch's `F.linear_cross_entropy(input, linear_weight, target,
    linear_bias=...)` names the same arguments.

    Args:
        hidden: [..., D]. fp32, bf16, fp16 (fp64 in the reference); sums and results are fp32.
        weight: [V, D], the un-embedding, in hidden's dtype (autocast casts both).
        target: int64 [...]; rows with `ignore_index` count for nothing.
        bias: [V].
        bags: the label ids of each image, `bags.index` [N] over the flattened rows.
        smoothing: b of (D3): the share spread over the bag without the row's own label. Rows
            without a bag, or whose bag holds nothing else, are not smoothed.
        row_weight: [...] float, multiplies each row's loss; no gradient.
        reduction: "mean" divides the weighted sum by the number of rows with target != ignore_index
            (0 when there is none), "sum", or "none".
        ignore_index: the target that marks an ignored row.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        group: process group over whose ranks the rows of weight (and bias) are sharded in rank
            order; hidden and target are the same on every rank.
        weight_grad: fp32 [V, D] buffer that the backward adds dW to instead of returning it.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        CrossEntropy(loss, log_prob, lse, predicted). log_prob is of the target. Ignored rows: 0, 0,
        0 and -1.

    Raises:
        ValueError: mismatched shapes; on CPU a target or label outside the vocabulary; an unknown
            reduction; a backend that cannot serve the call.
        TypeError: mismatched dtypes.

    Source: DV-SFT (arXiv 2605.26656), equations (D1) and (D3).
    """
    checks.require(
        reduction in ("mean", "sum", "none"), "reduction", "'mean', 'sum' or 'none'", reduction
    )
    checks.require(0.0 <= smoothing < 1.0, "smoothing", "a share in [0, 1)", smoothing)
    operands = (hidden, weight, bias, target, bags)
    inputs, labels, name = _prepare(*operands, ignore_index, softcap, group, weight_grad, backend)
    if row_weight is not None and row_weight.shape != target.shape:
        checks.fail("row_weight", f"target's shape {list(target.shape)}", list(row_weight.shape))
    factor = _row_factor(target, row_weight, reduction, ignore_index, inputs.hidden.dtype)
    group_name = "" if group is None else group.group_name
    arguments = (*inputs, *labels, *Options(smoothing, ignore_index, softcap or 0.0, group_name))
    train_weight = inputs.weight.requires_grad
    trained = train_weight or (inputs.bias is not None and inputs.bias.requires_grad)
    trained = trained or weight_grad is not None
    differentiated = torch.is_grad_enabled() and (trained or inputs.hidden.requires_grad)
    # A frozen head's gradients are no larger than hidden; a trained one's are computed in the
    # backward if the logits can be saved for it.
    save = differentiated and trained and op.saves_logits(name, inputs)
    save = save and (softcap is None or bags is None)  # slopes of bags are not saved
    ahead = differentiated and not save and op.gradients_in_forward(name)
    ahead = ahead and weight_grad is None and group is None
    if ahead and reduction != "none":
        results = op.linear_cross_entropy_with_gradients(*arguments, factor, train_weight, name)
        return _cross_entropy(results[0], results, target)
    if ahead and not trained:
        results = op.linear_cross_entropy_with_gradients(*arguments, None, False, name)
    else:
        results = op.linear_cross_entropy(*arguments, weight_grad, save, name)
    rows = results[0] * factor
    loss = rows.view(target.shape) if reduction == "none" else rows.sum()
    return _cross_entropy(loss, results, target)


def _cross_entropy(loss: Tensor, results: tuple[Tensor, ...], target: Tensor) -> CrossEntropy:
    return CrossEntropy(loss, *(x.detach().view(target.shape) for x in results[1:4]))


def _row_factor(
    target: Tensor,
    row_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """What each row's loss is multiplied by: fp32 (fp64) [N]."""
    wide = accumulation_dtype(dtype)
    if row_weight is None:
        factor = torch.ones(target.shape, dtype=wide, device=target.device)
    else:
        factor = row_weight.detach().to(wide)
    if reduction == "mean":
        factor = factor / (target != ignore_index).sum().clamp(min=1)
    return factor.reshape(-1)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> LogProb:
    """Log-probability of each row's target under `softmax(hidden @ weight.T)`; logits are never
    stored.

    Equals `F.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1, target[...,
    None])[..., 0]`.

    Args:
        hidden, weight, target, bias, ignore_index, softcap, group, backend: as in
            `linear_cross_entropy`.

    Returns:
        LogProb(log_prob, lse, predicted), the first two differentiable. Ignored rows: 0, 0 and -1.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`.

    Source: pi and pi+ of SMAM, equations (S2)-(S4).
    """
    operands = (hidden, weight, bias, target, None)
    inputs, labels, name = _prepare(*operands, ignore_index, softcap, group, None, backend)
    differentiated = any(x is not None and x.requires_grad for x in inputs)
    save = torch.is_grad_enabled() and differentiated and op.saves_logits(name, inputs)
    options = Options(0.0, ignore_index, softcap or 0.0, "" if group is None else group.group_name)
    results = op.linear_cross_entropy(*inputs, *labels, *options, None, save, name)
    return LogProb(*(x.view(target.shape) for x in results[1:4]))


def _prepare(
    hidden, weight, bias, target, bags, ignore_index, softcap, group, weight_grad, backend
) -> tuple[Inputs, Labels, str]:
    """Check, flatten the rows, and choose a backend."""
    for argument, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if hasattr(x, "full_tensor"):
            wanted = "a plain tensor: its full_tensor(), or its local rows with `group`"
            checks.fail(argument, wanted, "a DTensor", TypeError)
    hidden, weight, bias = autocast(hidden, weight, bias)
    if hidden.dim() < 1 or hidden.shape[:-1] != target.shape:
        checks.fail(
            "target", f"hidden's leading shape {list(hidden.shape[:-1])}", list(target.shape)
        )
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    sizes: dict[str, int] = {}
    checks.tensor("hidden", flat, "N D", sizes, dtype=checks.FLOATS)
    checks.tensor("weight", weight, "V D", sizes, dtype=hidden.dtype, device=hidden.device)
    checks.tensor("target", labels, "N", sizes, dtype=torch.int64, device=hidden.device)
    checks.finite_positive("softcap", softcap)
    if bias is not None:
        checks.tensor("bias", bias, "V", sizes, dtype=hidden.dtype, device=hidden.device)
    if weight_grad is not None:
        checks.tensor(
            "weight_grad", weight_grad, "V D", sizes, dtype=torch.float32, device=hidden.device
        )
    if bags is not None:
        checks.tensor("bags.index", bags.index, "N", sizes, device=hidden.device)
    if checks.values_visible(labels):
        _check_labels(labels, bags, weight.shape[0], ignore_index, group)
    ids, offsets, index = (None,) * 3 if bags is None else (bags.ids, bags.offsets, bags.index)
    inputs, device = Inputs(flat, weight, bias), hidden.device
    name = backends.choose(backend, device, lambda b: op.kernels(b).unsupported(inputs, group))
    return inputs, Labels(labels, ids, offsets, index), name


def _check_labels(
    labels: Tensor, bags: LabelBags | None, shard: int, ignore_index: int, group
) -> None:
    vocabulary = shard
    if group is not None:
        total = torch.tensor(shard, device=labels.device)
        torch.distributed.all_reduce(total, group=group)
        vocabulary = int(total)
    wanted = f"labels in [0, {vocabulary}) (the vocabulary)"
    counted = labels[labels != ignore_index]
    for label_name, ids in (("target", counted), ("bags.ids", _used_ids(bags))):
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            checks.require(low >= 0 and high < vocabulary, label_name, wanted, f"[{low}, {high}]")


def _used_ids(bags: LabelBags | None) -> Tensor:
    return torch.empty(0) if bags is None else bags.ids[: int(bags.offsets[-1])]
