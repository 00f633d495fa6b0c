"""The public functions `attention_map`, `attention_contribution` and `attention_kl`."""

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from groundkern import backends, checks, together
from groundkern.calls import Call, called
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    KL_MEAN,
    MAP,
    Inputs,
    Options,
    op,
)
from groundkern.precision import accumulation_dtype, autocast
from groundkern.selection import KeySets, QueryRows, check_selection
from groundkern.together import Asked

Over = Literal["visible", "columns"]


def attention_map(
    q: Tensor,
    k: Tensor,
    rows: QueryRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Head-reduced attention of a few query rows on a set of key columns, as a differentiable map.

    Equals `(head_weight[..., None] * softmax(scores))[..., columns].sum(heads)`, without the [N, H,
    S] probabilities in memory. A row's own columns are those that are not padding, that the row
    sees, and that are in its key set when `allowed` is given (one image of several). All others are
    0 and take part in nothing.

    Args:
        q: [N, Hq, D] queries, after RoPE and q-norm. fp32, bf16, fp16 (fp64 in the reference).
        k: [B, Hkv, S, D] keys; Hq is a multiple of Hkv.
        rows: the N query rows, sorted by sequence.
        columns: int32 [B, C], key columns of each sequence, ascending, padded with -1.
        over: "visible": p is normalised over all visible keys, and gradients reach all of them;
            "columns": over the row's own columns.
        allowed: key sets that restrict a row's own columns.
        lse: [N, Hq] fp32, natural log, for over="visible" (else it is ignored): the normaliser, so
            `p = exp(score - lse)`. Without gradient it must be the log-sum-exp over the row's
            visible keys, and gradients reach these keys as if it were computed here. If it requires
            grad it is an input of its own: q and k get gradient through the scores of own columns
            alone, and lse the rest (`side_attention(...).lse` then passes it on to the keys). So
            statistics merged from shards, heads or calls stay exact. Where it is infinite (as in a
            row without keys, -inf) that head of that row is left out: its p is 0, and so is its
            share of a KL. NaN stays NaN.
        head_weight: [Hq] or [N, Hq], >= 0, differentiable; None: 1 / Hq each.
        scale: of the scores; default D ** -0.5.
        softcap: `s = softcap * tanh(s / softcap)`; None: off.
        backend: "auto" | "reference" | "triton" | "native".

    Returns:
        [N, C] fp32, differentiable in q, k, head_weight and an lse that requires grad.

    Raises:
        ValueError: mismatched shapes, rows, columns or sets out of range, an lse that requires grad
            with over="columns", a backend that cannot serve the call.
        TypeError: mismatched dtypes.

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K2); GUI-AIMA (arXiv 2511.00810) for head
        weights.
    """
    wanted = Wanted(over, scale, softcap, backend)
    return _result(asked_map(q, k, rows, columns, allowed, lse, head_weight, wanted))


def attention_contribution(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    rows: QueryRows,
    columns: Tensor,
    *,
    over: Over,
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    rectify: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """What each key column contributes along a direction: `sum_h p[n, h, c] * f(v[c, h] . g[n,
    h])`.

    With g = W_O^T u it is the logit contribution of the column; with g = dy / d(attention output)
    and `rectify` it is GradCAM.

    Args:
        v: [B, Hkv, S, Dv] values.
        g: [N, Hq, Dv] directions, differentiable.
        rectify: f = relu; otherwise the identity.
        q, k, rows, columns, over, allowed, lse, scale, softcap, backend: as in `attention_map`.

    Returns:
        [N, C] fp32, differentiable in q, k, v, g and an lse that requires grad.

    Raises:
        ValueError, TypeError: as `attention_map`.

    Source: equation (C1) (Ferrando et al.; GradCAM as in arXiv 2412.08110).
    """
    given = Inputs(*autocast(q, k, v, g), None, None, lse)
    wanted = Wanted(over, scale, softcap, backend, rectify)
    return _result(_asked(CONTRIBUTION, given, rows, columns, allowed, wanted))


def attention_kl(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: QueryRows,
    columns: Tensor,
    *,
    over: Over,
    heads: Literal["mean", "each"] = "mean",
    allowed: KeySets | None = None,
    lse: Tensor | None = None,
    head_weight: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(target || attention map) of each row, in log space: no underflow where the map is tiny.

    Equals `(P * (P.log() - attention_map(...).log())).sum(-1)` with P the target renormalised over
    the row's own columns.

    Args:
        target: [N, C] >= 0, any float dtype, no gradient. Mass on columns that are not the row's
            own is dropped and the rest renormalised; where nothing is left the row's KL is 0 and
            carries no gradient.
        heads: "mean": KL to the head-weighted map; "each": the head-weighted sum of every head's
            own KL.
        q, k, rows, columns, over, allowed, lse, head_weight, scale, softcap, backend: as in
            `attention_map`.

    Returns:
        [N] fp32, differentiable in q, k, head_weight and an lse that requires grad.

    Raises:
        ValueError, TypeError: as `attention_map`; ValueError also for a negative or non-finite
            target (on CPU).

    Source: KLAL (arXiv 2511.12738), equations (K1)-(K3).
    """
    wanted = Wanted(over, scale, softcap, backend)
    asked = asked_kl(q, k, target, rows, columns, heads, allowed, lse, head_weight, wanted)
    return _result(asked)


class Wanted(NamedTuple):
    """Options as the caller gives them."""

    over: Over
    scale: float | None = None
    softcap: float | None = None
    backend: str = "auto"
    rectify: bool = False


def asked_map(
    q: Tensor,
    k: Tensor,
    rows: QueryRows,
    columns: Tensor,
    allowed: KeySets | None,
    lse: Tensor | None,
    head_weight: Tensor | None,
    wanted: Wanted,
) -> Asked:
    """A call of `attention_map`, checked and ready to run."""
    given = Inputs(*autocast(q, k), None, None, head_weight, None, lse)
    return _asked(MAP, given, rows, columns, allowed, wanted)


def asked_kl(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rows: QueryRows,
    columns: Tensor,
    heads: Literal["mean", "each"],
    allowed: KeySets | None,
    lse: Tensor | None,
    head_weight: Tensor | None,
    wanted: Wanted,
) -> Asked:
    """A call of `attention_kl`, checked and ready to run."""
    if heads not in ("mean", "each"):
        checks.fail("heads", "'mean' or 'each'", repr(heads))
    given = Inputs(*autocast(q, k), None, None, head_weight, target, lse)
    kind = KL_MEAN if heads == "mean" else KL_EACH
    return _asked(kind, given, rows, columns, allowed, wanted)


def _result(asked: Asked) -> Tensor:
    ((found,),) = together.run([asked])
    return found


def _asked(
    kind: str,
    given: Inputs,
    rows: QueryRows,
    columns: Tensor,
    allowed: KeySets | None,
    wanted: Wanted,
) -> Asked:
    """The op, of inputs as the caller gave them: a target that requires grad, a head weight of any
    of its shapes, an lse that is not used."""
    takes_grad = isinstance(given.lse, Tensor) and given.lse.requires_grad
    lse_grad = takes_grad and torch.is_grad_enabled()

    def make() -> Call:
        dim = _checked(kind, given, rows, columns, allowed, wanted, lse_grad)
        numbers = (wanted.scale or dim**-0.5, wanted.softcap or 0.0)
        options = Options(kind, wanted.over, wanted.rectify, *numbers, lse_grad)
        device = given.q.device
        name = backends.choose(wanted.backend, device, lambda b: op.kernels(b).unsupported(given))
        return op.call(name, given, rows, allowed, columns, options)

    others = (allowed, columns, given.target)
    call, direct = called(rows, others, given, (kind, wanted, lse_grad), make)
    return Asked(op, call, _inputs(given, call), direct)


def _inputs(given: Inputs, call: Call) -> Inputs:
    """What the kernels read: everything detached that takes no gradient, and the head weight
    fp32 [N, Hq]."""
    q, _, _, _, weight, target, lse = given
    options = cast("Options", call.options)
    if weight is not None:
        weight = _head_weight(weight, q)
    elif options.kind != CONTRIBUTION:
        weight = call.once("mean of heads", lambda: _mean_of_heads(q))
    if target is not None and target.requires_grad:
        target = target.detach()
    if options.over == "columns" and not options.lse_grad:
        lse = None
    elif lse is not None and lse.requires_grad and not options.lse_grad:
        lse = lse.detach()
    return given._replace(head_weight=weight, target=target, lse=lse)


def _mean_of_heads(q: Tensor) -> Tensor:
    """1 / Hq for all, [N, Hq]."""
    return q.new_full(q.shape[:2], 1.0 / q.shape[1], dtype=accumulation_dtype(q.dtype))


def _head_weight(weight: Tensor, q: Tensor) -> Tensor:
    """[N, Hq] in the accumulation dtype."""
    if checks.values_visible(weight):
        good = not bool((weight < 0).any())
        checks.require(good, "head_weight", "values >= 0", "a negative value")
    return weight.to(accumulation_dtype(q.dtype)).expand(q.shape[:2])


def _checked(
    kind: str,
    given: Inputs,
    rows: QueryRows,
    columns: Tensor,
    allowed: KeySets | None,
    wanted: Wanted,
    lse_grad: bool,
) -> int:
    """D of a call, which is refused if its arguments do not agree."""
    q, k, v, g, head_weight, target, lse = given
    sizes: dict[str, int] = {}
    checks.tensor("q", q, "N Hq D", sizes, dtype=checks.FLOATS)
    alike: dict[str, Any] = {"dtype": q.dtype, "device": q.device}
    checks.tensor("k", k, "B Hkv S D", sizes, **alike)
    check_selection(rows, allowed, sizes, q.device)
    checks.tensor("columns", columns, "B C", sizes, dtype=torch.int32, device=q.device)
    over = wanted.over
    checks.require(over in ("visible", "columns"), "over", "'visible' or 'columns'", repr(over))
    checks.finite_positive("scale", wanted.scale)
    checks.finite_positive("softcap", wanted.softcap)
    if columns.numel() and checks.values_visible(columns):
        _check_columns(columns, sizes["S"])
    if lse is not None:
        wide = accumulation_dtype(q.dtype)
        checks.tensor("lse", lse, "N Hq", sizes, dtype=wide, device=q.device)
        without = "an lse without gradient with over='columns', which does not use it"
        checks.require(over == "visible" or not lse_grad, "lse", without, "one that requires grad")
    if kind == CONTRIBUTION:
        checks.tensor("v", v, "B Hkv S Dv", sizes, **alike)
        checks.tensor("g", g, "N Hq Dv", sizes, **alike)
    if kind in (KL_MEAN, KL_EACH):
        checks.tensor("target", target, "N C", sizes, dtype=checks.FLOATS, device=q.device)
        if target is not None and checks.values_visible(target):
            good = bool(((target >= 0) & target.isfinite()).all())
            checks.require(good, "target", "finite values >= 0", "a negative or non-finite value")
    if head_weight is not None:
        dims = "Hq" if head_weight.dim() == 1 else "N Hq"
        floats: dict[str, Any] = {"dtype": checks.FLOATS, "device": q.device}
        checks.tensor("head_weight", head_weight, dims, sizes, **floats)
    return sizes["D"]


def _check_columns(columns: Tensor, keys: int) -> None:
    low, high = int(columns.min()), int(columns.max())
    wanted = f"key columns in [0, {keys}) padded with -1"
    checks.require(low >= -1 and high < keys, "columns", wanted, f"values in [{low}, {high}]")
    seen = columns.cummax(1).values
    later, before = columns[:, 1:], seen[:, :-1]
    unsorted = ((later >= 0) & (later <= before)).any(1)
    if bool(unsorted.any()):
        b = int(unsorted.nonzero()[0])
        checks.fail("columns", "ascending columns in every sequence", f"unsorted ones in {b}")
