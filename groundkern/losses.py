"""Losses on what the ops return: log probabilities, cross-entropy rows, attention maps.

Every function is a few lines of torch on per-row values, in fp32 (fp64 input stays fp64). Most
return one loss per row: only the caller knows which rows count and what their sum is divided by
(padding, gradient accumulation); `mean_rows` is the usual answer. Equations are numbered on
the pages of docs/methods.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.masses import divided_by_sum, mass_loss


class SmamLoss(NamedTuple):
    """Per row: `total = gamma * grounding + alpha * cross_entropy`."""

    total: Tensor  # [...] fp32, (S5)
    grounding: Tensor  # [...] fp32, L_G of (S4)
    cross_entropy: Tensor  # [...] fp32, L_CE+ of (S3)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    require(
        x.shape == like.shape,
        name,
        f"the shape of `{like_name}`, {list(like.shape)}",
        list(x.shape),
    )


def mean_rows(
    rows: Tensor,
    counted: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Weighted mean of the counted rows; 0, with a zero gradient, if there are none.

    Equals `(weight * rows)[counted & (weight != 0)].sum() / denominator` without a host sync; rows
    that are not counted may hold anything, NaN too.

    Args:
        rows: [...] float, per-row losses.
        counted: bool, broadcastable to `rows`; None counts all.
        weight: float, broadcastable to `rows`, what each row counts for; a row of weight 0 is not
            counted. None: 1.
        denominator: what to divide by, for example the number of rows of a whole accumulated batch;
            None: the number of counted rows, whatever their weights. With 0 the result is 0.

    Returns:
        Scalar in the dtype of `rows`.

    Source: (W1).
    """
    if counted is None:
        counted = torch.ones((), dtype=torch.bool, device=rows.device)
    counted = counted.expand(rows.shape)
    if weight is not None:
        weight = weight.to(rows.dtype).expand(rows.shape)
        rows, counted = rows * weight, counted & (weight != 0)
    total = rows.masked_fill(~counted, 0.0).sum()
    if denominator is None:
        denominator = counted.sum()
    denominator = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return torch.where(denominator > 0, total, total * 0.0) / denominator.clamp_min(1e-30)


def smam(
    log_prob: Tensor,
    side_log_prob: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
    gamma: float = 2.0,
    detach_reference: bool = False,
) -> SmamLoss:
    """SMAM's two terms for each aligned answer token.

    Equals `-F.logsigmoid(beta * (log_prob - side_log_prob))` (S4) and `-side_log_prob` (S3), added
    up by (S5).

    Args:
        log_prob: [...] float, log pi(w_t) of the ordinary forward pass, in nats.
        side_log_prob: [...] float, log pi+(w_t) of the pass that sees only the token's regions.
        beta, alpha, gamma: the paper's weights; gamma 2.0 for LLaVA, 0.5 for Qwen. No gradient
            pushes pi+ down exactly if gamma * beta / 2 <= alpha (at pi = pi+).
        detach_reference: stop the gradient of (S4) towards pi+; (S3) still trains it.

    Returns:
        SmamLoss of [...] fp32 rows.

    Raises:
        ValueError: the two shapes differ.

    Source: phrase-grounding-aware SFT (CVPR 2026), (S3)-(S5).
    """
    _same_shape("side_log_prob", side_log_prob, "log_prob", log_prob)
    log_prob, side_log_prob = _at_least_fp32(log_prob), _at_least_fp32(side_log_prob)
    cross_entropy = -side_log_prob  # (S3)
    reference = side_log_prob.detach() if detach_reference else side_log_prob
    grounding = -F.logsigmoid(beta * (log_prob - reference))  # (S4)
    return SmamLoss(gamma * grounding + alpha * cross_entropy, grounding, cross_entropy)  # (S5)


def word_cross_entropy(
    log_prob: Tensor, other_log_prob: Tensor, has_others: Tensor, *, smoothing: float = 0.3
) -> Tensor:
    """DV-SFT's cross entropy of a visual token, smoothed over the other labels of its image (D3).

    Equals `-((1 - b) * log_prob + b * other_log_prob)` with b = smoothing, or 0 if the image has no
    other label. `groundkern.linear_cross_entropy(..., bags=, smoothing=)` computes the same from
    hidden states; this form is for log probabilities you already have.

    Args:
        log_prob: [...] float, log p_i(w_i), in nats.
        other_log_prob: [...] float, mean of log p_i(y) over the image's other labels; ignored in
            rows without any.
        has_others: [...] bool, whether the image has another label (D2).
        smoothing: b, in [0, 1).

    Returns:
        [...] fp32 rows.

    Raises:
        ValueError: shapes that differ, or a smoothing outside [0, 1).

    Source: DV-SFT (arXiv 2605.26656), (D2) and (D3).
    """
    _same_shape("other_log_prob", other_log_prob, "log_prob", log_prob)
    _same_shape("has_others", has_others, "log_prob", log_prob)
    require(0.0 <= smoothing < 1.0, "smoothing", "a number in [0, 1)", smoothing)
    log_prob = _at_least_fp32(log_prob)
    other_log_prob = _at_least_fp32(other_log_prob).masked_fill(~has_others, 0.0)
    smoothed = (1.0 - smoothing) * log_prob + smoothing * other_log_prob
    return -torch.where(has_others, smoothed, log_prob)


def map_kl(target: Tensor, attention: Tensor, *, renormalise: bool = False) -> Tensor:
    """KL(P || Q) of a target map against a differentiable attention map.

    Equals `(P * (P.log() - attention.log())).sum(-1)` with `P = target / target.sum(-1)`. It is
    always finite: attention below the smallest normal number counts as that number, without a
    gradient. `groundkern.attention_kl` computes the same in log space, from q and k.

    Args:
        target: [..., C] float >= 0, of any scale; no gradient. A row that sums to 0 has no target:
            its loss and gradient are 0.
        attention: [..., C] float >= 0, differentiable, for example of `groundkern.attention_map`.
        renormalise: divide `attention` by its sum first (normalise after the head mean).

    Returns:
        [...] fp32, in nats.

    Raises:
        ValueError: the two shapes differ.

    Source: KLAL (arXiv 2511.12738), one layer's term of (K3).
    """
    _same_shape("attention", attention, "target", target)
    attention = _at_least_fp32(attention)
    target = target.detach().to(attention.dtype)
    tiny = torch.finfo(attention.dtype).tiny
    p = target / target.sum(-1, keepdim=True).clamp_min(tiny)  # [..., C]
    log_q = attention.clamp_min(tiny).log()
    kl = torch.xlogy(p, p).sum(-1) - (p * log_q).sum(-1)
    if renormalise:  # KL(P || Q / z) = KL(P || Q) + log z, since P sums to 1
        kl = kl + attention.sum(-1).clamp_min(tiny).log()
    return torch.where(target.sum(-1) > 0, kl, torch.zeros_like(kl))


def map_divergence(
    target: Tensor,
    attention: Tensor,
    *,
    kind: str = "kl",
    valid: Tensor | None = None,
    renormalise: bool = False,
    floor: float = 1e-6,
    beta: float = 0.5,
) -> Tensor:
    """KLAL's divergence of an attention map Q from a target map P: KL, its reverse,
    Jensen-Shannon, or a loss on Q's mass on the target.

    Equals `sum P log(P / Q)` ("kl"), `sum Q log(Q / P)` ("reverse_kl") or, with
    M = beta P + (1 - beta) Q, `beta sum P log(P / M) + (1 - beta) sum Q log(Q / M)` ("js"). If Q
    sums to less than 1, "js" counts the rest as mass off the target.
    `groundkern.attention_divergence` computes the same from q and k and keeps no map.
    "mass" and "share" are `masses.mass_loss`.

    Args:
        target: [..., C] float >= 0, of any scale; no gradient. A row that sums to 0 has no target:
            its loss and gradient are 0.
        attention: [..., C] float >= 0, differentiable.
        kind: "kl" | "reverse_kl" | "js" | "mass" | "share".
        valid: bool [..., C], the columns that exist; None: all.
        renormalise: divide `attention` by its sum first.
        floor: the least share of P that "reverse_kl" assumes in a valid column: the divergence is
            infinite if P is 0 where Q is not.
        beta: of "js", in (0, 1); at 1/2 it is half the sum of both.

    Returns:
        [...] fp32, in nats.

    Raises:
        ValueError: the two shapes differ, an unknown kind, or a beta outside (0, 1).

    Source: KLAL (arXiv 2511.12738), (K3) and its options; (K5).
    """
    if kind == "kl":
        return map_kl(target, attention, renormalise=renormalise)
    if kind in ("mass", "share"):
        return mass_loss(target, attention, squared=kind == "share", renormalise=renormalise)
    if kind not in ("reverse_kl", "js"):
        fail("kind", "'kl', 'reverse_kl', 'js', 'mass' or 'share'", repr(kind))
    require(0.0 < beta < 1.0, "beta", "a number in (0, 1)", beta)
    _same_shape("attention", attention, "target", target)
    q = _at_least_fp32(attention)
    target = target.detach().to(q.dtype)
    tiny = torch.finfo(q.dtype).tiny
    if renormalise:
        q = divided_by_sum(q)
    p = target / target.sum(-1, keepdim=True).clamp_min(tiny)
    valid = torch.ones_like(p, dtype=torch.bool) if valid is None else valid
    log_q = q.clamp_min(tiny).log()
    if kind == "reverse_kl":
        p = p.clamp_min(floor).masked_fill(~valid, 0.0)
        p = p / p.sum(-1, keepdim=True).clamp_min(tiny)
        rows = (q * (log_q - p.clamp_min(tiny).log())).masked_fill(~valid, 0.0).sum(-1)
    else:
        log_m = (beta * p + (1.0 - beta) * q).clamp_min(tiny).log()
        of_p, of_q = torch.xlogy(p, p) - p * log_m, q * (log_q - log_m)
        rows = (beta * of_p + (1.0 - beta) * of_q).sum(-1)
        rows = rows - (1.0 - beta) * math.log1p(-beta) * (1.0 - q.sum(-1))
    return torch.where(target.sum(-1) > 0, rows, torch.zeros_like(rows))


def policy_divergence(
    attention: Tensor, reference: Tensor, seen: Tensor, *, kind: str = "js"
) -> Tensor:
    """How far a row's attention is from what it was, over the positions that count (R1), (R2).

    Equals `map_divergence(reference, attention, kind=kind, valid=seen, renormalise=True)` with both
    0 where nothing is seen. `groundkern.attention_divergence` computes the same from q and k.

    Args:
        attention: [..., S] float >= 0, differentiable: the head mean over all that the row sees.
        reference: [..., S] float >= 0, of any scale; no gradient.
        seen: bool [..., S], without the row's own position.
        kind: as in `map_divergence`, the reference being its target.

    Returns:
        [...] fp32, in nats; 0 with a zero gradient where both are alike, or a row sees nothing.

    Raises:
        ValueError: shapes that differ, or an unknown kind.

    Source: RAL (arXiv 2602.04884).
    """
    _same_shape("seen", seen, "attention", attention)
    attention, reference = attention.masked_fill(~seen, 0.0), reference.masked_fill(~seen, 0.0)
    return map_divergence(reference, attention, kind=kind, valid=seen, renormalise=True)


def composition(
    whole: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    distance: str = "l2",
    detach_parts: bool = False,
) -> Tensor:
    """How far the map of "p1 and p2" is from the sum of the maps of p1 and p2.

    Equals `(whole - (first + second)).norm(dim=-1)`; a row in which they agree exactly has gradient
    0.

    Args:
        whole, first, second: [..., C] float, maps of the composite and of its two phrases.
        distance: "l2", "l1" or "smooth_l1" (summed over columns) of the maps as they are; "kl":
            KL of `(first + second) / 2` against `whole`, each divided by its sum first.
        detach_parts: let only the composite learn.

    Returns:
        [...] fp32; with "kl", 0 if either side has no mass.

    Raises:
        ValueError: shapes that differ, or an unknown distance.

    Source: HIST (arXiv 2412.08110), (H3).
    """
    _same_shape("first", first, "whole", whole)
    _same_shape("second", second, "whole", whole)
    whole = _at_least_fp32(whole)
    parts = _at_least_fp32(first) + _at_least_fp32(second)
    parts = parts.detach() if detach_parts else parts
    if distance == "l2":
        return torch.linalg.vector_norm(whole - parts, dim=-1)
    if distance == "l1":
        return (whole - parts).abs().sum(-1)
    if distance == "smooth_l1":
        return F.smooth_l1_loss(whole, parts, reduction="none").sum(-1)
    if distance != "kl":
        fail("distance", "'l2', 'l1', 'smooth_l1' or 'kl'", repr(distance))
    return _normalised_kl(parts, whole)


def _normalised_kl(p: Tensor, q: Tensor) -> Tensor:
    """[...]: KL(p / sum p || q / sum q), differentiable in both; 0 if either has no mass."""
    tiny = torch.finfo(p.dtype).tiny
    some = (p.sum(-1) > 0) & (q.sum(-1) > 0)
    p, q = (x / x.sum(-1, keepdim=True).clamp_min(tiny) for x in (p, q))
    rows = (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1)
    return torch.where(some, rows, torch.zeros_like(rows))


class MarginLoss(NamedTuple):
    """The two hinges of each row, >= 0."""

    mean: Tensor  # [...] fp32, (A1): of the means inside and outside
    max: Tensor  # [...] fp32, (A2): of the maxima inside and outside


def margins(
    attention: Tensor,
    inside: Tensor,
    *,
    valid: Tensor | None = None,
    mean_margin: float = 0.1,
    max_margin: float = 0.5,
) -> MarginLoss:
    """AMC's two hinges: the map inside a region should lie above the map outside of it.

    Equals `relu(mean_out - mean_in + mean_margin)` (A1) and
    `relu(max_out - max_in + max_margin)` (A2).

    Args:
        attention: [..., C] float, a map of any scale: the margins are in its units.
        inside: bool [..., C], the columns of the region.
        valid: bool [..., C], the columns that exist; None: all.
        mean_margin, max_margin: the defaults are the paper's, for GradCAM maps.

    Returns:
        MarginLoss of [...] fp32 rows; 0 with a zero gradient if no column is inside, or none
        outside.

    Raises:
        ValueError: the shapes of attention and inside differ.

    Source: AMC (arXiv 2206.15462), (A1) and (A2).
    """
    _same_shape("inside", inside, "attention", attention)
    attention = _at_least_fp32(attention)
    if attention.shape[-1] == 0:
        return MarginLoss(attention.sum(-1), attention.sum(-1))
    valid = torch.ones_like(inside) if valid is None else valid
    sides = (valid & inside, valid & ~inside)
    defined = sides[0].any(-1) & sides[1].any(-1)
    mean_in, mean_out = (
        attention.masked_fill(~side, 0.0).sum(-1) / side.sum(-1).clamp_min(1) for side in sides
    )
    low = torch.finfo(attention.dtype).min
    max_in, max_out = (attention.masked_fill(~side, low).amax(-1) for side in sides)
    rows = (mean_out - mean_in + mean_margin, max_out - max_in + max_margin)
    return MarginLoss(*(F.relu(x.masked_fill(~defined, 0.0)) for x in rows))


def logit_lens(log_prob: Tensor, inside: Tensor) -> Tensor:
    """Logit-lens loss: raise a concept's token at visual tokens on the object, suppress it off it.

    Equals `-log_prob` (L1) in rows that are inside, `-log(1 - log_prob.exp())` (L2) in the others.

    Args:
        log_prob: [...] float, log p_i(w) of the concept's token w at visual token i, in nats.
        inside: bool [...], whether token i lies on the object.

    Returns:
        [...] fp32 rows.

    Raises:
        ValueError: the two shapes differ.

    Source: logit-lens loss (arXiv 2602.01530), (L1) and (L2).
    """
    _same_shape("inside", inside, "log_prob", log_prob)
    log_prob = _at_least_fp32(log_prob)
    certain = torch.finfo(log_prob.dtype).eps  # p = 1 - eps at most: finite, with a gradient below
    outside = log_prob.clamp_max(-certain)
    near_one = outside > -math.log(2.0)  # of the two forms of log(1 - exp(x)), one cancels here
    low = torch.where(near_one, -1.0, outside)
    high = torch.where(near_one, outside, -1.0)
    suppress = torch.where(near_one, (-torch.expm1(high)).log(), torch.log1p(-low.exp()))
    return torch.where(inside, -log_prob, -suppress)


def contrastive(similarity: Tensor, match: Tensor) -> Tensor:
    """Image-text contrastive loss (the ITC of (H1), (H2)) with several matches per row and column.

    Equals `(F.cross_entropy(similarity, p) + F.cross_entropy(similarity.T, p_of_texts)) / 2`, the
    target probabilities spread evenly over the matches.

    Args:
        similarity: [I, T] float, of images and texts, divided by the temperature.
        match: bool [I, T], which pairs belong together.

    Returns:
        fp32 scalar: half the mean over images with a text plus half the mean over texts with an
        image; a mean of nothing is 0.

    Raises:
        ValueError: the two shapes differ.

    Source: BLIP (arXiv 2201.12086) without momentum; HIST (arXiv 2412.08110), (H1) and (H2).
    """
    _same_shape("match", match, "similarity", similarity)
    similarity = _at_least_fp32(similarity)
    losses = []
    for dim in (0, 1):
        share = match / match.sum(dim, keepdim=True).clamp_min(1)
        rows = -(share * similarity.log_softmax(dim)).sum(dim)
        losses.append(mean_rows(rows, match.any(dim)))
    return (losses[0] + losses[1]) / 2
