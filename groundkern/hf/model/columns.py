"""The columns of attention maps where keys lie on several ranks: each has those of its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groundkern.hf.model.rows import Rows
from groundkern.parallel import Shard
from groundkern.parallel.collectives import all_sum
from groundkern.selection import KeySets


@dataclass(frozen=True)
class SplitColumns:
    """The columns of maps that this rank holds.

    Args:
        shard: its part of the sequences.
        columns: int32 [B, C_r], among its keys.
        place: int64 [N, C_r], which of the row's C columns each is; C for padding.
        whole: C.
        allowed: the keys of each row's own image, of this rank's; None: every column is.
    """

    shard: Shard
    columns: Tensor
    place: Tensor
    whole: int
    allowed: KeySets | None = None

    @classmethod
    def of(cls, shard: Shard, rows: Rows, columns: Tensor, allowed: KeySets | None) -> SplitColumns:
        """Those of rows whose maps have `columns`, int32 [B, C] of whole sequences."""
        local, whole = shard.columns(columns), columns.shape[1]
        place = torch.where(local.place >= 0, local.place, whole)
        return cls(shard, local.columns, place[rows.sequence.long()], whole, allowed)

    def take(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C_r]: of this rank's columns; 0 for padding."""
        return torch.cat((x, x.new_zeros(len(x), 1)), 1).gather(1, self.place)

    def all(self, x: Tensor) -> Tensor:
        """[N, C_r] of each rank -> [N, C] on all."""
        whole = x.new_zeros(len(x), self.whole + 1).scatter(1, self.place, x)
        return all_sum(whole[:, : self.whole].contiguous(), self.shard)
