"""The public function `attention_divergence`: a composition of the attention ops."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from groundkern import checks
from groundkern.divergence.blocks import How, Inputs, Target, divergence
from groundkern.divergence.terms import Terms
from groundkern.normaliser import log_mass, log_sum_exp
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import KeySets, QueryRows

Kind = Literal["kl", "reverse_kl", "js"]
Over = Literal["visible", "columns", "renormalised"]


class AttentionReference(NamedTuple):
    """Another model's queries and keys at the same rows and columns; no gradient reaches them.

    Its map is made and dropped block by block. Heads, their size, dtype, scale and softcap may be
    others than the trained model's.

    Args:
        q: [N, Hq', D'] float.
        k: [B, Hkv', S, D'] in q's dtype.
        head_weight, lse, scale, softcap: as in `attention_map`, of that model.

    Source: attention distillation of RAL (arXiv 2602.04884); (K5).
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
    """Divergence of each row's attention map Q from a reference map P, of which none is kept.

    Equals `losses.map_divergence(P, attention_map(q, k, ...), kind=kind, beta=beta,
    valid=own columns, renormalise=over == "renormalised")`, without maps between forward and
    backward: the backward makes them again, some rows at a time, so that rows may be hundreds.

    Args:
        q, k, rows, columns, allowed, head_weight, scale, softcap, backend: as in `attention_map`.
        lse: as in `attention_map`, of all visible keys; not used with over="columns".
        reference: [N, C] >= 0 of any scale, any float dtype, no gradient; or another model's
            queries and keys, whose map is made over the same keys. Either is P after division by
            its sum over the row's own columns; a row in which nothing is left has divergence 0 and
            no gradient.
        kind: "kl": `sum P log(P / Q)`; "reverse_kl": `sum Q log(Q / P)`; "js":
            `beta sum P log(P / M) + (1 - beta) sum Q log(Q / M)`, M = beta P + (1 - beta) Q.
        over: "columns": each head normalised over the row's own columns; "visible": over all
            visible keys, what lies off the columns is mass off the target (not with
            "reverse_kl", infinite there); "renormalised": the head mean of "visible", divided by
            its sum over own columns.
        beta: of "js", in (0, 1); at 1/2 it is half the sum of both.
        floor: the least share of P that "reverse_kl" assumes in an own column; None: 1e-6 of a
            tensor, whose zeros are somebody's choice, and the least normal number of a model's map.

    Returns:
        [N] fp32 (fp64 of fp64 inputs), in nats, differentiable once in q, k, head_weight and an lse
        that requires grad.

    Raises:
        ValueError, TypeError: as `attention_map`; ValueError also for an unknown kind or over, a
            beta or floor outside (0, 1), and a reference of another shape or (on CPU) with negative
            or non-finite values.

    Source: KLAL (arXiv 2511.12738) and RAL (arXiv 2602.04884), equation (K5).
    """
    least = check_options(kind, over, beta, floor, reference, q.dtype)
    if over == "columns" and isinstance(lse, Tensor) and lse.requires_grad:
        wanted = "an lse without gradient with over='columns', which does not use it"
        checks.require(not torch.is_grad_enabled(), "lse", wanted, "one that requires grad")
    given = Inputs(*autocast(q, k), head_weight, lse if over != "columns" else None)
    options = {"scale": scale, "softcap": softcap, "backend": backend}
    target, target_options = _target(given, reference, columns, backend)
    terms = Terms(kind, beta)
    how = How(rows, columns, allowed, over, terms, least, options, target_options)
    if torch.compiler.is_compiling():  # the import of its `disable` would load triton
        return torch.compiler.disable(_divergence)(given, target, how)
    return _divergence(given, target, how)


def _divergence(given: Inputs, target: Target, how: How) -> Tensor:
    """[N]: by way of the maps, or in log space if one that is divided by its sum may lie below the
    least number of its dtype."""
    exact = how.over == "columns" or (how.over == "visible" and target.model is None)
    if exact or checks.values_visible(given.q):
        found, lost = divergence(given, target, how)
        if exact or not bool(lost.any()):
            return found
    return divergence(*_scaled(given, target, how))[0]


def _scaled(given: Inputs, target: Target, how: How) -> tuple[Inputs, Target, How]:
    """The same call with maps that are divided by their sums in log space, by the normaliser."""
    if target.model is not None:
        with torch.no_grad():
            norm = _normaliser(target.model, how, how.target_options)
            norm = norm + _log_mass(target.model, norm, how, how.target_options)
            target = target._replace(model=target.model._replace(lse=norm))
    if how.over == "renormalised":
        norm = _normaliser(given, how, how.options)
        if how.terms.kind == "kl":
            norm = norm + _log_mass(given, norm, how, how.options)
            how = how._replace(over="visible")
        else:  # that map is divided by its sum once more, which makes this factor a constant
            with torch.no_grad():
                shift = _log_mass(given, norm, how, how.options)
            norm = norm + shift
        given = given._replace(lse=norm)
    return given, target, how


def _normaliser(given: Inputs, how: How, options: dict[str, Any]) -> Tensor:
    """[N, Hq] of all visible keys, which its gradient reaches unless it is an input of its own."""
    q, k, _, lse = given
    if lse is not None and lse.requires_grad and torch.is_grad_enabled():
        return lse
    found = log_sum_exp(q, k, how.rows, how.columns, "visible", None, options)
    if lse is None:
        return found
    return lse.detach() + (found - found.detach()).nan_to_num(0.0)  # of rows without keys


def _log_mass(given: Inputs, norm: Tensor, how: How, options: dict[str, Any]) -> Tensor:
    """[N, 1]: the log of the map's mass on own columns, 0 where there is none."""
    q, k, weight, _ = given
    own = log_sum_exp(q, k, how.rows, how.columns, "columns", how.allowed, options)
    mass = log_mass(own, norm, weight)
    return torch.where(mass == -torch.inf, 0.0, mass)[:, None]


def check_options(
    kind: str,
    over: str,
    beta: float,
    floor: float | None,
    reference: Tensor | AttentionReference,
    dtype: torch.dtype,
) -> float:
    """The floor of a call, which is refused if its options do not go together."""
    kinds, overs = ("kl", "reverse_kl", "js"), ("visible", "columns", "renormalised")
    checks.require(kind in kinds, "kind", "'kl', 'reverse_kl' or 'js'", repr(kind))
    checks.require(over in overs, "over", "'visible', 'columns' or 'renormalised'", repr(over))
    if kind == "reverse_kl" and over == "visible":
        wanted = "'columns' or 'renormalised' with reverse_kl, infinite where Q leaves the columns"
        checks.fail("over", wanted, repr(over))
    checks.require(0.0 < beta < 1.0, "beta", "a number in (0, 1)", beta)
    if floor is not None:
        checks.require(0.0 < floor < 1.0, "floor", "a number in (0, 1) or None", floor)
        return floor
    of_model = isinstance(reference, AttentionReference)
    return torch.finfo(accumulation_dtype(dtype)).tiny if of_model else 1e-6


def _target(
    given: Inputs, reference: Tensor | AttentionReference, columns: Tensor, backend: str
) -> tuple[Target, dict[str, Any]]:
    """What the maps are compared with, and the options of the other model."""
    q, k = given.q, given.k
    if isinstance(reference, AttentionReference):
        theirs = autocast(reference.q.detach(), reference.k.detach())
        sizes = {"N": len(q), "B": len(k), "S": k.shape[2]}
        checks.tensor("reference.q", theirs[0], "N Hq D", sizes, dtype=checks.FLOATS)
        checks.tensor("reference.k", theirs[1], "B Hkv S D", sizes, device=q.device)
        others = (reference.head_weight, reference.lse)
        model = Inputs(*theirs, *(None if x is None else x.detach() for x in others))
        options = {"scale": reference.scale, "softcap": reference.softcap, "backend": backend}
        return Target(None, model), options
    check_target(reference, len(q), columns.shape[-1], q.device)
    return Target(reference.detach(), None), {}


def check_target(reference: Tensor, rows: int, columns: int, device: torch.device) -> None:
    """Refuse a reference of another shape or device, or with values that no map has."""
    sizes = {"N": rows, "C": columns}
    checks.tensor("reference", reference, "N C", sizes, dtype=checks.FLOATS, device=device)
    if checks.values_visible(reference):
        good = bool(((reference >= 0) & reference.isfinite()).all())
        checks.require(good, "reference", "finite values >= 0", "a negative or non-finite value")
