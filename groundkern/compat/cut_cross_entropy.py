"""cut-cross-entropy 25.6.4: `linear_cross_entropy`, its module, and vocabulary-parallel options."""

import enum
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from groundkern import checks
from groundkern.compat import options as common
from groundkern.ops.linear_cross_entropy import api
from groundkern.ops.linear_cross_entropy.api import Reduction


class LinearCrossEntropyImpl(enum.IntEnum):
    """The implementations that may be named; all of them mean groundkern's."""

    CCE = 1
    TORCH_COMPILE = 2
    CCE_KAHAN_FULL_C = 3
    CCE_KAHAN_FULL_E = 4
    CCE_EXACT = 5
    CCE_KAHAN_FULL_C_FULL_E = 6
    CCE_KAHAN_FULL = 7


@dataclass
class VocabParallelOptions:
    """Which rows of the whole classifier this rank holds.

    Args:
        start: the first.
        stop: one past the last.
        group: the process group over whose ranks the classifier is sharded, in rank order; None:
            the default group.
        reduce_e_grad: True, that each rank gets the whole gradient of e. False is refused.
    """

    start: int
    stop: int
    group: "torch.distributed.ProcessGroup | None" = None
    reduce_e_grad: bool = True

    @classmethod
    def from_vocab(
        cls,
        vocab_size: int,
        group: "torch.distributed.ProcessGroup | None" = None,
        reduce_e_grad: bool = True,
    ) -> "VocabParallelOptions":
        """Even parts; the first `vocab_size % ranks` have one row more.

        Args:
            vocab_size: rows of the whole classifier.
            group, reduce_e_grad: as in the class.

        Returns:
            This rank's part.
        """
        rank = torch.distributed.get_rank(group)
        each, more = divmod(vocab_size, torch.distributed.get_world_size(group))
        start = rank * each + min(rank, more)
        return cls(start, start + each + (rank < more), group, reduce_e_grad)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of `e @ c.T + bias`, as cut-cross-entropy's function of that name; logits are
    never stored. Gradients are exact whatever the filter.

    Args:
        e: [..., D]. fp32, bf16, fp16.
        c: [V, D], the classifier (with `vocab_parallel_options` this rank's rows).
        targets: int64 [...].
        bias: [V].
        ignore_index: the target that marks an ignored row.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        reduction: "mean" divides by the number of rows that count (NaN where there is none),
            "sum", or "none".
        shift: e at t is for the target at t + shift: both lose `shift` places of their last but
            one (e) or last (targets) dimension; True means 1.
        return_lse: whether each row's log-sum-exp comes back, differentiable.
        filter_eps: a number, "auto" or None: below it cut-cross-entropy skips parts of the
            gradient. No effect.
        accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: how it accumulates and where it
            filters. No effect.
        impl: a name or `LinearCrossEntropyImpl`. No effect.
        vocab_parallel_options: where c is a shard.

    Returns:
        The loss, fp32, a scalar or [..., T - shift] with 0 in ignored rows; with `return_lse` also
        the log-sum-exp [..., T - shift], 0 in ignored rows.

    Raises:
        ValueError: shapes that do not match; a number outside its range; an unknown reduction,
            filter or implementation; `reduce_e_grad=False`; shards not in rank order (looked at on
            a CPU only).
        TypeError: dtypes that do not match; a flag that is no bool.
    """
    _check_options(softcap, reduction, filter_eps, impl)
    flags = (return_lse, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad)
    names = ("return_lse", "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad")
    for name, flag in zip(names, flags):
        common.check_flag(name, flag)
    common.check_head(("e", "c", "bias"), e, c, bias)
    common.check_labels("targets", targets, "e", e)
    e, targets = _shifted(e, targets, shift)
    group = None
    if vocab_parallel_options is not None:
        group = _group(vocab_parallel_options, c)
    shared: dict[str, Any] = {
        "bias": bias,
        "ignore_index": ignore_index,
        "softcap": softcap,
        "group": group,
    }
    if not return_lse:
        loss = api.linear_cross_entropy(
            e, c, targets, reduction=cast(Reduction, reduction), **shared
        ).loss
        if reduction == "mean":
            loss = common.nan_if_zero(loss, (targets != ignore_index).sum())
        return loss
    rows = api.linear_log_prob(e, c, targets, **shared)
    loss = -rows.log_prob
    if reduction == "mean":
        loss = loss.sum() / (targets != ignore_index).sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, rows.lse


class LinearCrossEntropy(torch.nn.Module):
    """`linear_cross_entropy` as a module that holds its options.

    Args:
        ignore_index, softcap, reduction, shift, return_lse: as in `linear_cross_entropy`.
        filter_eps, accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad, impl: no effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        filter_eps: float | str | None = "auto",
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
        impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
        return_lse: bool = False,
    ) -> None:
        super().__init__()
        _check_options(softcap, reduction, filter_eps, impl)
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.shift = shift
        self.filter_eps = filter_eps
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.return_lse = return_lse

    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.shift,
            self.return_lse,
            self.filter_eps,
            self.accum_e_fp32,
            self.accum_c_fp32,
            self.filter_e_grad,
            self.filter_c_grad,
            self.impl,
        )


def compute_z_loss(
    lse: Tensor,
    targets: Tensor | None = None,
    shift: bool | int = False,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The square of the log-sum-exp, as `cut_cross_entropy.utils.compute_z_loss`.

    Args:
        lse: float [..., T - shift].
        targets: int64 [..., T]: rows that it ignores count for nothing; None: all count.
        shift: as in `linear_cross_entropy`.
        ignore_index: the target that marks an ignored row.
        reduction: "mean" over the rows that count (NaN where there is none), "sum", or "none".

    Returns:
        A scalar or [..., T - shift], in lse's dtype.

    Raises:
        ValueError: shapes that do not match; an unknown reduction.
    """
    common.check_reduction(reduction)
    counted = torch.ones_like(lse, dtype=torch.bool)
    if targets is not None:
        counted = targets[..., int(shift) :] != ignore_index
        wanted = f"lse's shape {list(lse.shape)} and {int(shift)} more in the last"
        checks.require(counted.shape == lse.shape, "targets", wanted, list(targets.shape))
    rows = torch.where(counted, lse**2, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / counted.sum() if reduction == "mean" else rows.sum()


def _check_options(
    softcap: float | None,
    reduction: str,
    filter_eps: float | str | None,
    impl: str | LinearCrossEntropyImpl,
) -> None:
    common.check_reduction(reduction)
    checks.finite_positive("softcap", softcap)
    good = filter_eps is None or filter_eps == "auto" or isinstance(filter_eps, float)
    checks.require(good, "filter_eps", "a float, 'auto' or None", repr(filter_eps))
    name = getattr(impl, "name", impl)  # also of cut-cross-entropy's own enumeration
    known = [x.name.lower() for x in LinearCrossEntropyImpl]
    good = isinstance(name, str) and name.lower() in known
    checks.require(good, "impl", " | ".join(repr(n) for n in known), repr(impl))


def _shifted(e: Tensor, targets: Tensor, shift: bool | int) -> tuple[Tensor, Tensor]:
    if not isinstance(shift, int):
        checks.fail("shift", "a bool or an int", repr(shift), TypeError)
    shift = int(shift)
    if shift == 0:
        return e, targets
    length = targets.shape[-1] if targets.dim() else 0
    checks.require(0 <= shift < length, "shift", f"a number in [0, {length})", shift)
    return e[..., :-shift, :], targets[..., shift:]


def _group(options: VocabParallelOptions, c: Tensor) -> "torch.distributed.ProcessGroup | None":
    name = "vocab_parallel_options"
    wanted = f"stop - start = {c.shape[0]} (c's rows)"
    checks.require(options.stop - options.start == c.shape[0], name, wanted, options)
    if not options.reduce_e_grad:
        checks.fail(name, "reduce_e_grad=True: every rank gets the whole gradient of e", options)
    group = torch.distributed.group.WORLD if options.group is None else options.group
    if checks.values_visible(c):
        own = torch.tensor([c.shape[0]], device=c.device)
        sizes = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(sizes, own, group=group)
        before = sum(int(x) for x in sizes[: torch.distributed.get_rank(group)])
        wanted = f"start = {before}, the rows of the ranks before this one"
        checks.require(options.start == before, name, wanted, options)
    return group
