"""What computes attention of the main tokens where a sequence is split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundkern.hf.model.rows import Window
from groundkern.parallel import Shard


class Engine(Protocol):
    """Attention of a rank's tokens over the keys of all ranks."""

    def __call__(
        self,
        attention: Callable,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: Shard,
        first_key: Tensor,
        window: Window,
        kwargs: dict,
    ) -> Tensor: ...


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        whole = x.new_zeros(*x.shape[:2], shard.length, x.shape[3])
        whole[:, :, shard.positions] = x
        dist.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        dist.all_reduce(g, group=ctx.shard.group)
        return g[:, :, ctx.shard.positions], None


class Gather:
    def __init__(self, model, group):
        pass

    def __call__(self, attention, module, q, k, v, shard, first_key, window, kwargs):
        k, v = _Whole.apply(k, shard), _Whole.apply(v, shard)
        j = torch.arange(shard.length, device=q.device)
        i = shard.positions[:, None]
        start = first_key[:, shard.positions][..., None]
        mask = (j <= i) & (j >= start)
        if isinstance(window, int):
            mask &= j > i - window
        mask = (mask | (j == i))[:, None]
        if module.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        return attention(module, q, k, v, mask, **kwargs)[0]


ENGINES = {"gather": Gather}
