"""Dice that are made from a seed and a call's number, and tensors of the same values laid out in
memory in every way that users lay them out."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

OUTSIDE = 2**30  # what an int tensor's memory holds outside the view; floats: NaN


class Dice:
    """All that a call is drawn with."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def one_of(self, options: Sequence):
        return self.random.choice(options)

    def weighed(self, weights: dict):
        """A key, as often as its weight says."""
        return self.random.choices(list(weights), list(weights.values()))[0]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def within(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int) -> Tensor:
        """fp64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """fp64 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def coin(self, *shape: int, share: float = 0.5) -> Tensor:
        return self.uniform(*shape) < share

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 in [low, high]."""
        drawn = torch.randint(low, high + 1, shape, generator=self.generator)
        return drawn.to(torch.int32)


def _memory(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, torch.nan if x.is_floating_point() else OUTSIDE)


def _offset(x: Tensor) -> Tensor:
    """Starts one element into its memory, so at no multiple of 16 bytes."""
    return _memory(x, x.numel() + 1)[1:].view(x.shape)


def _sliced(x: Tensor) -> Tensor:
    return _memory(x, *x.shape[:-1], x.shape[-1] + 5)[..., 3:-2]


def _half(x: Tensor) -> Tensor:
    """As k of a fused [..., 2 D] projection."""
    return _memory(x, *x.shape[:-1], 2 * x.shape[-1])[..., x.shape[-1] :]


def _stepped(x: Tensor) -> Tensor:
    return _memory(x, *x.shape, 2)[..., 1]


def _swapped(x: Tensor) -> Tensor:
    """The two dimensions before the last are exchanged: k [B, H, S, D] of a [B, S, H, D]."""
    if x.dim() < 3:
        return _memory(x, *x.shape[::-1]).t()
    shape = list(x.shape)
    shape[-3], shape[-2] = shape[-2], shape[-3]
    return _memory(x, *shape).transpose(-3, -2)


def _from_larger(x: Tensor) -> Tensor:
    """A part of every dimension, as of a cache that is longer than what is in it."""
    larger = _memory(x, *(size + 1 for size in x.shape))
    return larger[tuple(slice(0, size) for size in x.shape)]


_LAYOUTS = {
    f.__name__.lstrip("_"): f for f in (_offset, _sliced, _half, _stepped, _swapped, _from_larger)
}


def laid_out(dice: Dice, x: Tensor, plain: float = 0.4) -> tuple[Tensor, str]:
    """(the same values in some layout, its name); `plain`: the share of contiguous ones."""
    if x.dim() == 0 or dice.chance(plain):
        return x.contiguous(), "contiguous"
    name = dice.one_of(list(_LAYOUTS))
    return _LAYOUTS[name](x).copy_(x), name
