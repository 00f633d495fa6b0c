"""The public functions `attention_map`, `attention_contribution` and `attention_kl`."""

from typing import Literal

import torch
from torch import Tensor

from groundkern import backends, checks
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
from groundkern.selection import KeySets, QueryRows, Selection, check_selection

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
    q, k = autocast(q, k)
    sizes = _check(q, k, rows, columns, over, allowed, scale, softcap)
    lse, lse_grad = _normaliser(lse, q, sizes, over)
    inputs = Inputs(q, k, None, None, _head_weight(head_weight, q, sizes), None, lse)
    options = Options(MAP, over, False, scale or sizes["D"] ** -0.5, softcap or 0.0, lse_grad)
    return _run(inputs, rows, allowed, columns, options, backend)


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
    q, k, v, g = autocast(q, k, v, g)
    sizes = _check(q, k, rows, columns, over, allowed, scale, softcap)
    lse, lse_grad = _normaliser(lse, q, sizes, over)
    checks.tensor("v", v, "B Hkv S Dv", sizes, dtype=q.dtype, device=q.device)
    checks.tensor("g", g, "N Hq Dv", sizes, dtype=q.dtype, device=q.device)
    inputs = Inputs(q, k, v, g, None, None, lse)
    options = Options(
        CONTRIBUTION, over, rectify, scale or sizes["D"] ** -0.5, softcap or 0.0, lse_grad
    )
    return _run(inputs, rows, allowed, columns, options, backend)


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
    q, k = autocast(q, k)
    sizes = _check(q, k, rows, columns, over, allowed, scale, softcap)
    lse, lse_grad = _normaliser(lse, q, sizes, over)
    checks.require(heads in ("mean", "each"), "heads", "'mean' or 'each'", repr(heads))
    checks.tensor("target", target, "N C", sizes, dtype=checks.FLOATS, device=q.device)
    target = target.detach() if target.requires_grad else target  # itself, for what is kept of it
    if checks.values_visible(target):
        good = bool(((target >= 0) & target.isfinite()).all())
        checks.require(good, "target", "finite values >= 0", "a negative or non-finite value")
    inputs = Inputs(q, k, None, None, _head_weight(head_weight, q, sizes), target, lse)
    kind = KL_MEAN if heads == "mean" else KL_EACH
    options = Options(kind, over, False, scale or sizes["D"] ** -0.5, softcap or 0.0, lse_grad)
    return _run(inputs, rows, allowed, columns, options, backend)


def _run(
    inputs: Inputs,
    rows: QueryRows,
    allowed: KeySets | None,
    columns: Tensor,
    options: Options,
    backend: str,
) -> Tensor:
    device = inputs.q.device
    name = backends.choose(backend, device, lambda b: op.kernels(b).unsupported(inputs))
    plan = op.plan(name, inputs, rows, allowed, columns, options)
    selection = Selection.of(rows, allowed, columns)
    return op.attention_map(*inputs, *selection, *plan, *options, name)[0]


def _check(q, k, rows, columns, over, allowed, scale, softcap) -> dict[str, int]:
    """Check what the functions share; returns the sizes."""
    sizes: dict[str, int] = {}
    checks.tensor("q", q, "N Hq D", sizes, dtype=checks.FLOATS)
    checks.tensor("k", k, "B Hkv S D", sizes, dtype=q.dtype, device=q.device)
    check_selection(rows, allowed, sizes, q.device)
    checks.tensor("columns", columns, "B C", sizes, dtype=torch.int32, device=q.device)
    checks.require(over in ("visible", "columns"), "over", "'visible' or 'columns'", repr(over))
    checks.finite_positive("scale", scale)
    checks.finite_positive("softcap", softcap)
    if columns.numel() and checks.values_visible(columns):
        _check_columns(columns, sizes["S"])
    return sizes


def _normaliser(
    lse: Tensor | None, q: Tensor, sizes: dict[str, int], over: Over
) -> tuple[Tensor | None, bool]:
    """The given lse, None where it is not used, and whether it takes a gradient."""
    if lse is None:
        return None, False
    wide = accumulation_dtype(q.dtype)
    checks.tensor("lse", lse, "N Hq", sizes, dtype=wide, device=q.device)
    lse_grad = lse.requires_grad and torch.is_grad_enabled()
    if over == "columns":
        wanted = "an lse without gradient with over='columns', which does not use it"
        checks.require(not lse_grad, "lse", wanted, "one that requires grad")
        return None, False
    return (lse if lse_grad else lse.detach()), lse_grad


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


def _head_weight(head_weight: Tensor | None, q: Tensor, sizes: dict[str, int]) -> Tensor:
    """[N, Hq] in the accumulation dtype."""
    wide = accumulation_dtype(q.dtype)
    if head_weight is None:
        return q.new_full(q.shape[:2], 1.0 / q.shape[1], dtype=wide)
    dims = "Hq" if head_weight.dim() == 1 else "N Hq"
    checks.tensor("head_weight", head_weight, dims, sizes, dtype=checks.FLOATS, device=q.device)
    if checks.values_visible(head_weight):
        good = not bool((head_weight < 0).any())
        checks.require(good, "head_weight", "values >= 0", "a negative value")
    return head_weight.to(wide).expand(q.shape[:2])
