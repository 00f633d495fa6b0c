"""Ranks that were given something else are refused, on all of them, before one waits for another.

What is compared are numbers that stand for tensors and options, once a step for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import checks

FACTOR = 6364136223846793005  # of a linear congruential generator, modulo 2 ** 64


def number(x: Tensor) -> Tensor:
    """int64 scalar of a tensor of integers: another one for other values or another order."""
    place = torch.arange(1, len(x) + 1, device=x.device) * FACTOR
    return ((x.long() + 7) * (place ^ (place >> 29))).sum() + len(x)


def number_of(words: object) -> int:
    """The same for what has a repr."""
    return crc32(repr(words).encode())


def require_same(
    name: str,
    wanted: str,
    numbers: Sequence[Tensor | int],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Refuse numbers that are not those of all other ranks.

    Args:
        name, wanted: of the error.
        numbers: as many on every rank.
        group: the ranks.
        device: that the group sends from.

    Raises:
        ValueError: on every rank, if others have other numbers.
    """
    own = torch.stack([torch.as_tensor(x, dtype=torch.int64, device=device) for x in numbers])
    everyone = own.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(everyone), own, group=group)
    first, *others = everyone.tolist()
    differing = [rank for rank, found in enumerate(others, 1) if found != first]
    if differing:
        checks.fail(name, wanted, f"others on rank {differing[0]} than on rank 0")
