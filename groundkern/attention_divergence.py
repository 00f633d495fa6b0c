"""Divergence of attention maps from a reference (K5), row by row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundkern import checks
from groundkern.losses import map_divergence
from groundkern.ops.attention_map.api import attention_map
from groundkern.selection import KeySets, QueryRows, Selection

Kind = Literal["kl", "reverse_kl", "js"]
Over = Literal["visible", "columns", "renormalised"]


class AttentionReference(NamedTuple):
    """Another model's queries and keys at the same rows and columns; no gradient reaches them.

    Args:
        q: [N, Hq', D'].
        k: [B, Hkv', S, D'].
        head_weight, lse, scale, softcap: as in `attention_map`, of that model.
    """

    q: Tensor
    k: Tensor
    head_weight: Tensor | None = None
    lse: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None


def attention_divergence(
    q: Tensor,
    k: Tensor,
    reference: Tensor | AttentionReference,
    rows: QueryRows,
    columns: Tensor,
    *,
    kind: Kind = "js",
    over: Over = "renormalised",
    beta: float = 0.5,
    floor: float | None = None,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence of each row's attention map from a reference map, with no map kept.

    Equals `losses.map_divergence(P, attention_map(...), kind=kind)`.

    Args:
        q, k, rows, columns, allowed, lse, head_weight, scale, softcap, backend: as in
            `attention_map`.
        reference: [N, C] >= 0 of any scale, or another model's queries and keys.
        kind: "kl" (P || Q), "reverse_kl" (Q || P) or "js".
        over: "visible", "columns" or "renormalised".
        beta: of "js".
        floor: of "reverse_kl".

    Returns:
        [N] fp32, in nats.

    Raises:
        ValueError: as `attention_map`.

    Source: (K5) of docs/methods.md.
    """
    names = ("visible", "columns", "renormalised")
    checks.require(over in names, "over", " | ".join(names), repr(over))
    normalised = "columns" if over == "columns" else "visible"
    same = {"over": normalised, "allowed": allowed, "backend": backend}
    if isinstance(reference, AttentionReference):
        with torch.no_grad():
            target = attention_map(
                reference.q,
                reference.k,
                rows,
                columns,
                lse=reference.lse,
                head_weight=reference.head_weight,
                scale=reference.scale,
                softcap=reference.softcap,
                **same,
            )
    else:
        target = reference.detach()
    own = Selection.of(rows, allowed, columns).own_columns()
    given = {"lse": lse, "head_weight": head_weight, "scale": scale, "softcap": softcap}
    attention = attention_map(q, k, rows, columns, **given, **same)
    least = torch.finfo(torch.float32).tiny
    low = least if isinstance(reference, AttentionReference) else 1e-6
    return map_divergence(
        target.to(attention.dtype).masked_fill(~own, 0.0),
        attention,
        kind=kind,
        valid=own,
        renormalise=over == "renormalised",
        floor=low if floor is None else floor,
        beta=beta,
    )
