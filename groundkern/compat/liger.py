"""Liger-Kernel 0.8.2: `LigerFusedLinearCrossEntropyLoss`, `LigerFusedLinearJSD`, and their
functions."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from groundkern import checks
from groundkern.compat import options as common
from groundkern.ops.linear_cross_entropy import api
from groundkern.ops.linear_cross_entropy.api import Reduction
from groundkern.ops.linear_kl.api import Kind, linear_kl


class CrossEntropyOutput(NamedTuple):
    """What comes back where more than the loss is asked for; None for what is not. Only `loss` is
    differentiable."""

    loss: Tensor  # fp32, a scalar or [N]
    z_loss: Tensor | None = None  # input's dtype, a scalar or [N]: the part of the loss
    token_accuracy: Tensor | None = None  # fp32, a scalar or [N]: 1 where the likeliest id is right
    predicted_tokens: Tensor | None = None  # int64 [N], -1 in ignored rows


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `input @ weight.T + bias`, as Liger's function of that name; logits are
    never stored.

    A row's loss is torch's `F.cross_entropy(softcap(input @ weight.T + bias), target, ce_weight,
    label_smoothing=...)` plus `lse_square_scale * lse**2`, which has no class weight.

    Args:
        input: [N, D]. fp32, bf16, fp16.
        weight: [V, D].
        target: int64 [N].
        bias: [V].
        ce_weight: float [V], what each class counts for.
        ignore_index: the target that marks an ignored row.
        lse_square_scale: >= 0, of the z loss.
        label_smoothing: the share in [0, 1] spread over the whole vocabulary.
        reduction: "mean" divides the cross entropy by the sum of `ce_weight[target]` over the rows
            that count and the z loss by their number (0 where there is none), "sum", or "none".
        softcap: logits become `softcap * tanh(logits / softcap)`.
        return_z_loss: whether the z loss also comes back by itself, without gradient.
        accum_dtype: what Liger accumulates gradients of the weight in. No effect: fp32 always.
        use_token_scaling: multiply each row's loss by the detached probability of its target.
        return_token_accuracy: whether the share of rows whose likeliest id is the target comes
            back (over no rows NaN).
        return_predicted_tokens: whether the likeliest ids come back.

    Returns:
        The loss, fp32, or CrossEntropyOutput where a `return_...` is True.

    Raises:
        ValueError: shapes that do not match; a number outside its range; an unknown reduction;
            class weights that require a gradient.
        TypeError: dtypes that do not match; a flag that is no bool.
    """
    wanted = return_z_loss, return_token_accuracy, return_predicted_tokens
    _check_options(label_smoothing, reduction, softcap, accum_dtype, lse_square_scale)
    _check_flags(use_token_scaling, *wanted)
    common.check_head(("input", "weight", "bias"), input, weight, bias)
    common.check_labels("target", target, "input", input)
    class_weight = common.check_class_weight("ce_weight", ce_weight, weight.shape[0])
    counted = target != ignore_index
    count = counted.sum().clamp(min=1)
    if class_weight is not None and reduction == "mean":
        class_weight = _of_mean_one(class_weight, target, counted, count)
    rows = api.linear_cross_entropy(
        input,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        ignore_index=ignore_index,
        reduction="none" if use_token_scaling else cast(Reduction, reduction),
    )
    scale = rows.log_prob.exp() if use_token_scaling else 1.0
    loss = _reduced(rows.loss * scale, reduction, count) if use_token_scaling else rows.loss
    if not any(wanted):
        return loss
    z_loss = _reduced(lse_square_scale * rows.lse**2 * scale, reduction, count).to(input.dtype)
    right = ((rows.predicted == target) & counted).float()
    accuracy = right if reduction == "none" else right.sum() / counted.sum()
    parts = z_loss, accuracy, rows.predicted
    return CrossEntropyOutput(loss, *(x if asked else None for x, asked in zip(parts, wanted)))


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """`liger_fused_linear_cross_entropy` as a module that holds its options.

    Args:
        ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap: as in
            `liger_fused_linear_cross_entropy`.
        return_z_loss, return_token_accuracy, return_predicted_tokens, use_token_scaling: as there.
        accum_dtype: no effect.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        _check_options(label_smoothing, reduction, softcap, accum_dtype, lse_square_scale)
        wanted = return_z_loss, return_token_accuracy, return_predicted_tokens
        _check_flags(use_token_scaling, *wanted)
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The weight comes first."""
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            self.ignore_index,
            self.lse_square_scale,
            self.label_smoothing,
            self.reduction,
            self.softcap,
            self.return_z_loss,
            self.accum_dtype,
            self.use_token_scaling,
            self.return_token_accuracy,
            self.return_predicted_tokens,
        )


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divergence of a student's head from a teacher's, as Liger's function of that name; logits are
    never stored. `groundkern.linear_kl` has its equations.

    Args:
        student_input: [N, D]. fp32, bf16, fp16.
        student_weight: [V, D].
        teacher_input: [N, Dt]; no gradient.
        teacher_weight: [V, Dt]; no gradient.
        shift_labels: int64 [N], of which only `ignore_index` is looked for; None: every row counts.
        jsd_beta: b in [0, 1] of b KL(teacher || m) + (1 - b) KL(student || m) with the mixture
            m = b teacher + (1 - b) student; 0 is KL(teacher || student), 1 KL(student || teacher).
        ignore_index: the label that marks an ignored row.
        temperature: what both heads' logits are divided by.
        accum_dtype: what Liger accumulates gradients of the weight in. No effect: fp32 always.

    Returns:
        fp32 scalar: the mean over the rows that count, 0 where there is none.

    Raises:
        ValueError: shapes that do not match; a number outside its range.
        TypeError: dtypes that do not match.
    """
    _check_jsd(jsd_beta, temperature, accum_dtype)
    common.check_head(("student_input", "student_weight", ""), student_input, student_weight, None)
    if shift_labels is not None:
        common.check_labels("shift_labels", shift_labels, "student_input", student_input)
    sizes = {"N": student_input.shape[0], "V": student_weight.shape[0]}
    checks.tensor("teacher_input", teacher_input, "N Dt", sizes)
    checks.tensor("teacher_weight", teacher_weight, "V Dt", sizes)
    ends: dict[float, Kind] = {0.0: "forward", 1.0: "reverse"}
    return linear_kl(
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        kind=ends.get(jsd_beta, "js"),
        beta=jsd_beta if 0.0 < jsd_beta < 1.0 else 0.5,
        temperature=temperature,
        mask=None if shift_labels is None else shift_labels != ignore_index,
    )


class LigerFusedLinearJSD(torch.nn.Module):
    """`liger_fused_linear_jsd` as a module that holds its options.

    Args:
        jsd_beta, ignore_index, temperature: as in `liger_fused_linear_jsd`.
        accum_dtype: no effect.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_jsd(jsd_beta, temperature, accum_dtype)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        return liger_fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
            self.accum_dtype,
        )


def _check_jsd(jsd_beta: float, temperature: float, accum_dtype: torch.dtype | None) -> None:
    common.check_share("jsd_beta", jsd_beta)
    good = 0.0 < temperature < float("inf")
    checks.require(good, "temperature", "a positive finite number", temperature)
    common.check_float_dtype("accum_dtype", accum_dtype)


def _check_options(
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    accum_dtype: torch.dtype | None,
    lse_square_scale: float,
) -> None:
    common.check_reduction(reduction)
    common.check_share("label_smoothing", label_smoothing)
    checks.finite_positive("softcap", softcap)
    common.check_float_dtype("accum_dtype", accum_dtype)
    good = 0.0 <= lse_square_scale < float("inf")
    checks.require(good, "lse_square_scale", "a finite number >= 0", lse_square_scale)


def _check_flags(
    token_scaling: bool, z_loss: bool, token_accuracy: bool, predicted_tokens: bool
) -> None:
    common.check_flag("use_token_scaling", token_scaling)
    common.check_flag("return_z_loss", z_loss)
    common.check_flag("return_token_accuracy", token_accuracy)
    common.check_flag("return_predicted_tokens", predicted_tokens)


def _of_mean_one(class_weight: Tensor, target: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """Class weights [V] scaled so that those of the targets sum to the number of rows: the mean of
    the cross entropy is the same, and that of the z loss is over rows."""
    each = class_weight[target.clamp(0, class_weight.shape[0] - 1)]
    total = torch.where(counted, each, 0.0).sum()
    return class_weight * torch.where(counted.any(), count / total, 1.0)


def _reduced(rows: Tensor, reduction: str, count: Tensor) -> Tensor:
    if reduction == "none":
        return rows
    return rows.sum() / count if reduction == "mean" else rows.sum()
