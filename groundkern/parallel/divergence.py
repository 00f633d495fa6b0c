"""The divergence of attention maps over keys that lie on several ranks.

The maps are divided by their sums in the normaliser, which is merged over the ranks (P1), so what
remains of (K5) is a sum over columns, and a column is on one rank.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from groundkern import attention_map, checks
from groundkern.divergence.api import AttentionReference, Kind, Over, check_options, check_target
from groundkern.divergence.blocks import How, Inputs, Target, divergence
from groundkern.divergence.terms import Terms
from groundkern.kept import kept
from groundkern.normaliser import log_mass, log_sum_exp
from groundkern.parallel.agreement import agree, call_words
from groundkern.parallel.collectives import summed, uncompiled
from groundkern.parallel.merging import merged_lse
from groundkern.parallel.rows import ShardedRows
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import KeySets, Selection


@uncompiled
def attention_divergence(
    q: Tensor,
    k: Tensor,
    reference: Tensor | AttentionReference,
    rows: ShardedRows,
    columns: Tensor,
    *,
    kind: Kind = "js",
    over: Over = "renormalised",
    beta: float = 0.5,
    floor: float | None = None,
    allowed: KeySets | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`groundkern.attention_divergence` of this rank's rows, over the columns of all ranks.

    Args:
        q: [N_r, Hq, D], the queries of this rank's rows.
        k: [B, Hkv, S_r, D], this rank's keys.
        reference: [N, C_r] >= 0, of all rows on this rank's columns; or another model's queries of
            this rank's rows and its keys of this rank's tokens, without an lse.
        rows: all N rows.
        columns: int32 [B, C_r], columns of this rank among its keys (`shard.columns`).
        allowed: for all N rows, sets over this rank's keys.
        head_weight: [Hq] or [N, Hq], the same on every rank.
        kind, over, beta, floor, scale, softcap, backend: as in `groundkern.attention_divergence`.

    Returns:
        [N_r] fp32.

    Raises:
        ValueError, TypeError: as `groundkern.attention_divergence`.

    Source: KLAL (arXiv 2511.12738) and RAL (arXiv 2602.04884), equation (K5).
    """
    least = check_options(kind, over, beta, floor, reference, q.dtype)
    q, k = autocast(q, k)
    _agree(rows, reference, (q, k, head_weight), (kind, over, beta, floor, scale, softcap))
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    given = Inputs(rows.gather(q), k, head_weight, None)
    lse, mass = _normaliser(given, rows, columns, over, allowed, options)
    given = given._replace(lse=lse if mass is None else lse + _finite(mass))
    terms = Terms(kind, beta, rest=float(rows.shard.rank == 0))
    how = How(rows.keys, columns, allowed, "visible", terms, least, options, {})
    if isinstance(reference, AttentionReference):
        with torch.no_grad():
            target, how = _of_model(reference, rows, over, how, floor)
    else:
        check_target(reference, len(rows), columns.shape[1], q.device)
        target = _of_tensor(reference, rows, how, accumulation_dtype(q.dtype))
    found, _ = divergence(given, target, how)
    return rows.scatter_sum(found)


def _agree(
    rows: ShardedRows,
    reference: Tensor | AttentionReference,
    inputs: tuple[Tensor, Unpack[tuple[Tensor | None, ...]]],
    options: tuple[float | str | None, ...],
) -> None:
    seen: tuple[Tensor | None, ...] = inputs
    sizes: tuple[float | None, ...] = tuple(inputs[0].shape[1:])
    if isinstance(reference, AttentionReference):
        seen = (*seen, *(None if x is None else x.detach() for x in reference[:4]))
        sizes = (*sizes, *reference.q.shape[1:], reference.scale, reference.softcap)
    words = call_words("attention_divergence", seen, *sizes, *options)
    agree(rows.together, words, rows.shard.group, rows.owner.device)


def _normaliser(
    given: Inputs,
    rows: ShardedRows,
    columns: Tensor,
    over: str,
    allowed: KeySets | None,
    options: dict[str, Any],
    *,
    mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[N, Hq] over the keys of all ranks that `over` names; and [N], the log of the map's mass on
    own columns, of over="renormalised" or where it is asked for."""

    def merged(of: Literal["visible", "columns"]) -> Tensor:
        found = log_sum_exp(given.q, given.k, rows.keys, columns, of, allowed, options)
        return merged_lse(found, rows.exchange)

    lse = merged("columns" if over == "columns" else "visible")
    if over != "renormalised" and not mass:
        return lse, None
    own = lse if over == "columns" else merged("columns")
    return lse, log_mass(own, lse, given.head_weight)


def _finite(mass: Tensor) -> Tensor:
    return torch.where(mass == -torch.inf, 0.0, mass)[:, None]


def _of_model(
    reference: AttentionReference, rows: ShardedRows, over: str, how: How, floor: float | None
) -> tuple[Target, How]:
    """Another model's map, divided by its sum in its normaliser."""
    wanted = "none where keys lie on several ranks: it is found here"
    checks.require(reference.lse is None, "reference.lse", wanted, "a tensor")
    q, k = autocast(reference.q, reference.k)
    model = Inputs(rows.gather(q), k, reference.head_weight, None)
    options = {**how.options, "scale": reference.scale, "softcap": reference.softcap}
    lse, mass = _normaliser(model, rows, how.columns, over, how.allowed, options, mass=True)
    assert mass is not None
    total = torch.gt(mass, -torch.inf).to(lse.dtype)
    model = model._replace(lse=lse + _finite(mass))
    floored = total
    if how.terms.kind == "reverse_kl" and floor is not None:
        given = {"over": "visible", "allowed": how.allowed, "lse": model.lse, **options}
        given["head_weight"] = model.head_weight
        p = attention_map(model.q, k, rows.keys, how.columns, **given)
        floored = _floored(p, rows, how)
    return Target(None, model, total, floored), how._replace(target_options=options)


def _of_tensor(reference: Tensor, rows: ShardedRows, how: How, wide: torch.dtype) -> Target:
    """A target whose sums over all ranks are found once a step."""

    def make() -> tuple[Tensor, Tensor]:
        own = Selection.of(rows.keys, how.allowed, how.columns).own_columns()
        p = torch.where(own, reference.detach().to(wide), 0.0)
        total = summed(p.sum(1), rows.shard)
        p = p / torch.where(total > 0, total, 1.0)[:, None]
        return total, _floored(p, rows, how)

    key = "sums of a reference", how.floor, wide
    total, floored = kept(rows.together, (how.columns, how.allowed, reference), key, make)
    return Target(reference.detach(), None, total, floored)


def _floored(p: Tensor, rows: ShardedRows, how: How) -> Tensor:
    """[N]: the sum over ranks of what is at least the floor."""
    own = Selection.of(rows.keys, how.allowed, how.columns).own_columns()
    return summed(p.clamp(min=how.floor).masked_fill(~own, 0.0).sum(1), rows.shard)
