"""How many bytes a call sends: as many as its rows need, however long the sequences are."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from groundkern import checks
from groundkern.parallel.rows import ShardedRows
from groundkern.precision import accumulation_dtype

Function = Literal["side_attention", "attention_map", "attention_contribution", "attention_kl"]


class Traffic(NamedTuple):
    """Bytes that a rank sends to others: in a call's forward, in its backward, and once a step, for
    all layers of the same rows and target."""

    forward: int
    backward: int
    once: int


def traffic(
    rows: ShardedRows,
    function: Function,
    *,
    heads: int,
    dim: int,
    value_dim: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """What this rank sends in a call of one of the functions whose inputs all require grad.

    A sum over all ranks counts as a ring does it: 2 (R - 1) / R of the tensor. What ranks compare
    once a step is left out (to each other rank, 48 bytes of the rows and 8 of each kind of call).

    Args:
        rows: of the call.
        function: its name.
        heads: Hq.
        dim: D.
        value_dim: Dv, of side attention and contributions.
        dtype: of q.

    Returns:
        Traffic of this rank. Summed over the ranks, the rows' queries take (R - 1) N Hq D elements
        in the forward, and their gradients as many in the backward.

    Raises:
        ValueError: another function.
    """
    ranks, all_rows, own = rows.shard.ranks, len(rows), len(rows.own)
    size, wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
    away, others = (ranks - 1) * own, all_rows - own  # rows sent to all, rows of other ranks
    query, value = heads * dim * size, heads * value_dim * size
    statistics = (ranks - 1) * all_rows * heads * wide
    their_gradient = _ring(all_rows * heads * wide, ranks)
    names = get_args(Function)
    checks.require(function in names, "function", " | ".join(names), repr(function))
    match function:
        case "side_attention":
            forward = away * query + others * (value + heads * wide)
            return Traffic(forward, away * (value + 2 * heads * wide) + others * query, 0)
        case "attention_map":
            return Traffic(away * query + statistics, their_gradient + others * query, 0)
        case "attention_contribution":
            sent = query + value
            return Traffic(away * sent + statistics, their_gradient + others * sent, 0)
    forward = away * query + statistics + others * wide  # a KL
    backward = away * wide + their_gradient + others * query
    return Traffic(forward, backward, _ring(all_rows * wide, ranks))


def _ring(size: int, ranks: int) -> int:
    """Bytes that a rank sends for a sum over all ranks."""
    return 2 * (ranks - 1) * size // ranks
