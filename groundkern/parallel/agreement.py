"""Ranks that were given something else are refused, on all of them, before one waits for another.

What is compared are numbers that stand for tensors and options, once a step for each of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import checks
from groundkern.kept import capturing, kept
from groundkern.selection import QueryRows

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


def call_words(
    function: str,
    inputs: Sequence[Tensor | None],
    *options: object,
) -> tuple[object, ...]:
    """What has to be the same on all ranks, which else wait for messages that nobody sends.

    Args:
        function: its name.
        inputs: of which the dtypes count, and who requires grad.
        options: hashable, and with a repr that is the same on all ranks.
    """
    recording = torch.is_grad_enabled()
    seen = [None if x is None else (str(x.dtype), x.requires_grad and recording) for x in inputs]
    return function, *options, *seen


def agree(
    together: QueryRows, words: Hashable, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Refuse a call that differs between ranks; compared once a step.

    Args:
        together: remembers what was compared, and nothing that ranks do alone, because all of them
            have to forget alike.
        words: of the call.
        group, device: as in `require_same`.

    Raises:
        ValueError: on every rank, if others have other words.
    """

    def make() -> None:
        wanted = f"dtypes, heads, options and who requires grad as on the other ranks: {words}"
        require_same("call", wanted, [number_of(words)], group, device)

    if not capturing(together.sequence):
        kept(together, (), words, make)
