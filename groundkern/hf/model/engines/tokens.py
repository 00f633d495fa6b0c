"""What ranks have of their tokens, on all ranks and in the order of the sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern.parallel import Shard
from groundkern.precision import accumulation_dtype

# torch 2.13 has other names for these, and warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Layout(NamedTuple):
    """Where tokens are in what is sent: each rank sends as many as the one that has the most."""

    group: dist.ProcessGroup | None
    ranks: int
    most: int
    own: int  # tokens of this rank
    place: Tensor | None  # int64 [S], among ranks x most; None: they are in their order

    @classmethod
    def of(cls, shard: Shard) -> Layout:
        """The layout of a shard's sequences; asks the device once."""
        counts, owner = shard.counts, shard.owner
        most = max(counts)
        first = torch.tensor(counts, device=owner.device).cumsum(0)
        first = first - first.diff(prepend=first.new_zeros(1))
        order = owner.argsort(stable=True)
        number = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        place = torch.empty_like(order)
        place[order] = owner[order] * most + number
        plain = len(owner) == shard.ranks * most and bool((place.diff() == 1).all())
        return cls(shard.group, shard.ranks, most, len(shard), None if plain else place)


def all_tokens(x: Tensor, layout: Layout) -> Tensor:
    """The tokens of all ranks, differentiably: gradients are summed over the ranks.

    Args:
        x: [S_r, ...], of this rank's tokens.
        layout: of the shard.

    Returns:
        [S, ...].
    """
    return _AllTokens.apply(x, layout)


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        sent = x
        if layout.own < layout.most:
            sent = x.new_zeros(layout.most, *x.shape[1:])
            sent[: layout.own] = x
        got = x.new_empty(layout.ranks * layout.most, *x.shape[1:])
        _all_gather(got, sent.contiguous(), group=layout.group)
        return got if layout.place is None else got[layout.place]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        layout: Layout = ctx.layout
        sent = gradient.to(accumulation_dtype(gradient.dtype))
        if layout.place is None:
            sent = sent.contiguous()
        else:
            every = sent.new_zeros(layout.ranks * layout.most, *sent.shape[1:])
            sent = every.index_copy_(0, layout.place, sent)
        got = sent.new_empty(layout.most, *sent.shape[1:])
        _reduce_scatter(got, sent, group=layout.group)
        return got[: layout.own].to(gradient.dtype), None
