"""What is made of integer tensors once and used again while nothing is written to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
Versions = tuple[int, ...]
MOST = 16  # things that one owner remembers
MOST_KEYS = 256
_remembering = True


class Holder(Protocol):
    """A frozen dataclass of tensors."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors."""


class Owner(Holder, Protocol):
    """One with a __dict__ and this."""

    @property
    def captured(self) -> bool:
        """Whether it was made while a CUDA graph was captured."""


class _Kept(NamedTuple):
    others: tuple[Holder | Tensor | None, ...]  # held, so that no other object gets their ids
    versions: Versions
    made: Any


def kept(
    owner: Owner,
    others: Sequence[Holder | Tensor | None],
    key: Hashable,
    make: Callable[[], Made],
) -> Made:
    """What `make` returns, or what it returned before for the same owner and others.

    They are the same if they are the same objects, and nothing was written to their tensors since.
    Nothing is remembered where that cannot be told: of tensors of inference mode, which have no
    version; under torch.compile, which removes repeated calls itself; and if an owner that was made
    before a CUDA graph's capture is used in it, because a replay may find other values in it.

    Args:
        owner: remembers what was made, the last `MOST` things that were used.
        others: what else it depends on.
        key: hashable, what it depends on besides: sizes and the name of what is made.
        make: without arguments.
    """
    if torch.compiler.is_compiling() or not _remembering:
        return make()
    tensors = owner.tensors()
    for x in others:
        if x is not None:
            tensors += (x,) if isinstance(x, Tensor) else x.tensors()
    now = versions(tensors)
    if now is None or owner.captured != capturing(tensors[0]):
        return make()
    known: dict[Hashable, _Kept] = owner.__dict__.setdefault("_kept", {})
    full = (key, *map(id, others))
    entry = known.pop(full, None)
    if entry is None or entry.versions != now:
        entry = _Kept(tuple(others), now, make())
    known[full] = entry  # the last
    if len(known) > MOST:
        del known[next(iter(known))]
    return entry.made


def kept_by(key: Hashable) -> dict[Hashable, Any]:
    """What is remembered of a key, to be filled: an empty dictionary at first.

    Of the `MOST_KEYS` keys that were used last, and by the process: so it holds no tensors.
    """
    return _of_key(key) if _remembering else {}


@lru_cache(MOST_KEYS)
def _of_key(key: Hashable) -> dict[Hashable, Any]:
    return {}


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within the block everything is made anew: for those who change what it is made with."""
    global _remembering
    before, _remembering = _remembering, False
    try:
        yield
    finally:
        _remembering = before


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def versions(tensors: Sequence[Tensor]) -> Versions | None:
    """How often each tensor was written to; None if a tensor does not know."""
    if torch.is_inference_mode_enabled():
        return None
    try:
        return tuple([x._version for x in tensors])
    except RuntimeError:  # a tensor of inference mode
        return None
