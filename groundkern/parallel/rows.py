"""Query rows whose queries lie on several ranks, and their way to all ranks and back."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from groundkern import checks
from groundkern.parallel.agreement import number, require_same
from groundkern.parallel.collectives import Exchange, gather, scatter_sum
from groundkern.parallel.shards import Shard
from groundkern.selection import QueryRows


class ShardedRows:
    """N query rows of whole sequences, each owned by one rank; all ranks know all of them.

    Made by all ranks of the group together, once a step: they compare what they were given, and
    wait for the device. Its attribute `keys` has all N rows with the keys of this rank that each
    sees, `own` the indices of this rank's rows, int64 [N_r].

    Args:
        rows: N rows in whole sequences; the same on every rank.
        shard: this rank's part of the sequences.
        owner: int64 [N], the rank that has the query of each row and gets its results; None: the
            rank that holds its token (of padding: the first token).

    Raises:
        ValueError: other rows, owners or shardings on other ranks (all ranks raise it); another
            number of owners, ranks that do not exist, rows beyond the sequences.
    """

    rows: QueryRows
    shard: Shard
    owner: Tensor
    exchange: Exchange
    own: Tensor
    keys: QueryRows
    together: QueryRows

    def __init__(self, rows: QueryRows, shard: Shard, owner: Tensor | None = None) -> None:
        self.rows, self.shard = rows, shard
        holder = _holders(rows, shard)
        self.owner = holder if owner is None else owner
        checks.tensor("owner", self.owner, "N", {"N": len(rows)}, dtype=torch.int64)
        found = [number(x) for x in (*rows.tensors(), self.owner)]
        wanted = "the same rows, owners and sharding on every rank of the group"
        found.append(shard.number)
        require_same("rows", wanted, found, shard.group, self.owner.device)
        _check(rows, self.owner, shard)
        elsewhere = (self.owner != holder) & (rows.position >= 0)
        self._elsewhere = bool(elsewhere.any())
        self.exchange = Exchange.of(self.owner, shard)
        self.own = self.exchange.own
        start, stop = shard.before(rows.start), shard.before(rows.stop)
        self.keys = QueryRows(rows.sequence, rows.position, start, stop, rows.most)
        place = shard.before(rows.position.clamp(min=0))
        # This rank's rows, with the places of their tokens among its own.
        sequence, place, start, stop = (x[self.own] for x in (rows.sequence, place, start, stop))
        self._here = QueryRows(sequence, place, start, stop)
        # Remembers only what ranks found together, so that all of them forget alike.
        self.together = replace(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, x: Tensor) -> Tensor:
        """Gather this rank's rows of a tensor of its tokens, differentiably.

        Args:
            x: [B, H, S_r, D] or [B, S_r, D].

        Returns:
            [N_r, H, D] or [N_r, D]; a padding row has the values of any token.

        Raises:
            ValueError: x has another number of dimensions or tokens; rows whose owner is another
                rank than their token's.
        """
        if x.dim() not in (3, 4) or x.shape[-2] != len(self.shard):
            wanted = f"a tensor [B, H, S_r, D] or [B, S_r, D] of S_r = {len(self.shard)} tokens"
            checks.fail("x", wanted, list(x.shape))
        if self._elsewhere:
            wanted = "rows that their token's rank owns: the queries of others were moved already"
            checks.fail("rows", wanted, "an owner of its own")
        return self._here.take(x)

    def gather(self, x: Tensor) -> Tensor:
        """What ranks have of their rows, on all ranks.

        Args:
            x: [N_r, ...].

        Returns:
            [N, ...]; its gradients are summed over the ranks.

        Raises:
            ValueError: another number of rows.
        """
        wanted = f"{len(self.own)} rows, which this rank owns"
        checks.require(len(x) == len(self.own), "x", wanted, len(x))
        return gather(x, self.exchange)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of what each has of all rows, on the rows' owners.

        Args:
            x: [N, ...].

        Returns:
            [N_r, ...].

        Raises:
            ValueError: another number of rows.
        """
        checks.require(len(x) == len(self), "x", f"{len(self)} rows", len(x))
        return scatter_sum(x, self.exchange)


def _holders(rows: QueryRows, shard: Shard) -> Tensor:
    """int64 [N]: the rank that holds each row's token; of padding, the first token."""
    if shard.length == 0:
        return torch.zeros_like(rows.position, dtype=torch.int64)
    return shard.owner[rows.position.clamp(min=0, max=shard.length - 1).long()]


def _check(rows: QueryRows, owner: Tensor, shard: Shard) -> None:
    if len(rows) == 0:
        return
    checks.require(shard.length > 0, "rows", "none for sequences of no tokens", len(rows))
    last = int(torch.maximum(rows.position + 1, rows.stop).max())
    wanted = f"positions < {shard.length} and stops <= {shard.length}, the tokens of a sequence"
    checks.require(last <= shard.length, "rows", wanted, f"a token or a stop at {last}")
    low, high = int(owner.min()), int(owner.max())
    there = low >= 0 and high < shard.ranks
    checks.require(there, "owner", f"ranks in [0, {shard.ranks})", f"[{low}, {high}]")
