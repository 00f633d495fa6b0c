"""Random calls of the ops, whole: what every rank draws alike from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from groundkern import KeySets, QueryRows
from groundkern.parallel import Sharding

DIM, VALUE_DIM = 16, 20


@dataclass
class Call:
    """A call of all functions on whole sequences; upstream gradients are random too."""

    q: Tensor  # [N, Hq, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    g: Tensor  # [N, Hq, Dv]
    rows: QueryRows
    columns: Tensor  # int32 [B, C]
    target: Tensor  # [N, C]
    allowed: KeySets | None
    head_weight: Tensor | None
    over: Literal["visible", "columns"]
    heads: Literal["mean", "each"]
    scale: float | None
    softcap: float | None
    rectify: bool
    above: dict[str, Tensor]  # upstream gradients of the results, by name
    trained: set[str]  # inputs that require grad
    sharding: Sharding
    owner: Tensor | None  # int64 [N]
    head_counts: list[int]  # KV heads of each rank, where heads are split


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        """In [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def wholes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.5

    def chance(self) -> bool:
        return self.whole(0, 1) == 1

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator)


def sharding(draw: _Draw, length: int, ranks: int) -> Sharding:
    kind = draw.whole(0, 3)
    if kind == 0:  # pieces of any length, some of none
        cuts = [0, *sorted(draw.wholes(0, length, ranks - 1).tolist()), length]
        return Sharding.contiguous([b - a for a, b in pairwise(cuts)])
    if kind == 1:
        return Sharding.zigzag(length, ranks)
    if kind == 2:
        return Sharding.striped(length, ranks, block=draw.whole(1, 4))
    return Sharding(draw.wholes(0, ranks - 1, length), ranks)


def call(seed: int, ranks: int) -> Call:
    """The call of a seed: fp64, sometimes without rows, columns, targets or keys on some ranks."""
    draw = _Draw(seed)
    batch, length, count = draw.whole(1, 3), draw.whole(1, 40), draw.whole(0, 9)
    head_counts = [draw.whole(1, 2) for _ in range(ranks)]
    kv_heads, group = sum(head_counts), draw.whole(1, 3)
    heads = kv_heads * group
    sequence = draw.wholes(0, batch - 1, count).sort().values
    position = draw.wholes(-1, length - 1, count)  # -1: padding
    start = draw.wholes(0, length - 1, count).clamp(max=position.clamp(min=0))
    start = torch.where(draw.flags(count), start, 0)
    window = draw.whole(1, length) if draw.chance() else None
    rows = QueryRows.causal(sequence, position, start=start, window=window)
    allowed = None
    if draw.chance():
        allowed = KeySets.from_bool(draw.flags(3, length), draw.wholes(-1, 2, count).int())
    wide = draw.whole(0, length)  # columns of a sequence, and one of padding
    columns = [draw.permutation(length)[:wide].sort().values for _ in range(batch)]
    columns = torch.nn.functional.pad(torch.stack(columns), (0, 1), value=-1).int()
    target = draw.normal(count, wide + 1).abs() * draw.flags(count, wide + 1)
    weights = (None, draw.normal(heads).abs(), draw.normal(count, heads).abs())
    shapes = {
        "out": (count, heads, VALUE_DIM),
        "lse": (count, heads),
        "map": (count, wide + 1),
        "contribution": (count, wide + 1),
        "kl": (count,),
    }
    names = ("q", "k", "v", "g", "head_weight")
    return Call(
        q=draw.normal(count, heads, DIM),
        k=draw.normal(batch, length, kv_heads, DIM).transpose(1, 2),
        v=draw.normal(batch, length, kv_heads, VALUE_DIM).transpose(1, 2),
        g=draw.normal(count, heads, VALUE_DIM),
        rows=rows,
        columns=columns,
        target=target,
        allowed=allowed,
        head_weight=weights[draw.whole(0, 2)],
        over="visible" if draw.chance() else "columns",
        heads="mean" if draw.chance() else "each",
        scale=0.7 if draw.chance() else None,
        softcap=2.0 if draw.chance() else None,
        rectify=draw.chance(),
        above={name: draw.normal(*shape) for name, shape in shapes.items()},
        trained=set(names) if draw.chance() else {n for n in names if draw.chance()},
        sharding=sharding(draw, length, ranks),
        owner=draw.wholes(0, ranks - 1, count) if draw.chance() else None,
        head_counts=head_counts,
    )
