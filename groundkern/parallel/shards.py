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
from groundkern.parallel.agreement import number
from groundkern.selection import KeySets, QueryRows


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

        Returns:
            The sharding.
        """
        counts = torch.tensor(lengths, dtype=torch.int64)
        owner = torch.arange(len(lengths)).repeat_interleave(counts)
        return cls(owner, len(lengths))

    @classmethod
    def even(cls, length: int, ranks: int) -> Sharding:
        """One piece for each rank, all as long, as DeepSpeed's Ulysses and ALST cut a sequence.

        Args:
            length: S, a multiple of `ranks`.
            ranks: how many there are.

        Returns:
            The sharding.

        Raises:
            ValueError: another length.
        """
        good = ranks > 0 and length % ranks == 0
        checks.require(good, "length", f"a multiple of the {ranks} ranks", length)
        return cls.contiguous([length // ranks] * ranks)

    @classmethod
    def from_order(cls, order: Tensor, ranks: int) -> Sharding:
        """The sharding of tokens that are put into another order and then cut into even pieces, as
        torch's `context_parallel` does: `order` is what its load balancer generates.

        Args:
            order: int64 [S], the token at each place; S is a multiple of `ranks`.
            ranks: how many there are.

        Returns:
            The sharding.

        Raises:
            TypeError: another dtype.
            ValueError: another length, no permutation, or ranks that hold their tokens in another
                order than the sequence's.
        """
        checks.tensor("order", order, "S", {}, dtype=torch.int64)
        good = ranks > 0 and len(order) % ranks == 0
        checks.require(good, "order", f"a multiple of {ranks} tokens", len(order))
        every = torch.arange(len(order), device=order.device)
        checks.require(torch.equal(order.sort().values, every), "order", "a permutation", order)
        pieces = order.view(ranks, -1)
        wanted = "ascending tokens on every rank"
        checks.require(bool((pieces.diff(dim=1) > 0).all()), "order", wanted, order)
        owner = torch.empty_like(order)
        owner[order] = every // max(1, pieces.shape[1])
        return cls(owner, ranks)

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Sharding:
        """2 x ranks pieces, the first and the last to rank 0, the next two to rank 1, ...: as much
        causal attention for each rank.

        Pieces differ by at most one token. Of a multiple of 2 x ranks tokens it is what the
        head-tail load balancer of torch's `context_parallel` does.

        Args:
            length: S.
            ranks: how many there are.

        Returns:
            The sharding.
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

        Returns:
            The sharding.

        Raises:
            ValueError: a block of no tokens.
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

    def take(self, x: Tensor, rows: QueryRows) -> Tensor:
        """What a tensor with an entry for each column has for those of this rank, such as a target.

        Args:
            x: [N, C], of all rows.
            rows: the N rows.

        Returns:
            [N, C_r]; 0 for padding.
        """
        place = self.place[rows.sequence.long()]  # [N, C_r]
        return torch.where(place >= 0, x.gather(1, place.clamp(min=0)), 0)


class Shard:
    """A rank's part of sequences that are all split in the same way.

    Args:
        sharding: who holds which token.
        group: the process group, with a rank for each of the sharding's; None: all processes.
        device: of the tensors that are split; None: that of `sharding.owner`.

    Raises:
        ValueError: a group of another size, or without this process.
    """

    group: dist.ProcessGroup | None
    ranks: int
    rank: int
    owner: Tensor
    positions: Tensor

    def __init__(
        self,
        sharding: Sharding,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        checks.require(self.ranks > 0, "group", "a group of which this process is a member", group)
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
    def number(self) -> Tensor:
        """int64 scalar that stands for the sharding."""
        return number(self.owner)

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

        Raises:
            ValueError: another number of entries.
        """
        size = x.shape[dim]
        checks.require(size == self.length, "x", f"{self.length} entries in dim {dim}", size)
        return x.index_select(dim, self.positions)

    def sets(self, allowed: KeySets) -> KeySets:
        """Key sets over whole sequences, cut down to this rank's keys.

        Args:
            allowed: sets over S keys.

        Returns:
            The same sets over S_r keys.

        Raises:
            ValueError: sets over another number of keys.
        """
        return KeySets.from_bool(self.take(allowed.to_bool()), allowed.index)

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

        Returns:
            LocalColumns; waits for the device.

        Raises:
            TypeError, ValueError: another dtype or shape; on CPU also columns >= S.
        """
        checks.tensor("columns", columns, "B C", {}, dtype=torch.int32)
        if columns.numel() and checks.values_visible(columns):
            high = int(columns.max())
            checks.require(high < self.length, "columns", f"key columns < {self.length}", high)
        mine = torch.cat((self.owner == self.rank, self.owner.new_zeros(1, dtype=torch.bool)))
        own = mine[torch.where(columns >= 0, columns, self.length).long()]
        most = int(own.sum(1).max()) if own.numel() else 0
        place = own.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        found = own.gather(1, place)
        local = self.before(columns.gather(1, place).clamp(min=0))
        return LocalColumns(torch.where(found, local, -1), torch.where(found, place, -1))
