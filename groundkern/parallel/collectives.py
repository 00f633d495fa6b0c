"""What ranks send each other, differentiably: every backward is the adjoint of its forward.

The loss is the sum over ranks, so what a rank's tensor became on other ranks is differentiated
there, and the gradients meet on their way back. Every rank has to run the same calls in the same
order, backward too. Rows are sent without padding, in their own dtype; sums are made in fp32 or
fp64 where they arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.parallel.shards import Shard
from groundkern.precision import accumulation_dtype

F = TypeVar("F", bound=Callable[..., object])


def uncompiled(function: F) -> F:
    """torch.compile's `disable`, by a decorator that keeps the type of what it decorates."""
    return cast("F", torch.compiler.disable(function))


class Grouped(Protocol):
    group: dist.ProcessGroup | None  # the ranks; None: all processes


class Exchange(NamedTuple):
    """How N rows lie on the ranks."""

    shard: Shard
    counts: list[int]  # rows of each rank
    own: Tensor  # int64 [N_r], this rank's rows
    order: Tensor  # int64 [N], the rows by rank
    place: Tensor  # int64 [N], of each row in that order

    @classmethod
    def of(cls, owner: Tensor, shard: Shard) -> Exchange:
        """The exchange of rows with these owners, int64 [N]."""
        counts = owner.bincount(minlength=shard.ranks).tolist()
        order = owner.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        first = sum(counts[: shard.rank])
        own = order[first : first + counts[shard.rank]]
        return cls(shard, counts, own, order, place)

    @property
    def rows(self) -> int:
        """N."""
        return len(self.order)


def gather(x: Tensor, exchange: Exchange) -> Tensor:
    """[N_r, ...] of each rank -> [N, ...] on all."""
    return _Gather.apply(x, exchange)


def scatter_sum(x: Tensor, exchange: Exchange) -> Tensor:
    """[N, ...] of each rank -> the sum over ranks of its own rows, [N_r, ...]."""
    return _ScatterSum.apply(x, exchange)


def all_sum(x: Tensor, shard: Grouped) -> Tensor:
    """The sum over ranks, on all, in x's dtype."""
    return _AllSum.apply(x, shard)


def sent_to_all(parts: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """[N_r, ...] of each rank -> [N, ...] on all, several tensors in one message."""
    ranks, own = exchange.shard.ranks, exchange.counts[exchange.shard.rank]
    message = _packed(parts).repeat(ranks, 1)
    got = _exchanged(message, [own] * ranks, exchange.counts, exchange)
    return _unpacked(got.index_select(0, exchange.place), parts)


def sent_home(parts: Sequence[Tensor], exchange: Exchange) -> list[Tensor]:
    """[N, ...] of each rank -> [ranks, N_r, ...] with the owners of the rows."""
    ranks, own = exchange.shard.ranks, exchange.counts[exchange.shard.rank]
    message = _packed(parts).index_select(0, exchange.order)
    got = _exchanged(message, exchange.counts, [own] * ranks, exchange)
    return [x.unflatten(0, (ranks, own)) for x in _unpacked(got, parts)]


def from_all(x: Tensor, shard: Shard) -> Tensor:
    """[...] of each rank -> [ranks, ...] on all."""
    got = x.new_empty(shard.ranks, *x.shape)
    if x.numel():
        dist.all_gather(list(got), x.contiguous(), group=shard.group)
    return got


def summed(x: Tensor, shard: Grouped) -> Tensor:
    """The sum over ranks, on all; 16-bit floats are summed in fp32."""
    wide = accumulation_dtype(x.dtype) if x.is_floating_point() else x.dtype
    total = x.to(wide, copy=True).contiguous()
    if total.numel():
        dist.all_reduce(total, group=shard.group)
    return total.to(x.dtype)


def greatest(x: Tensor, shard: Grouped) -> Tensor:
    """The maximum over ranks, on all."""
    top = x.clone(memory_format=torch.contiguous_format)
    if top.numel():
        dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    return top


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """uint8 [rows, bytes of a row]."""
    flat = []
    for x in parts:
        matrix = x.detach().reshape(len(x), x.shape[1:].numel())
        if matrix.stride() != (matrix.shape[1], 1):  # also of a single element, as views take it
            matrix = matrix.clone(memory_format=torch.contiguous_format)
        flat.append(matrix.view(torch.uint8))
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _unpacked(got: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """What was packed of tensors like `parts`, which may have another number of rows."""
    found = got.split([x.shape[1:].numel() * x.element_size() for x in parts], 1)
    return [
        x.contiguous().view(like.dtype).reshape(len(x), *like.shape[1:])
        for x, like in zip(found, parts, strict=True)
    ]


def _exchanged(message: Tensor, sent: list[int], got: list[int], exchange: Exchange) -> Tensor:
    """Rows of a message to each rank, as many as `sent` says; `got` from each."""
    here = message.new_empty(sum(got), message.shape[1])
    if exchange.rows and message.shape[1]:
        dist.all_to_all_single(here, message, got, sent, group=exchange.shard.group)
    return here


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return sent_to_all([x], exchange)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ScatterSum.apply(gradient, ctx.exchange), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        parts = sent_home([x], exchange)[0]  # [ranks, N_r, ...]
        return parts.sum(0, dtype=accumulation_dtype(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradient, ctx.exchange), None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Grouped) -> Tensor:
        ctx.shard = shard
        return summed(x, shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllSum.apply(gradient, ctx.shard), None
