"""Side attention and attention maps over keys that lie on several ranks.

The normaliser of a map is merged over the ranks (P1); a column of a map is on one rank, and so
(P3)  KL_n = sum_r P_rn (KL_rn + W_n log P_rn)     P_rn: the share of the target that rank r has
                                                   KL_r of that share alone, renormalised
                                                   W_n: of heads="each" sum_h w_nh, else 1
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from groundkern import SideAttention
from groundkern import attention_contribution as contribution_of
from groundkern import attention_kl as kl_of
from groundkern import attention_map as map_of
from groundkern import side_attention as side_attention_of
from groundkern.kept import kept
from groundkern.normaliser import Over, log_sum_exp
from groundkern.parallel.agreement import agree, call_words
from groundkern.parallel.collectives import summed, uncompiled
from groundkern.parallel.merging import merged_attention, merged_lse
from groundkern.parallel.rows import ShardedRows
from groundkern.precision import autocast
from groundkern.selection import KeySets, Selection


@uncompiled
def side_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: ShardedRows,
    *,
    allowed: KeySets | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> SideAttention:
    """`groundkern.side_attention` over the keys of all ranks.

    Args:
        q: [N_r, Hq, D], the queries of this rank's rows.
        k: [B, Hkv, S_r, D], this rank's keys.
        v: [B, Hkv, S_r, Dv], its values.
        rows: all N rows.
        allowed: for all N rows, sets over this rank's keys (`shard.take` of sets over all keys).
        scale, softcap, backend: as in `groundkern.side_attention`.

    Returns:
        SideAttention(out [N_r, Hq, Dv], lse [N_r, Hq]) of this rank's rows.

    Raises:
        ValueError, TypeError: as `groundkern.side_attention`.

    Source: SMAM (CVPR 2026), equation (S1).
    """
    q, k, v = autocast(q, k, v)
    _agree(rows, "side_attention", (q, k, v), scale, softcap)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "backend": backend}
    out, lse = side_attention_of(rows.gather(q), k, v, rows.keys, allowed=allowed, **options)
    return SideAttention(*merged_attention(out, lse, rows.exchange))


@uncompiled
def attention_map(
    q: Tensor,
    k: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_map` of all rows, on the columns of this rank.

    Args:
        q: [N_r, Hq, D], the queries of this rank's rows.
        k: [B, Hkv, S_r, D], this rank's keys.
        rows: all N rows.
        columns: int32 [B, C_r], columns of this rank among its keys (`shard.columns`).
        over, scale, softcap, backend: as in `groundkern.attention_map`.
        allowed: for all N rows, sets over this rank's keys.
        head_weight: [Hq] or [N, Hq], the same on every rank.

    Returns:
        [N, C_r] fp32. A column is on one rank, and stays there.

    Raises:
        ValueError, TypeError: as `groundkern.attention_map`.

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K2).
    """
    q, k = autocast(q, k)
    _agree(rows, "attention_map", (q, k, head_weight), scale, softcap, over)
    q, options = rows.gather(q), {"scale": scale, "softcap": softcap, "backend": backend}
    given = _normalised(q, k, rows, columns, over, allowed, options)
    return map_of(q, k, rows.keys, columns, head_weight=head_weight, **given)


@uncompiled
def attention_contribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    rectify: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_contribution` of all rows, on the columns of this rank.

    Args:
        v: [B, Hkv, S_r, Dv], this rank's values.
        g: [N_r, Hq, Dv], the directions of this rank's rows.
        rectify: f = relu; otherwise the identity.
        q, k, rows, columns, over, allowed, scale, softcap, backend: as in `attention_map`.

    Returns:
        [N, C_r] fp32.

    Raises:
        ValueError, TypeError: as `groundkern.attention_contribution`.

    Source: equation (C1).
    """
    q, k, v, g = autocast(q, k, v, g)
    _agree(rows, "attention_contribution", (q, k, v, g), scale, softcap, over, rectify)
    q, g = rows.gather(q), rows.gather(g)
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    given = _normalised(q, k, rows, columns, over, allowed, options)
    return contribution_of(q, k, v, g, rows.keys, columns, rectify=rectify, **given)


@uncompiled
def attention_kl(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    *,
    over: Over,
    heads: Literal["mean", "each"] = "mean",
    allowed: KeySets | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_kl` of this rank's rows, over the columns of all ranks.

    Args:
        target: [N, C_r] >= 0, of all rows on this rank's columns; no gradient.
        heads: as in `groundkern.attention_kl`.
        q, k, rows, columns, over, allowed, head_weight, scale, softcap, backend: as in
            `attention_map`.

    Returns:
        [N_r] fp32.

    Raises:
        ValueError, TypeError: as `groundkern.attention_kl`.

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K3).
    """
    q, k = autocast(q, k)
    _agree(rows, "attention_kl", (q, k, head_weight), scale, softcap, over, heads)
    q, options = rows.gather(q), {"scale": scale, "softcap": softcap, "backend": backend}
    given = _normalised(q, k, rows, columns, over, allowed, options)
    kl = kl_of(q, k, target, rows.keys, columns, heads=heads, head_weight=head_weight, **given)
    lse = given["lse"]
    share = _share(target, rows, columns, allowed, lse.dtype)  # [N]
    weight: Tensor | float = 1.0  # W of (P3)
    if heads == "each" and head_weight is not None:
        weight = head_weight.to(lse.dtype).expand(lse.shape).masked_fill(lse.isinf(), 0.0).sum(1)
    log_share = torch.where(share > 0, share, 1.0).log()
    return rows.scatter_sum(share * (kl + weight * log_share))


def _agree(
    rows: ShardedRows,
    function: str,
    inputs: tuple[Tensor, Unpack[tuple[Tensor | None, ...]]],
    *options: float | str | bool | None,
) -> None:
    sizes = inputs[0].shape[1], *(x.shape[-1] for x in inputs if x is not None)
    words = call_words(function, inputs, *sizes, *options)
    agree(rows.together, words, rows.shard.group, rows.owner.device)


def _normalised(
    q: Tensor,
    k: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    over: Over,
    allowed: KeySets | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of an op of one process on this rank's keys: normalised by `lse` [N, Hq], over
    the keys of all ranks that `over` names."""
    lse = merged_lse(log_sum_exp(q, k, rows.keys, columns, over, allowed, options), rows.exchange)
    return {**options, "over": "visible", "allowed": allowed, "lse": lse}


def _share(
    target: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    allowed: KeySets | None,
    dtype: torch.dtype,
) -> Tensor:
    """[N]: how much of each row's target is on this rank's own columns; 0 without any."""

    def make() -> Tensor:
        own = Selection.of(rows.keys, allowed, columns).own_columns()
        mass = torch.where(own, target.detach().to(dtype), 0.0).sum(1)
        total = summed(mass, rows.shard)
        return mass / torch.where(total > 0, total, 1.0)

    return kept(rows.together, (columns, allowed, target), ("share of the target", dtype), make)
