"""What ranks send each other, differentiably: every backward is the other one's forward.

The loss is the sum over ranks, so what a rank's tensor became on other ranks is differentiated
there, and the gradients meet on their way back. Every rank has to run the same calls in the same
order, backward too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.parallel.shards import Shard


class Exchange(NamedTuple):
    """How N rows are laid out on the ranks: each sends as many as the rank that has the most."""

    group: dist.ProcessGroup | None
    ranks: int
    most: int  # rows of a rank
    own: Tensor  # int64 [N_r], this rank's rows
    place: Tensor  # int64 [N], of each row among ranks x most

    @classmethod
    def of(cls, owner: Tensor, shard: Shard) -> Exchange:
        """The exchange of rows with these owners, int64 [N]."""
        counts = owner.bincount(minlength=shard.ranks)
        most = int(counts.max())
        order = owner.argsort(stable=True)
        first = counts.cumsum(0) - counts
        number = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        place = torch.empty_like(owner)
        place[order] = owner[order] * most + number
        own = (owner == shard.rank).nonzero()[:, 0]
        return cls(shard.group, shard.ranks, most, own, place)


def gather(x: Tensor, exchange: Exchange) -> Tensor:
    """[N_r, ...] of each rank -> [N, ...] on all."""
    return _Gather.apply(x, exchange)


def scatter_sum(x: Tensor, exchange: Exchange) -> Tensor:
    """[N, ...] of each rank -> the sum over ranks of its own rows, [N_r, ...]."""
    return _ScatterSum.apply(x, exchange)


def gather_ranks(x: Tensor, shard: Shard) -> Tensor:
    """[...] of each rank -> [ranks, ...] on all."""
    return _GatherRanks.apply(x, shard)


def all_sum(x: Tensor, shard: Shard) -> Tensor:
    """The sum over ranks, on all."""
    return _AllSum.apply(x, shard)


def wide(x: Tensor) -> Tensor:
    """What sums over ranks are made in: fp32, or fp64."""
    return x if x.dtype == torch.float64 else x.float()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        sent = x.new_zeros(exchange.most, *x.shape[1:])
        sent[: len(x)] = x
        got = x.new_empty(exchange.ranks * exchange.most, *x.shape[1:])
        if got.numel():
            dist.all_gather_into_tensor(got, sent, group=exchange.group)
        return got[exchange.place]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _ScatterSum.apply(gradient, ctx.exchange), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        summed = wide(x)
        sent = summed.new_zeros(exchange.ranks * exchange.most, *x.shape[1:])
        sent[exchange.place] = summed
        got = summed.new_empty(exchange.most, *x.shape[1:])
        if sent.numel():
            dist.reduce_scatter_tensor(got, sent, group=exchange.group)
        return got[: len(exchange.own)].to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Gather.apply(gradient, ctx.exchange), None


class _GatherRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        got = x.new_empty(shard.ranks, *x.shape)
        if x.numel():
            dist.all_gather_into_tensor(got.flatten(), x.flatten(), group=shard.group)
        return got

    @staticmethod
    def backward(ctx, gradient: Tensor):
        shard = ctx.shard
        return _ScatterRanks.apply(gradient, shard), None


class _ScatterRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        summed = wide(x)
        got = summed.new_empty(x.shape[1:])
        if x.numel():
            dist.reduce_scatter_tensor(got.flatten(), summed.flatten(), group=shard.group)
        return got.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _GatherRanks.apply(gradient, ctx.shard), None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        total = x.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllSum.apply(gradient, ctx.shard), None
