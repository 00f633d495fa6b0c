"""The public functions `linear_cross_entropy` and `linear_log_prob`."""

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from groundkern import backends, checks
from groundkern.ops.linear_cross_entropy import MOST_TOP, Inputs, Labels, Options, op
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import LabelBags, SoftTargets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["mean", "sum", "none"]


class CrossEntropy(NamedTuple):
    """loss: scalar or [...] fp32, differentiable. The others are detached; the last three are None
    where they were not asked for."""

    loss: Tensor
    log_prob: Tensor  # [...] fp32, of the target
    lse: Tensor  # [...] fp32
    predicted: Tensor  # [...] int64, the likeliest id
    entropy: Tensor | None  # [...] fp32, in nats
    top_ids: Tensor | None  # [..., k] int64, likeliest first; among equals the smallest id
    top_log_probs: Tensor | None  # [..., k] fp32


class LogProb(NamedTuple):
    """log_prob, lse and entropy are differentiable; the last three are None where they were not
    asked for."""

    log_prob: Tensor  # [...] fp32
    lse: Tensor  # [...] fp32
    predicted: Tensor  # [...] int64, the likeliest id
    entropy: Tensor | None  # [...] fp32, in nats
    top_ids: Tensor | None  # [..., k] int64, likeliest first; among equals the smallest id
    top_log_probs: Tensor | None  # [..., k] fp32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | SoftTargets,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    bags: LabelBags | None = None,
    smoothing: float = 0.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    entropy: bool = False,
    top_k: int = 0,
    group: "ProcessGroup | None" = None,
    weight_grad: Tensor | None = None,
    backend: str = "auto",
) -> CrossEntropy:
    """Cross entropy of `hidden @ weight.T` rows against a label, several, or a label and its
    image's others; logits are never stored.

    Without bags equals `F.cross_entropy(F.linear(hidden, weight, bias).float(), target,
    class_weight, ignore_index=..., label_smoothing=...)`; torch's `F.linear_cross_entropy(input,
    linear_weight, target, linear_bias=...)` names the same arguments.

    Args:
        hidden: [..., D]. fp32, bf16, fp16 (fp64 in the reference); sums and results are fp32.
        weight: [V, D], the un-embedding, in hidden's dtype (autocast casts both).
        target: int64 [...], or `SoftTargets` of [..., K] ids and probabilities; rows with
            `ignore_index` count for nothing.
        bias: [V].
        softcap: logits become `softcap * tanh(logits / softcap)`.
        temperature: what the (capped) logits are divided by; every result is of the distribution
            that this gives.
        bags: the label ids of each image, `bags.index` [N] over the flattened rows. Not with
            `SoftTargets`.
        smoothing: b of (D3): the share spread over the bag without the row's own label. Rows
            without a bag, or whose bag holds nothing else, are not smoothed.
        label_smoothing: the share in [0, 1] spread over the whole vocabulary, as torch's.
        class_weight: fp32 (fp64) [V] (with `group` of the whole vocabulary, on every rank), what
            each label's -log p counts for; no gradient.
        z_loss: adds `z_loss * lse**2` to each row's loss.
        row_weight: [...] float, multiplies each row's loss; no gradient.
        reduction: "mean" divides the weighted sum by the number of rows that count, with
            class_weight and one target a row by the sum of `class_weight[target]` over them (by 1
            if that is 0), "sum", or "none".
        ignore_index: the target that marks an ignored row.
        entropy: whether each row's entropy is returned (differentiable in `linear_log_prob`).
        top_k: how many of the likeliest labels are returned, 0 to 32.
        group: process group over whose ranks the rows of weight (and bias) are sharded in rank
            order; hidden and target are the same on every rank.
        weight_grad: fp32 [V, D] buffer that the backward adds dW to instead of returning it.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        CrossEntropy(loss, log_prob, lse, predicted, entropy, top_ids, top_log_probs). log_prob is
        of the target (of soft ones, of `label` or the likeliest by `probabilities`). Ignored rows:
        0, and -1 for ids.

    Raises:
        ValueError: mismatched shapes; on CPU a target or label outside the vocabulary; an unknown
            reduction; a backend that cannot serve the call.
        TypeError: mismatched dtypes.

    Source: DV-SFT (arXiv 2605.26656), equations (D1) and (D3).
    """
    checks.require(
        reduction in ("mean", "sum", "none"), "reduction", "'mean', 'sum' or 'none'", reduction
    )
    shares = smoothing, label_smoothing, z_loss
    options = _options(*shares, softcap, temperature, ignore_index, group, entropy, top_k)
    shape = _shape(target)
    operands = Inputs(hidden, weight, bias), target, bags, class_weight
    inputs, labels, name = _prepare(*operands, options, group, weight_grad, backend)
    if row_weight is not None and row_weight.shape != shape:
        checks.fail("row_weight", f"target's shape {list(shape)}", list(row_weight.shape))
    hard = isinstance(target, Tensor)
    factor = _row_factor(labels, row_weight, reduction, ignore_index, hard, inputs.hidden.dtype)
    arguments = (*inputs, *labels, *options)
    train_weight = inputs.weight.requires_grad
    trained = train_weight or (inputs.bias is not None and inputs.bias.requires_grad)
    trained = trained or weight_grad is not None
    differentiated = torch.is_grad_enabled() and (trained or inputs.hidden.requires_grad)
    # A frozen head's gradients are no larger than hidden; a trained one's are computed in the
    # backward if the logits can be saved for it.
    save = differentiated and trained and op.saves_logits(name, inputs, options)
    save = save and (softcap is None or labels.ids is None)  # slopes of lists are not saved
    ahead = differentiated and not save and op.gradients_in_forward(name)
    ahead = ahead and weight_grad is None and group is None
    if ahead and reduction != "none":
        results = op.linear_cross_entropy_with_gradients(*arguments, factor, train_weight, name)
        return _cross_entropy(results[0], results, shape, options)
    if ahead and not trained:
        results = op.linear_cross_entropy_with_gradients(*arguments, None, False, name)
    else:
        results = op.linear_cross_entropy(*arguments, weight_grad, save, name)
    rows = results[0] * factor
    loss = rows.view(shape) if reduction == "none" else rows.sum()
    return _cross_entropy(loss, results, shape, options)


def _cross_entropy(
    loss: Tensor, results: tuple[Tensor, ...], shape: torch.Size, options: Options
) -> CrossEntropy:
    log_prob, lse, entropy, *ids = (x.detach() for x in results[1:7])
    return CrossEntropy(loss, *_shaped(shape, options, log_prob, lse, entropy, *ids))


def _shaped(
    shape: torch.Size,
    options: Options,
    log_prob: Tensor,
    lse: Tensor,
    entropy: Tensor,
    predicted: Tensor,
    ids: Tensor,
    logs: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The op's rows in the public order, in the caller's shape; None for what is not wanted."""
    log_prob, lse, predicted = (x.view(shape) for x in (log_prob, lse, predicted))
    spread = entropy.view(shape) if options.entropy else None
    if options.top_k == 0:
        return log_prob, lse, predicted, spread, None, None
    top_ids, top_logs = (x.view(*shape, options.top_k) for x in (ids, logs))
    return log_prob, lse, predicted, spread, top_ids, top_logs


def _row_factor(
    labels: Labels,
    row_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    hard: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What each row's loss is multiplied by: fp32 (fp64) [N]."""
    wide, target = accumulation_dtype(dtype), labels.target
    if row_weight is None:
        factor = torch.ones(target.shape, dtype=wide, device=target.device)
    else:
        factor = row_weight.detach().to(wide).reshape(-1)
    if reduction == "mean":
        counted = target != ignore_index
        if hard and labels.own is not None:  # class weights
            total = torch.where(counted, labels.own, 0.0).sum().to(wide)
            factor = factor / torch.where(total > 0, total, 1.0)
        else:
            factor = factor / counted.sum().clamp(min=1)
    return factor


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    top_k: int = 0,
    group: "ProcessGroup | None" = None,
    backend: str = "auto",
) -> LogProb:
    """Log-probability of each row's target under `softmax(hidden @ weight.T / temperature)`, and
    the entropy of that distribution; logits are never stored.

    Equals `F.linear(hidden, weight, bias).float().log_softmax(-1).gather(-1, target[...,
    None])[..., 0]`.

    Args:
        hidden, weight, target, bias, softcap, temperature: as in `linear_cross_entropy`.
        ignore_index, entropy, top_k, group, backend: as there.

    Returns:
        LogProb(log_prob, lse, predicted, entropy, top_ids, top_log_probs); log_prob, lse and
        entropy are differentiable. Ignored rows: 0, and -1 for ids.

    Raises:
        ValueError, TypeError: as `linear_cross_entropy`.

    Source: pi and pi+ of SMAM, equations (S2)-(S4).
    """
    options = _options(0.0, 0.0, 0.0, softcap, temperature, ignore_index, group, entropy, top_k)
    operands = Inputs(hidden, weight, bias), target, None, None
    inputs, labels, name = _prepare(*operands, options, group, None, backend)
    differentiated = any(x is not None and x.requires_grad for x in inputs)
    save = torch.is_grad_enabled() and differentiated and op.saves_logits(name, inputs, options)
    results = op.linear_cross_entropy(*inputs, *labels, *options, None, save, name)
    return LogProb(*_shaped(target.shape, options, *results[1:7]))


def _options(
    smoothing: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    group: "ProcessGroup | None",
    entropy: bool,
    top_k: int,
) -> Options:
    checks.require(0.0 <= smoothing < 1.0, "smoothing", "a share in [0, 1)", smoothing)
    wanted = "a share in [0, 1]"
    checks.require(0.0 <= label_smoothing <= 1.0, "label_smoothing", wanted, label_smoothing)
    checks.require(0.0 <= z_loss < float("inf"), "z_loss", "a finite number >= 0", z_loss)
    checks.finite_positive("softcap", softcap)
    checks.require(temperature is not None, "temperature", "a number", temperature)
    checks.finite_positive("temperature", temperature)
    checks.require(0 <= top_k <= MOST_TOP, "top_k", f"a number from 0 to {MOST_TOP}", top_k)
    shares = float(smoothing), float(label_smoothing), float(z_loss)
    group_name = "" if group is None else group.group_name
    cap = 0.0 if softcap is None else float(softcap)
    return Options(*shares, cap, float(temperature), ignore_index, group_name, bool(entropy), top_k)


def _shape(target: Tensor | SoftTargets) -> torch.Size:
    return target.ids.shape[:-1] if isinstance(target, SoftTargets) else target.shape


def _prepare(
    operands: Inputs,
    target: Tensor | SoftTargets,
    bags: LabelBags | None,
    class_weight: Tensor | None,
    options: Options,
    group: "ProcessGroup | None",
    weight_grad: Tensor | None,
    backend: str,
) -> tuple[Inputs, Labels, str]:
    """Check, flatten the rows, and choose a backend."""
    for argument, x in zip(Inputs._fields, operands, strict=True):
        if hasattr(x, "full_tensor"):
            wanted = "a plain tensor: its full_tensor(), or its local rows with `group`"
            checks.fail(argument, wanted, "a DTensor", TypeError)
    hidden, weight, bias = autocast(*operands)
    shape, device = _shape(target), hidden.device
    sizes: dict[str, int] = {}
    if hidden.dim() < 1 or hidden.shape[:-1] != shape:
        checks.fail("target", f"hidden's leading shape {list(hidden.shape[:-1])}", list(shape))
    inputs = Inputs(hidden.reshape(shape.numel(), hidden.shape[-1]), weight, bias)
    checks.tensor("hidden", inputs.hidden, "N D", sizes, dtype=checks.FLOATS)
    checks.tensor("weight", weight, "V D", sizes, dtype=hidden.dtype, device=device)
    if bias is not None:
        checks.tensor("bias", bias, "V", sizes, dtype=hidden.dtype, device=device)
    float32 = torch.float32
    if weight_grad is not None:
        checks.tensor("weight_grad", weight_grad, "V D", sizes, dtype=float32, device=device)
    if class_weight is not None:
        whole = sizes if group is None else {}  # with a group of all shards
        either = (float32, torch.float64)
        checks.tensor("class_weight", class_weight, "V", whole, dtype=either, device=device)
        class_weight = class_weight.to(accumulation_dtype(hidden.dtype))
    if isinstance(target, SoftTargets):
        checks.require(bags is None, "bags", "None where the target is SoftTargets", "bags")
        listed = target.ids
        checks.tensor("target.ids", listed.flatten(), "ids", {}, device=device)
        labels = _soft_labels(target, class_weight, options, accumulation_dtype(hidden.dtype))
        if target.label is not None:
            listed = torch.cat((listed.flatten(), labels.target))
    else:
        listed = target.reshape(-1)
        checks.tensor("target", listed, "N", sizes, dtype=torch.int64, device=device)
        labels = _own_labels(listed, bags, class_weight, options)
    if bags is not None:
        checks.tensor("bags.index", bags.index, "N", sizes, device=device)
    if checks.values_visible(listed):
        _check_labels(listed, bags, weight.shape[0], class_weight, options.ignore_index, group)
    name = backends.choose(backend, device, lambda b: op.kernels(b).unsupported(inputs, group))
    return inputs, labels, name


def _own_labels(
    target: Tensor,
    bags: LabelBags | None,
    class_weight: Tensor | None,
    options: Options,
) -> Labels:
    """One target a row, and its image's bag."""
    own = None if class_weight is None else _of(class_weight, target)
    if bags is None or options.smoothing == 0:
        return Labels(target, own, None, None, None, None, _everywhere(class_weight, options))
    weights = None if class_weight is None else _of(class_weight, bags.ids)
    lists = bags.ids, weights, bags.offsets, bags.index
    return Labels(target, own, *lists, _everywhere(class_weight, options))


def _soft_labels(
    target: SoftTargets, class_weight: Tensor | None, options: Options, dtype: torch.dtype
) -> Labels:
    """A row's own label is the given one, or the likeliest of its list."""
    rows, count = target.ids.shape[:-1].numel(), target.ids.shape[-1]
    ids, given = target.ids.reshape(rows, count), target.probabilities.reshape(rows, count)
    if count == 0:
        ignored = ids.new_full((rows,), options.ignore_index)
        return Labels(ignored, None, None, None, None, None, None)
    given, padding = given.to(dtype), ids == options.ignore_index
    weights = given.masked_fill(padding, 0.0)
    if target.label is None:
        own = given.masked_fill(padding, -1.0).argmax(1, keepdim=True)
        label = ids.gather(1, own)  # padding where there is nothing else
    else:
        label = target.label.reshape(rows, 1)
        label = label.masked_fill(padding.all(1, keepdim=True), options.ignore_index)
    if class_weight is not None:
        weights = weights * _of(class_weight, ids)
    share = (weights * (ids == label)).sum(1)
    at = torch.arange(rows + 1, device=ids.device)
    ids = ids.masked_fill(padding, 0)
    lists = ids.reshape(-1), weights.reshape(-1), at * count, at[:-1]
    return Labels(label[:, 0], share, *lists, _everywhere(class_weight, options))


def _of(class_weight: Tensor, labels: Tensor) -> Tensor:
    """Of each label; of one outside the vocabulary (ignored, or not looked at) any."""
    if class_weight.shape[0] == 0:
        return class_weight.new_ones(labels.shape)
    return class_weight.detach()[labels.clamp(0, class_weight.shape[0] - 1)]


def _everywhere(class_weight: Tensor | None, options: Options) -> Tensor | None:
    """The weights of the whole vocabulary, where it has a share."""
    if class_weight is None or options.label_smoothing == 0:
        return None
    return class_weight.detach()


def _check_labels(
    listed: Tensor,
    bags: LabelBags | None,
    shard: int,
    class_weight: Tensor | None,
    ignore_index: int,
    group: "ProcessGroup | None",
) -> None:
    vocabulary = shard
    if group is not None:
        total = torch.tensor(shard, device=listed.device)
        torch.distributed.all_reduce(total, group=group)
        vocabulary = int(total)
        if class_weight is not None:
            checks.tensor("class_weight", class_weight, "V", {"V": vocabulary})
    wanted = f"labels in [0, {vocabulary}) (the vocabulary)"
    counted = listed[listed != ignore_index]
    for label_name, ids in (("target", counted), ("bags.ids", _used_ids(bags))):
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            checks.require(low >= 0 and high < vocabulary, label_name, wanted, f"[{low}, {high}]")


def _used_ids(bags: LabelBags | None) -> Tensor:
    return torch.empty(0) if bags is None else bags.ids[: int(bags.offsets[-1])]
