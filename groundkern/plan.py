"""What a GPU kernel needs of a selection alone, made once and used by every layer of a step.

Which rows, key sets and columns a step has does not change from layer to layer, from forward to
backward, or when checkpointing recomputes a layer. So which keys each tile of rows has to read is
found once: `kept` remembers it on the value types, and ops are given it as plain tensors. The CPU
backends need none of it and get `NO_PLAN`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from groundkern.selection import KeySets, QueryRows, capturing

Made = TypeVar("Made")
MOST = 8  # plans remembered by one `QueryRows`: one for each op, group size and batch of keys


class Plan(NamedTuple):
    """Row tiles and the key tiles that they read.

    A row tile is a run of lanes, which are (row, query head of one KV head) pairs: lane
    row * lanes + head. It never spans two sequences, and every sequence has at least one.
    Unused tiles at the end are empty.
    """

    tiles: Tensor | None  # int32 [T, 5]: sequence, first lane, last lane + 1, `first` and `count`
    # int32 [T, key tiles]: every key tile; first the `count` of them that hold a key that a row of
    # the tile may use. None: those are `first` to `first + count`.
    key_tiles: Tensor | None
    # For a backward with several row tiles a sequence, else None: the row tiles that read each wide
    # key tile.
    row_tiles: Tensor | None  # int32 [B * wide key tiles, parts]: first lanes; None: a range
    # int32 [B * wide key tiles, 3]: how many they are, the last lane + 1 of the sequence and, of a
    # range, the first lane.
    row_spans: Tensor | None
    place: Tensor | None  # int32 [B, S]: each key's place among its columns, or -1
    block_m: int  # lanes of a row tile; 0: no plan
    block_n: int  # keys of a key tile

    @property
    def one_tile(self) -> bool:
        """Whether tile b holds all the rows of sequence b."""
        return self.row_spans is None

    def divided(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """(the tensors, the sizes), in the order of the fields."""
        return self[:-2], self[-2:]


NO_PLAN = Plan(None, None, None, None, None, 0, 0)


class _Kept(NamedTuple):
    key: Hashable
    others: tuple[KeySets | Tensor | None, ...]
    versions: tuple[int, ...]
    made: object


def kept(
    rows: QueryRows,
    others: Sequence[KeySets | Tensor | None],
    key: Hashable,
    make: Callable[[], Made],
) -> Made:
    """What `make` returns, or what it returned before for the same rows, sets and columns.

    They are the same if they are the same objects, and nothing was written to their tensors since.
    Nothing is remembered where that cannot be told: of tensors of inference mode, which have no
    version; under torch.compile, which removes repeated calls itself; and if rows that were made
    before a CUDA graph's capture are used in it, because a replay may find other values in them.

    Args:
        rows: they remember what was made.
        others: what else it depends on, key sets or integer tensors.
        key: hashable, what it depends on besides: sizes and the name of what is made.
        make: without arguments.
    """
    if torch.compiler.is_compiling():
        return make()
    versions = _versions(rows, others)
    if versions is None or rows.captured != capturing(rows.start):
        return make()
    known: list[_Kept] = rows.__dict__.setdefault("_kept", [])
    for entry in known:
        same = entry.key == key and entry.versions == versions
        if same and all(a is b for a, b in zip(entry.others, others, strict=True)):
            return entry.made
    made = make()
    known.append(_Kept(key, tuple(others), versions, made))
    del known[:-MOST]
    return made


def _versions(rows: QueryRows, others: Sequence[KeySets | Tensor | None]) -> tuple[int, ...] | None:
    """How often each tensor was written to; None if a tensor does not know."""
    tensors = [rows.sequence, rows.start, rows.stop]
    for x in others:
        tensors += [x.bits, x.index] if isinstance(x, KeySets) else [] if x is None else [x]
    if any(x.is_inference() for x in tensors):
        return None
    return tuple(x._version for x in tensors)
