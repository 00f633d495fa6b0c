"""What a GPU kernel needs of a selection alone, made once and used by every layer of a step.

Which rows, key sets and columns a step has does not change from layer to layer, from forward to
backward, or when checkpointing recomputes a layer. So which keys each tile of rows has to read is
found once: `groundkern.kept` remembers it on the rows, and ops are given it as plain tensors. The
CPU backends need none of it and get `NO_PLAN`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
