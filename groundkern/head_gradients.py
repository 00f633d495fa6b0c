"""Gradients of the ops on an output head: computed ahead in the forward and scaled once, summed
over chunks of rows, or by autograd on blocks of rows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import buffers
from groundkern.head_products import matmul
from groundkern.op_body import empty_like, in_body
from groundkern.precision import accumulation_dtype
from groundkern.row_blocks import vjp

# On a GPU a trained head's gradient is summed over at most so many chunks in its own dtype: each
# adds one rounding to half the last place. Over more it is summed in fp32, which takes three times
# the room.
NARROW_SUMS = 4


class Ahead(NamedTuple):
    """What a forward that computes the gradients too must know of them."""

    row_factor: Tensor | None  # [N]: the loss is sum_n row_factor_n L_n; None: L [N]
    train_weight: bool


class Gradients(NamedTuple):
    """None for an absent bias, a frozen weight, and a gradient added to a buffer."""

    dhidden: Tensor  # [N, D]
    dweight: Tensor | None  # [V, D]
    dbias: Tensor | None  # [V]


def present(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op's outputs cannot be None: an absent one is empty."""
    return tuple(like.new_empty(0) if x is None else x for x in results)


def fakes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, train_weight: bool
) -> tuple[Tensor, ...]:
    """`Gradients` as an op's fake returns them."""
    dweight = weight.new_empty(weight.shape) if train_weight else None
    dbias = None if bias is None else bias.new_empty(bias.shape)
    return present((empty_like(hidden), dweight, dbias), hidden)


def scaled(gradient: Tensor, dloss: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A gradient that was computed ahead, times the upstream gradient of the loss.

    Args:
        dloss: a number, or one for each row of the gradient.
        product: the backend's, which may use the gradient's memory: an op that makes gradients
            ahead keeps them for its backward alone. Not called where a number is seen to be 1, as
            for a loss used by itself, or under tracing.
    """
    if type(dloss) is not Tensor or type(gradient) is not Tensor:
        factor = dloss[:, None] if dloss.dim() == 1 else dloss
        return (gradient * factor).to(gradient.dtype)
    seen = dloss.device.type == "cpu" and dloss.dim() == 0  # without a sync
    if seen and float(dloss) == 1.0:
        return gradient
    with in_body(gradient.device):
        return product(gradient, dloss)


def multiplied(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient times a number, or one a row, by torch on the CPU."""
    factor = factor[:, None] if factor.dim() == 1 else factor
    return torch.mul(gradient, factor, out=buffers.empty(*gradient.shape, dtype=gradient.dtype))


class Summed:
    """dhidden, filled chunk by chunk, and dweight and dbias, summed over chunks, on a GPU."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        train_weight: bool,
        chunks: int,
        weight_grad: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.weight, self.bias, self.group, self.weight_grad = weight, bias, group, weight_grad
        summed = torch.float32 if group is not None else hidden.dtype  # over ranks
        self.dhidden, self.dtype = hidden.new_empty(hidden.shape, dtype=summed), hidden.dtype
        self.dweight, self.dbias = weight_grad, None
        if weight_grad is None and train_weight:
            dtype = weight.dtype if chunks <= NARROW_SUMS else torch.float32
            make = weight.new_empty if chunks > 0 else weight.new_zeros
            self.dweight = make(weight.shape, dtype=dtype)
        if bias is not None:
            self.dbias = bias.new_zeros(bias.shape, dtype=torch.float32)

    def add(self, rows: slice, hidden: Tensor, dlogits: Tensor) -> None:
        """The part of some rows: hidden [n, D], dlogits [n, V] in its dtype."""
        matmul(dlogits, self.weight, out=self.dhidden[rows])
        if self.dweight is not None:
            add = self.weight_grad is not None or rows.start > 0
            matmul(dlogits.t(), hidden, out=self.dweight, add=add)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)

    def finish(self) -> Gradients:
        if self.group is not None:
            dist.all_reduce(self.dhidden, group=self.group)
        dweight, dbias = self.dweight, self.dbias
        returned = dweight is not None and self.weight_grad is None
        return Gradients(
            self.dhidden.to(self.dtype),
            dweight.to(self.weight.dtype) if returned else None,
            None if dbias is None else dbias.to(self.bias.dtype),
        )


def by_autograd(
    blocks: Iterable[tuple[Tensor, Callable]],
    upstream: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    train_weight: bool,
    weight_grad: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Gradients:
    """Gradients of a reference.

    Args:
        blocks: rows, and a function of their hidden [n, D], weight and bias with results [n].
        upstream: [N] of each result.
        weight_grad: [V, D], to add dweight to instead of returning it.
    """
    wide = accumulation_dtype(hidden.dtype)
    dhidden = hidden.new_zeros(hidden.shape, dtype=wide)
    w, b = (None if x is None else x.to(wide) for x in (weight, bias))
    dweight, dbias = weight_grad, None if b is None else b.new_zeros(b.shape)
    if train_weight and weight_grad is None:
        dweight = w.new_zeros(w.shape)  # contiguous, whatever the strides of w
    for rows, block in blocks:
        h, above = hidden[rows].to(wide), [x[rows] for x in upstream]
        if dweight is None:
            dhidden[rows], db = vjp(partial(_with_weight, block, w), [h, b], above)
        else:
            dhidden[rows], dw, db = vjp(block, [h, w, b], above)
            dweight += dw
        if db is not None:
            dbias += db
    if group is not None:
        dist.all_reduce(dhidden, group=group)
    returned = dweight is not None and weight_grad is None
    return Gradients(
        dhidden.to(hidden.dtype),
        dweight.to(weight.dtype) if returned else None,
        None if dbias is None else dbias.to(bias.dtype),
    )


def _with_weight(block: Callable, weight: Tensor, hidden: Tensor, bias: Tensor | None):
    return block(hidden, weight, bias)
