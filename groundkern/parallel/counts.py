"""What sums over rows of several ranks are divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.parallel.collectives import summed
from groundkern.parallel.shards import Shard


def row_count(target: Tensor, shard: Shard, *, ignore_index: int = -100) -> Tensor:
    """The number of rows that count on all ranks, for the mean of a cross entropy.

    Rows need no keys, so `linear_cross_entropy` takes those of a rank where they are; its mean over
    all ranks is `linear_cross_entropy(..., reduction="sum").loss / row_count(target, shard)`,
    summed over ranks.

    Args:
        target: integers of any shape, of this rank's rows.
        shard: of the group.
        ignore_index: the target that marks an ignored row.

    Returns:
        fp32 scalar, at least 1.
    """
    counted = (target != ignore_index).sum().to(torch.float32)
    return summed(counted, shard).clamp(min=1)
