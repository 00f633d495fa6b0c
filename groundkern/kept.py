"""What is made of integer tensors once and used again while nothing is written to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
MOST = 8  # things that one owner remembers


class Owner(Protocol):
    """A frozen dataclass of tensors, with a __dict__ and this."""

    captured: bool  # whether it was made while a CUDA graph was captured

    def tensors(self) -> list[Tensor]:
        """Its tensors."""


class _Kept(NamedTuple):
    key: Hashable
    others: tuple[Owner | Tensor | None, ...]
    versions: tuple[int, ...]
    made: object


def kept(
    owner: Owner,
    others: Sequence[Owner | Tensor | None],
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
    if torch.compiler.is_compiling():
        return make()
    versions = _versions(owner, others)
    if versions is None or owner.captured != capturing(owner.tensors()[0]):
        return make()
    known: list[_Kept] = owner.__dict__.setdefault("_kept", [])
    for place, entry in enumerate(known):
        same = entry.key == key and entry.versions == versions
        if same and all(a is b for a, b in zip(entry.others, others, strict=True)):
            known.append(known.pop(place))
            return entry.made
    made = make()
    known.append(_Kept(key, tuple(others), versions, made))
    del known[:-MOST]
    return made


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on x's device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _versions(owner: Owner, others: Sequence[Owner | Tensor | None]) -> tuple[int, ...] | None:
    """How often each tensor was written to; None if a tensor does not know."""
    tensors = owner.tensors()
    for x in others:
        if x is not None:
            tensors += [x] if isinstance(x, Tensor) else x.tensors()
    if torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors):
        return None
    return tuple(x._version for x in tensors)
