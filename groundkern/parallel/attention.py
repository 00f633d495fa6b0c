"""Side attention and attention maps over keys that lie on several ranks.

lse_n = log sum_r exp(lse_rn)                      lse_r of the keys of rank r alone
out_n = sum_r exp(lse_rn - lse_n) out_rn
KL_n  = sum_r w_rn (KL_rn + log w_rn)              w_r: the share of the target on rank r
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from groundkern import attention_contribution as contribution_of
from groundkern import attention_kl as kl_of
from groundkern import attention_map as map_of
from groundkern import checks
from groundkern import side_attention as side_attention_of
from groundkern.kept import kept
from groundkern.ops.side_attention.api import SideAttention
from groundkern.parallel.collectives import all_sum, gather_ranks
from groundkern.parallel.rows import ShardedRows
from groundkern.selection import KeySets, unpack_bits

Over = Literal["visible", "columns"]
LEAST_DIM = 16  # of values that kernels take


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
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    out, lse = side_attention_of(rows.gather(q), k, v, rows.keys, allowed=allowed, **options)
    lse, weight = _merged(lse, rows)
    summed = rows.scatter_sum(weight[..., None] * out.to(lse.dtype))
    return SideAttention(summed.to(out.dtype), lse[rows.own])


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
    q, options = rows.gather(q), {"scale": scale, "softcap": softcap, "backend": backend}
    lse = _normaliser(q, k, rows, columns, over, allowed, options)
    given = {**options, "over": "visible", "allowed": allowed, "lse": lse}
    return map_of(q, k, rows.keys, columns, head_weight=head_weight, **given)


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
    q, g = rows.gather(q), rows.gather(g)
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    lse = _normaliser(q, k, rows, columns, over, allowed, options)
    given = {**options, "over": "visible", "allowed": allowed, "lse": lse, "rectify": rectify}
    return contribution_of(q, k, v, g, rows.keys, columns, **given)


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
    q, options = rows.gather(q), {"scale": scale, "softcap": softcap, "backend": backend}
    lse = _normaliser(q, k, rows, columns, over, allowed, options)
    given = {**options, "over": "visible", "allowed": allowed, "lse": lse, "heads": heads}
    kl = kl_of(q, k, target, rows.keys, columns, head_weight=head_weight, **given)  # [N]
    share = _share(target, rows, columns, allowed)  # [N]
    factor: Tensor | float = 1.0
    if heads == "each" and head_weight is not None:
        factor = head_weight.expand(lse.shape).masked_fill(lse.isinf(), 0.0).sum(1)
    log_share = torch.where(share > 0, share, 1.0).log()
    return rows.scatter_sum(share * (kl + factor * log_share))


def _merged(lse: Tensor, rows: ShardedRows) -> tuple[Tensor, Tensor]:
    """lse [N, Hq] of all ranks' keys, and this rank's share of the mass, which is 0 in a row
    without keys; both differentiable."""
    all_lse = gather_ranks(lse, rows.shard)  # [ranks, N, Hq]
    top = all_lse.detach().amax(0)
    empty = top == -torch.inf
    top = torch.where(empty, 0.0, top)
    total = (all_lse - top).exp().sum(0)
    merged = torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())
    return merged, (lse - torch.where(empty, 0.0, merged)).exp()


def _normaliser(
    q: Tensor,
    k: Tensor,
    rows: ShardedRows,
    columns: Tensor,
    over: Over,
    allowed: KeySets | None,
    options: dict,
) -> Tensor:
    """[N, Hq]: the log-sum-exp over all ranks of the keys that `over` names."""
    checks.require(over in ("visible", "columns"), "over", "'visible' or 'columns'", repr(over))
    sets = None
    if over == "columns":
        others = columns, allowed

        def make() -> KeySets:
            return _column_sets(rows, columns, allowed, k.shape[2])

        sets = kept(rows.keys, others, ("sets of columns", k.shape[2]), make)
    v = k.detach()[..., : max(1, min(LEAST_DIM, k.shape[3]))]  # whose output nobody reads
    lse = side_attention_of(q, k, v, rows.keys, allowed=sets, **options).lse
    return _merged(lse, rows)[0]


def _column_sets(rows: ShardedRows, columns: Tensor, allowed: KeySets | None, keys: int) -> KeySets:
    """The own columns of each row as a key set."""
    there = torch.zeros(len(columns), keys + 1, dtype=torch.bool, device=columns.device)
    there.scatter_(1, torch.where(columns >= 0, columns, keys).long(), True)
    there = there[:, :keys]  # [B, S_r]
    if allowed is None:
        return KeySets.from_bool(there, rows.keys.sequence)
    index = torch.arange(len(rows), dtype=torch.int32, device=columns.device)
    return KeySets.from_bool(there[rows.keys.sequence.long()] & _member(allowed), index)


def _member(allowed: KeySets) -> Tensor:
    """bool [N, S_r]: the keys that the sets allow each row."""
    if len(allowed.bits) == 0:
        shape = len(allowed.index), allowed.keys
        return torch.ones(shape, dtype=torch.bool, device=allowed.index.device)
    member = unpack_bits(allowed.bits[allowed.index.clamp(min=0).long()], allowed.keys)
    return member | (allowed.index < 0)[:, None]


def _share(target: Tensor, rows: ShardedRows, columns: Tensor, allowed: KeySets | None) -> Tensor:
    """[N]: how much of each row's target is on this rank's own columns; 0 without any."""

    def make() -> Tensor:
        keys = rows.keys
        at = columns[keys.sequence.long()]  # [N, C_r]
        own = (at >= 0) & (at >= keys.start[:, None]) & (at < keys.stop[:, None])
        if allowed is not None and at.numel():
            own &= _member(allowed).gather(1, at.clamp(min=0).long())
        wide = target.dtype if target.dtype == torch.float64 else torch.float32
        mass = torch.where(own, target.detach().to(wide), 0.0).sum(1)
        total = all_sum(mass, rows.shard)
        return mass / torch.where(total > 0, total, 1.0)

    return kept(rows.keys, (columns, allowed, target), "share of the target", make)
