"""Which rank of a group holds which tokens of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from groundkern import checks


@dataclass(frozen=True)
class Sharding:
    """The rank that holds each token of a sequence of S tokens; a rank may hold none.

    A rank keeps its tokens in the order that they have in the sequence.

    Args:
        owner: int64 [S], the rank of each token.
        ranks: how many ranks there are.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; on CPU also ranks that do not exist.
    """

    owner: Tensor
    ranks: int

    def __post_init__(self) -> None:
        checks.tensor("owner", self.owner, "S", {}, dtype=torch.int64)
        checks.require(self.ranks > 0, "ranks", "at least one", self.ranks)
        if self.owner.numel() and checks.values_visible(self.owner):
            low, high = int(self.owner.min()), int(self.owner.max())
            wanted = f"ranks in [0, {self.ranks})"
            checks.require(low >= 0 and high < self.ranks, "owner", wanted, f"[{low}, {high}]")

    @classmethod
    def contiguous(cls, lengths: Sequence[int]) -> Sharding:
        """One piece for each rank, in their order.

        Args:
            lengths: the tokens of each rank.
        """
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return cls(owner, len(lengths))

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Sharding:
        """2 x ranks pieces, the first and the last to rank 0, the next two to rank 1, ...: as much
        causal attention for each rank.

        Pieces differ by at most one token.

        Args:
            length: S.
            ranks: how many there are.
        """
        pieces = torch.arange(length).tensor_split(2 * ranks)
        forth = torch.arange(ranks)
        ranked = torch.cat((forth, forth.flip(0)))
        sizes = torch.tensor([len(piece) for piece in pieces])
        return cls(ranked.repeat_interleave(sizes), ranks)

    @classmethod
    def striped(cls, length: int, ranks: int, *, block: int = 1) -> Sharding:
        """Blocks of so many tokens, dealt out to the ranks in turn.

        Args:
            length: S.
            ranks: how many there are.
            block: tokens of a block.
        """
        checks.require(block > 0, "block", "at least one token", block)
        return cls(torch.arange(length) // block % ranks, ranks)

    def positions(self, rank: int) -> Tensor:
        """The tokens of a rank.

        Args:
            rank: in [0, ranks).

        Returns:
            int64 [S_r], ascending.
        """
        return (self.owner == rank).nonzero()[:, 0]


class LocalColumns(NamedTuple):
    """The key columns of a map that a rank holds."""

    columns: Tensor  # int32 [B, C_r], among the rank's keys, ascending, padded with -1
    place: Tensor  # int64 [B, C_r], which of the C columns each is; -1 for padding


class Shard:
    """A rank's part of sequences that are all split in the same way.

    Args:
        sharding: who holds which token.
        group: the process group, with a rank for each of the sharding's; None: all processes.
        device: of the tensors that are split; None: that of `sharding.owner`.

    Raises:
        ValueError: a group of another size.
    """

    def __init__(
        self,
        sharding: Sharding,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        wanted = f"a group of {sharding.ranks} ranks, as the sharding has"
        checks.require(self.ranks == sharding.ranks, "group", wanted, self.ranks)
        self.rank = dist.get_rank(group)
        self.owner = sharding.owner.to(device)  # int64 [S]
        self.positions = sharding.positions(self.rank).to(device)  # int64 [S_r], ascending

    @property
    def length(self) -> int:
        """S, the tokens of a whole sequence."""
        return len(self.owner)

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def counts(self) -> list[int]:
        """The tokens of each rank."""
        return self.owner.bincount(minlength=self.ranks).tolist()

    def take(self, x: Tensor, dim: int = -1) -> Tensor:
        """A rank's part of a tensor that has an entry for each token.

        Args:
            x: of any shape, whose dimension `dim` has S entries.
            dim: which one.

        Returns:
            The same with S_r entries; differentiable.
        """
        size = x.shape[dim]
        checks.require(size == self.length, "x", f"{self.length} entries in dim {dim}", size)
        return x.index_select(dim, self.positions)

    def before(self, position: Tensor) -> Tensor:
        """How many of this rank's tokens come before positions of the whole sequence.

        Args:
            position: integers of any shape, in [0, S].

        Returns:
            int32 of the same shape.
        """
        return torch.searchsorted(self.positions, position.long(), out_int32=True)

    def columns(self, columns: Tensor) -> LocalColumns:
        """The columns of a map that this rank holds.

        Args:
            columns: int32 [B, C], key columns of whole sequences, ascending, padded with -1.
        """
        at = columns.clamp(min=0).long()
        own = (columns >= 0) & (self.owner[at] == self.rank)
        most = int(own.sum(1).max()) if own.numel() else 0
        place = own.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        found = own.gather(1, place)
        local = self.before(columns.gather(1, place).clamp(min=0))
        return LocalColumns(torch.where(found, local, -1), torch.where(found, place, -1))
