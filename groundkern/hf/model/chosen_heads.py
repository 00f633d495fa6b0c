"""Some heads of an attention layer: their queries, and the KV heads that these read.

Only what is chosen is computed. A range of heads is a view; scattered ones are copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of a tensor, differentiably and with the same bits on every run.

    Args:
        x: [N, H, ...].
        heads: which of the H; one may come several times.

    Returns:
        [N, len(heads), ...]: x itself if these are all, a view if they are a range.
    """
    first, count = heads[0], len(heads)
    if list(heads) == list(range(first, first + count)):
        return x if count == x.shape[1] else x.narrow(1, first, count)
    parts = x.split(1, 1)  # its gradient is written once, whole; an index would be sent to the GPU
    return torch.cat([parts[head] for head in heads], 1)


def key_heads(heads: Sequence[int], group: int) -> list[int]:
    """The KV heads of some heads, such that each has equally many of them.

    Args:
        heads: ascending.
        group: how many heads read each KV head.

    Returns:
        KV heads, as often as they are needed: the i-th of n is read by the i-th n-th of `heads`.
        With 3 heads of KV head 0 and 2 of KV head 1 it is [0, 0, 0, 1, 1], with 4 and 2 [0, 0, 1].
    """
    counts = Counter(head // group for head in heads)
    each = gcd(*counts.values())
    return [key for key, count in counts.items() for _ in range(count // each)]
