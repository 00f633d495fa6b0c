"""Calls of the attention ops that are to run together.

>>> side = asked.side_attention(q, k, v, rows, allowed=sets)
>>> kl = asked.attention_kl(other_q, k, target, other_rows, columns, over="columns")
>>> (out, lse), (loss,) = asked.run([side, kl])

What they compute is what the public functions of these names compute, and their arguments are
those. Calls with the same keys are one node of the graph, which hands autograd one gradient of k,
and one of v.
"""

from typing import Any, Literal

from torch import Tensor

from groundkern.ops.attention_map import api as maps
from groundkern.ops.side_attention import api as side
from groundkern.selection import KeySets, QueryRows
from groundkern.together import Asked, Repeated, run

__all__ = ["Asked", "Repeated", "attention_kl", "attention_map", "run", "side_attention"]


def side_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: QueryRows,
    *,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> Asked:
    """A call of `groundkern.side_attention`, checked."""
    return side.asked(q, k, v, rows, allowed, lse, side.Wanted(**options))


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: QueryRows,
    columns: Tensor,
    *,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    head_weight: Tensor | None = None,
    **options: Any,
) -> Asked:
    """A call of `groundkern.attention_map`, checked."""
    return maps.asked_map(q, k, rows, columns, allowed, lse, head_weight, maps.Wanted(**options))


def attention_kl(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: QueryRows,
    columns: Tensor,
    *,
    heads: Literal["mean", "each"] = "mean",
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    head_weight: Tensor | None = None,
    **options: Any,
) -> Asked:
    """A call of `groundkern.attention_kl`, checked."""
    of_rows, wanted = (allowed, lse, head_weight), maps.Wanted(**options)
    return maps.asked_kl(q, k, target, rows, columns, heads, *of_rows, wanted)
