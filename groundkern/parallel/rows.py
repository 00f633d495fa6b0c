"""Query rows whose queries lie on several ranks, and their way to all ranks and back."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern import checks
from groundkern.parallel.collectives import Exchange, gather, scatter_sum
from groundkern.parallel.shards import Shard
from groundkern.selection import QueryRows


class ShardedRows:
    """N query rows of whole sequences, each owned by one rank; all ranks know all of them.

    Args:
        rows: N rows in whole sequences; the same on every rank.
        shard: this rank's part of the sequences.
        owner: int64 [N], the rank that has the query of each row and gets its results; None: the
            rank that holds its token (rank 0 for padding).

    Raises:
        ValueError: another number of owners.
    """

    def __init__(self, rows: QueryRows, shard: Shard, owner: Tensor | None = None) -> None:
        self.rows, self.shard = rows, shard
        if owner is None:
            real = rows.position >= 0
            owner = torch.where(real, shard.owner[rows.position.clamp(min=0).long()], 0)
        checks.tensor("owner", owner, "N", {"N": len(rows)}, dtype=torch.int64)
        self.owner = owner
        self.own = (owner == shard.rank).nonzero()[:, 0]  # int64 [N_r], this rank's
        self.exchange = Exchange.of(owner, shard)
        start, stop = shard.before(rows.start), shard.before(rows.stop)
        self.keys = QueryRows(rows.sequence, rows.position, start, stop, rows.most)
        """All N rows, with the keys of this rank that each sees."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, x: Tensor) -> Tensor:
        """Gather this rank's rows of a tensor of its tokens, differentiably.

        Args:
            x: [B, H, S_r, D] or [B, S_r, D].

        Returns:
            [N_r, H, D] or [N_r, D].
        """
        sequence = self.rows.sequence[self.own].long()
        place = self.shard.before(self.rows.position[self.own].clamp(min=0)).long()
        if place.numel() and x.shape[-2] == 0:
            checks.fail("x", "the tokens of this rank's rows", "none")
        return x[sequence, :, place] if x.dim() == 4 else x[sequence, place]

    def gather(self, x: Tensor) -> Tensor:
        """What ranks have of their rows, on all ranks.

        Args:
            x: [N_r, ...].

        Returns:
            [N, ...]; its gradients are summed over the ranks.
        """
        return gather(x, self.exchange)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks of what each has of all rows, on the rows' owners.

        Args:
            x: [N, ...].

        Returns:
            [N_r, ...].
        """
        return scatter_sum(x, self.exchange)
