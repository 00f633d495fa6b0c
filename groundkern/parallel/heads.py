"""Attention maps where a rank has all keys, of its share of the heads: inside Ulysses attention, or
under tensor parallelism.

A mean over heads becomes a sum over ranks. Side attention needs nothing: its heads are apart.

(P4)  KL_n = sum_r P_rn (KL_rn + log P_rn)     KL_rn, P_rn: as in (P3), of the target P_nc d_rnc
      d_rnc = M_rnc / sum_r M_rnc              the share of the map that heads of rank r make

d is found from log M, so nothing underflows, and is a constant of the backward: by
log sum_r M_r = max over d of sum_r d_r (log M_r - log d_r) it has no gradient where it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from groundkern import attention_contribution as contribution_of
from groundkern import attention_kl as kl_of
from groundkern import attention_map as map_of
from groundkern import checks
from groundkern.kept import kept
from groundkern.normaliser import Over, log_sum_exp
from groundkern.parallel.agreement import agree, call_words, number, require_same
from groundkern.parallel.collectives import all_sum, greatest, summed, uncompiled
from groundkern.precision import accumulation_dtype, autocast
from groundkern.row_blocks import row_blocks, scores
from groundkern.selection import KeySets, QueryRows, Selection


class HeadRows:
    """N query rows whose heads are split over ranks; every rank has all rows.

    Made by all ranks of the group together, once a step. Its attribute `heads` is the number of
    query heads of all ranks.

    Args:
        rows: the same on every rank.
        heads: the query heads of this rank, at least one; ranks may have unequally many.
        group: the ranks; None: all processes.

    Raises:
        ValueError: other rows on other ranks (all ranks raise it), or no head.
    """

    rows: QueryRows
    group: dist.ProcessGroup | None
    heads: int
    together: QueryRows

    def __init__(self, rows: QueryRows, heads: int, group: dist.ProcessGroup | None = None) -> None:
        checks.require(heads > 0, "heads", "at least one query head on every rank", heads)
        self.rows, self.group = rows, group
        found, device = [number(x) for x in rows.tensors()], rows.sequence.device
        require_same("rows", "the same rows on every rank of the group", found, group, device)
        self.heads = int(summed(torch.tensor(heads, device=device), self))
        self.together = replace(rows)

    def __len__(self) -> int:
        return len(self.rows)


@uncompiled
def attention_map(
    q: Tensor,
    k: Tensor,
    rows: HeadRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_map` of the heads of all ranks.

    Args:
        q: [N, Hq_r, D], the queries of this rank's heads.
        k: [B, Hkv_r, S, D], their keys.
        rows: all rows.
        columns: int32 [B, C].
        head_weight: [Hq_r] or [N, Hq_r], of this rank's heads; None: 1 / Hq each.
        over, allowed, scale, softcap, backend: as in `groundkern.attention_map`.

    Returns:
        [N, C] fp32, the same on every rank. What ranks make of it is summed, as every loss: let
        each count its own rows, or a share of all.

    Raises:
        ValueError, TypeError: as `groundkern.attention_map`.

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K2).
    """
    q, k = autocast(q, k)
    _agree(rows, "attention_map", (q, k, head_weight), columns, over, scale, softcap)
    given: dict[str, Any] = {
        "allowed": allowed,
        "scale": scale,
        "softcap": softcap,
        "backend": backend,
    }
    weight = _weight(head_weight, q, rows)
    return all_sum(map_of(q, k, rows.rows, columns, over=over, head_weight=weight, **given), rows)


@uncompiled
def attention_contribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    rows: HeadRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    rectify: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_contribution` of the heads of all ranks.

    Args:
        v: [B, Hkv_r, S, Dv], the values of this rank's heads.
        g: [N, Hq_r, Dv], the directions of its query heads.
        rectify: f = relu; otherwise the identity.
        q, k, rows, columns, over, allowed, scale, softcap, backend: as in `attention_map`.

    Returns:
        [N, C] fp32, the same on every rank.

    Raises:
        ValueError, TypeError: as `groundkern.attention_contribution`.

    Source: equation (C1).
    """
    q, k, v, g = autocast(q, k, v, g)
    asked = columns, over, scale, softcap, rectify
    _agree(rows, "attention_contribution", (q, k, v, g), *asked)
    given: dict[str, Any] = {
        "allowed": allowed,
        "scale": scale,
        "softcap": softcap,
        "backend": backend,
    }
    own = contribution_of(q, k, v, g, rows.rows, columns, over=over, rectify=rectify, **given)
    return all_sum(own, rows)


@uncompiled
def attention_kl(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: HeadRows,
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
    """`groundkern.attention_kl` of the heads of all ranks.

    Args:
        target: [N, C] >= 0, the same on every rank; no gradient.
        heads: as in `groundkern.attention_kl`; "mean" computes the scores of the columns once more.
        q, k, rows, columns, over, allowed, head_weight, scale, softcap, backend: as in
            `attention_map`.

    Returns:
        [N] fp32, the same on every rank.

    Raises:
        ValueError, TypeError: as `groundkern.attention_kl`.

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K3).
    """
    q, k = autocast(q, k)
    _agree(rows, "attention_kl", (q, k, head_weight), columns, over, scale, softcap, heads)
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    weight = _weight(head_weight, q, rows)
    given: dict[str, Any] = {
        **options,
        "over": over,
        "heads": heads,
        "allowed": allowed,
        "head_weight": weight,
    }
    if heads == "each":
        return all_sum(kl_of(q, k, target, rows.rows, columns, **given), rows)
    with torch.no_grad():
        lse = log_sum_exp(q, k, rows.rows, columns, over, allowed, options)
        own = Selection.of(rows.rows, allowed, columns).own_columns()
        part = _log_map(q, k, rows.rows, columns, lse, weight, scale, softcap)
        part = part.masked_fill(~own, -torch.inf)  # [N, C], log M of this rank's heads
        wanted = torch.where(own, target.to(part.dtype), 0.0)
        total = wanted.sum(1, keepdim=True)
        wanted = wanted * _share(part, rows) / torch.where(total > 0, total, 1.0)
        share = wanted.sum(1)  # NaN stays NaN here, and a target may be none
        wanted = wanted.nan_to_num()
    kl = kl_of(q, k, wanted, rows.rows, columns, **given)
    return all_sum(share * (kl + torch.where(share > 0, share, 1.0).log()), rows)


def _agree(
    rows: HeadRows,
    function: str,
    inputs: tuple[Tensor, Unpack[tuple[Tensor | None, ...]]],
    columns: Tensor,
    *options: float | str | bool | None,
) -> None:
    sizes = inputs[0].shape[-1], tuple(columns.shape)
    words = call_words(f"{function} of heads", inputs, *sizes, *options)
    agree(rows.together, words, rows.group, rows.rows.sequence.device)


def _weight(head_weight: Tensor | None, q: Tensor, rows: HeadRows) -> Tensor:
    if head_weight is not None:
        return head_weight
    return q.new_full(q.shape[1:2], 1 / rows.heads, dtype=accumulation_dtype(q.dtype))


def _share(part: Tensor, rows: HeadRows) -> Tensor:
    """d of (P4), [N, C]: the share of this rank's heads in the map; of a map of 0 equal shares."""
    top = greatest(part, rows)
    none = top == -torch.inf
    relative = torch.where(none, 1.0, (part - torch.where(none, 0.0, top)).exp())
    return relative / summed(relative, rows)


def _log_map(
    q: Tensor,
    k: Tensor,
    rows: QueryRows,
    columns: Tensor,
    lse: Tensor,
    weight: Tensor,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """[N, C]: log sum_h w_h p_hc of this rank's heads, meaningful on own columns; in blocks."""
    weight = weight.to(lse.dtype).expand(lse.shape)
    log_weight = torch.where(lse.isinf(), -torch.inf, weight.log() - lse)  # [N, Hq]
    out = lse.new_full((len(rows), columns.shape[1]), -torch.inf)
    per_row = q.shape[1] * columns.shape[1]

    def make() -> list[tuple[int, slice]]:
        return list(row_blocks(rows.sequence, k.shape[0], per_row))

    if k.shape[2] == 0:
        return out
    for b, block in kept(rows, (), ("blocks of rows", k.shape[0], per_row), make):
        at = columns[b].clamp(min=0).long()
        keys = k[b][:, at].to(lse.dtype)  # [Hkv, C, D]
        s = scores(q[block].to(lse.dtype), keys, scale or q.shape[-1] ** -0.5, softcap or 0.0)
        out[block] = (s + log_weight[block][..., None]).logsumexp(1)
    return out
