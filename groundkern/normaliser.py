"""The log-sum-exp of the keys that a map is normalised over, and how much of it is on columns."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from groundkern import checks
from groundkern.kept import kept
from groundkern.ops.side_attention.api import side_attention
from groundkern.selection import KeySets, QueryRows, pack_bits

Over = Literal["visible", "columns"]
LEAST_DIM = 16  # of values: a matrix product on a GPU takes no fewer columns


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    rows: QueryRows,
    columns: Tensor,
    over: Over,
    allowed: KeySets | None,
    options: dict[str, Any],
) -> Tensor:
    """[N, Hq]: over the visible keys, or over the row's own columns; differentiable.

    Args:
        q, k, rows, columns, over, allowed: as in `groundkern.attention_map`.
        options: scale, softcap and backend.
    """
    checks.require(over in ("visible", "columns"), "over", "'visible' or 'columns'", repr(over))
    sets = None
    if over == "columns":
        keys, others = k.shape[2], (columns, allowed)
        name = "sets of columns", keys
        sets = kept(rows, others, name, lambda: _column_sets(rows, columns, allowed, keys))
    # Nobody reads the output, so its values are as narrow as they may be.
    v = k.detach()[..., : max(1, min(LEAST_DIM, k.shape[3]))]
    return side_attention(q, k, v, rows, allowed=sets, **options).lse


def log_mass(own: Tensor, norm: Tensor, head_weight: Tensor | None) -> Tensor:
    """[N]: the log of the head-weighted map's mass on a row's own columns; -inf if it has none.

    In log space and differentiable, in weights of 0 too.

    Args:
        own: [N, Hq], the log-sum-exp over the row's own columns.
        norm: [N, Hq], that of what the map is normalised over; heads of infinite ones are left out.
        head_weight: [Hq] or [N, Hq], >= 0; None: 1 / Hq each.
    """
    if head_weight is None:
        head_weight = norm.new_full((), 1.0 / max(1, norm.shape[1]))
    weight = head_weight.to(norm.dtype).expand(norm.shape)
    counted = ~(norm.isinf() | own.isinf())
    log_share = torch.where(counted, own, 0.0) - torch.where(counted, norm, 0.0)  # [N, Hq]
    weighed = (counted & (weight > 0)).detach()
    top = log_share.detach().masked_fill(~weighed, -torch.inf).amax(1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    # A head of weight 0 may lie far above the others.
    relative = (log_share - top).clamp(max=80.0).exp().masked_fill(~counted, 0.0)
    mass, some = (weight * relative).sum(1), weighed.any(1)
    return torch.where(some, top[:, 0] + torch.where(some, mass, 1.0).log(), -torch.inf)


def _column_sets(rows: QueryRows, columns: Tensor, allowed: KeySets | None, keys: int) -> KeySets:
    """The columns as key sets: one for each sequence, or one for each row if these have sets."""
    there = torch.zeros(len(columns), keys + 1, dtype=torch.bool, device=columns.device)
    there.scatter_(1, torch.where(columns >= 0, columns, keys).long(), True)
    bits = pack_bits(there[:, :keys])  # [B, W]
    if allowed is None or len(allowed.bits) == 0:
        return KeySets(bits, rows.sequence, keys)
    of_rows = allowed.bits[allowed.index.clamp(min=0).long()]  # [N, W]
    of_rows = torch.where((allowed.index < 0)[:, None], -1, of_rows)
    index = torch.arange(len(rows), dtype=torch.int32, device=columns.device)
    return KeySets(bits[rows.sequence.long()] & of_rows, index, keys)
