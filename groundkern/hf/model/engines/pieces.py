"""Which keys of the whole sequence the tokens of a rank see: found once for all layers.

Tokens that follow each other share the keys up to their last one, so a rank that holds two runs, as
the zigzag order gives it, computes half of what it would with one mask over all keys.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils.weak import WeakTensorKeyDictionary

from groundkern.hf.model.rows import Rows, Window
from groundkern.kept import versions
from groundkern.parallel import Shard

MOST_RUNS = 4  # with more, as the striped order has, one call with one mask takes less time


class Piece(NamedTuple):
    """Tokens of a rank that attend together."""

    tokens: slice  # among the rank's
    keys: slice  # among all S
    mask: Tensor | CausalBias | None  # [B or 1, 1, tokens, keys]; None: causal, from key 0


class Form(NamedTuple):
    """What an attention function takes for a mask."""

    added: torch.dtype | None  # of numbers that are added to logits; None: bool, or no mask
    bias: bool  # a `CausalBias` too, which needs no memory

    def mask(self, seen: Tensor) -> Tensor:
        """bool -> as the function takes it."""
        if self.added is None:
            return seen
        zero = torch.zeros(seen.shape, dtype=self.added, device=seen.device)
        return zero.masked_fill_(~seen, torch.finfo(self.added).min)


class Pieces:
    """The pieces of a batch, made once for all layers of a window.

    They are made of `first_key`, and forgotten with it.
    """

    def __init__(self) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, shard: Shard, first_key: Tensor, window: Window, form: Form) -> list[Piece]:
        """The pieces of this rank.

        Args:
            shard: this rank's tokens.
            first_key: int32 [B, S].
            window: of the layer.
            form: of the masks.
        """
        now = versions((first_key,))
        if now is None:
            return _pieces(shard, first_key, window, form)
        known = self._made.setdefault(first_key, {})
        key = shard, window, form, now
        if key not in known:
            known[key] = _pieces(shard, first_key, window, form)
        return known[key]


def _pieces(shard: Shard, first_key: Tensor, window: Window, form: Form) -> list[Piece]:
    """The pieces; asks the device twice, for the runs and for what they see."""
    if not len(shard):
        return []
    start = _start(shard, first_key, window)  # [B, S_r]
    runs = _runs(shard.positions)
    edges = torch.tensor([(run.start, run.stop - 1) for run in runs], device=start.device)
    low = torch.stack([start[:, run].min() for run in runs])
    asked = torch.cat((low[:, None], shard.positions[edges]), 1)  # [runs, 3]
    *found, (high, alike, _) = torch.cat((asked, _summary(start)[None])).tolist()
    start = start[:1] if alike else start
    return [
        _piece(shard.positions, start, run, form, high == 0, tuple(ends))
        for run, ends in zip(runs, found, strict=True)
    ]


def _piece(
    positions: Tensor,
    start: Tensor,
    run: slice,
    form: Form,
    sees_all: bool,
    ends: tuple[int, int, int],
) -> Piece:
    """A piece whose tokens lie between two positions, and see keys from `low` on."""
    low, begin, last = ends
    tokens = run.stop - run.start
    keys = slice(low, last + 1)
    plain = sees_all and last - begin + 1 == tokens
    if plain and begin == 0 and not form.added:
        return Piece(run, keys, None)
    if plain and form.bias:
        return Piece(run, keys, causal_lower_right(tokens, last + 1))
    place = torch.arange(low, last + 1, device=start.device)
    seen = (place <= positions[run, None]) & (place >= start[:, run, None])
    return Piece(run, keys, form.mask(seen[:, None]))


def _start(shard: Shard, first_key: Tensor, window: Window) -> Tensor:
    """int32 [B, S_r]: the first key that each token sees; itself, if it sees none (padding)."""
    position = shard.positions.expand(len(first_key), -1)
    rows = Rows(position, shard.take(first_key)).at(window)
    return torch.minimum(rows.start, rows.position).view_as(position)


def _summary(start: Tensor) -> Tensor:
    """[3]: the largest, and whether all sequences are alike, twice: a row as those of runs."""
    alike = (start == start[:1]).all()
    return torch.stack((start.max(), alike, alike))


def _runs(positions: Tensor) -> list[slice]:
    """Tokens that follow each other in the sequence; all together if there are many runs."""
    cuts = (positions.diff() != 1).nonzero()[:, 0].add(1).tolist()
    if len(cuts) >= MOST_RUNS:
        cuts = []
    return [slice(a, b) for a, b in pairwise([0, *cuts, len(positions)])]
