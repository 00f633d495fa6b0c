"""How well a map over visual tokens finds its target, one number per row; hits of labels; and
where a map points.

Every metric but `label_hits` and `map_point` reads `scores` [N, C], a bool `target` [N, C] and
optionally a bool `valid` [N, C] (columns that exist; the others are ignored), and returns [N] fp32.
**A row for which a metric is not defined gets NaN**, so average with `torch.nanmean`. Sums run in
fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.targets.touching import hanging_together

_NAN = float("nan")


def _columns(scores: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Checked: scores in fp64, the valid targets, and which columns are valid; all [N, C]."""
    require(scores.dim() == 2, "scores", "a [N, C] tensor", list(scores.shape))
    for name, mask in (("target", target), ("valid", valid)):
        if mask is not None:
            if mask.dtype != torch.bool:
                fail(name, "a bool tensor", mask.dtype, TypeError)
            require(
                mask.shape == scores.shape, name, f"shape {list(scores.shape)}", list(mask.shape)
            )
    valid = torch.ones_like(target) if valid is None else valid
    return scores.detach().double(), target & valid, valid


def peak_in_mask(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 if the highest score lies on the target, 0 if it does not.

    Equals `target.gather(1, scores.argmax(1, keepdim=True))` if no two scores are equal. If several
    columns share the highest score, it is the fraction of them on the target (what choosing one at
    random gives), so that a constant map gains nothing from the order of its columns.

    Args:
        scores: [N, C] float, attention or contributions.
        target: [N, C] bool.
        valid: [N, C] bool; None: all.

    Returns:
        [N] fp32; NaN for a row without a target column, or with a NaN score.

    Raises:
        ValueError: shapes that differ, or other than two dimensions.
        TypeError: a target or valid that is not bool.

    Source: SMAM's evaluation (CVPR 2026), on contributions (C1); KLAL's argmax in target (arXiv
        2511.12738).
    """
    scores, target, valid = _columns(scores, target, valid)
    if scores.shape[1] == 0:
        return scores.new_full((scores.shape[0],), _NAN, dtype=torch.float32)
    scores = scores.masked_fill(~valid, -torch.inf)
    peak = (scores == scores.amax(-1, keepdim=True)) & valid
    found = (peak & target).sum(-1) / peak.sum(-1).clamp_min(1).double()
    found = found.masked_fill(~target.any(-1) | scores.isnan().any(-1), _NAN)
    return found.float()


argmax_in_target = peak_in_mask  # its usual name for attention maps


def roc_auc(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Probability that a target column scores above another column, a tie counting one half.

    Exact, from ranks: `sklearn.metrics.roc_auc_score(target[n], scores[n])` of every row.

    Args:
        scores: [N, C] float, attention or contributions.
        target: [N, C] bool.
        valid: [N, C] bool; None: all.

    Returns:
        [N] fp32; NaN for a row in which no column, or every column, is a target, or with a NaN
        score.

    Raises:
        ValueError: shapes that differ, or other than two dimensions.
        TypeError: a target or valid that is not bool.

    Source: SMAM's evaluation (CVPR 2026), on contributions (C1).
    """
    scores, target, valid = _columns(scores, target, valid)
    undefined = (scores.isnan() & valid).any(-1)
    scores = scores.masked_fill(~valid, torch.inf).contiguous()
    ordered = scores.sort(-1).values
    columns = valid.sum(-1, keepdim=True)  # [N, 1]
    below = torch.searchsorted(ordered, scores)
    up_to = torch.minimum(torch.searchsorted(ordered, scores, right=True), columns)
    rank = (below + up_to + 1) / 2.0  # [N, C] from 1, the mean over ties
    positive = target.sum(-1).double()
    negative = columns[:, 0] - positive
    wins = rank.double().masked_fill(~target, 0.0).sum(-1) - positive * (positive + 1) / 2
    area = wins / (positive * negative)  # 0 / 0 is NaN
    return area.masked_fill(undefined, _NAN).float()


def _sums(scores: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """[N] each: the sum of the scores on the target, and of all valid ones (NaN if that is 0)."""
    everywhere = scores.masked_fill(~valid, 0.0).sum(-1)
    on_target = scores.masked_fill(~target, 0.0).sum(-1)
    return on_target, everywhere.masked_fill(everywhere == 0, _NAN)


def attention_ratio(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean score of the target columns over the mean score of all columns; 1 is indifference.

    Equals `scores[target].mean() / scores[valid].mean()` row by row.

    Args:
        scores: [N, C] float >= 0, attention.
        target: [N, C] bool.
        valid: [N, C] bool; None: all.

    Returns:
        [N] fp32; NaN for a row without a target column, or whose scores are all 0.

    Raises:
        ValueError: shapes that differ, or other than two dimensions.
        TypeError: a target or valid that is not bool.

    Source: KLAL's evaluation (arXiv 2511.12738): it must exceed 1.
    """
    scores, target, valid = _columns(scores, target, valid)
    on_target, everywhere = _sums(scores, target, valid)
    return ((on_target / target.sum(-1)) / (everywhere / valid.sum(-1))).float()


def mass_on_target(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of the row's score that lies on the target columns.

    Equals `scores[target].sum() / scores[valid].sum()` row by row.

    Args:
        scores, target, valid: as in `attention_ratio`.

    Returns:
        [N] fp32 in [0, 1]; NaN for a row without a target column, or whose scores are all 0.

    Raises:
        ValueError, TypeError: as `attention_ratio`.

    Source: KLAL's evaluation (arXiv 2511.12738).
    """
    scores, target, valid = _columns(scores, target, valid)
    on_target, everywhere = _sums(scores, target, valid)
    return (on_target / everywhere).masked_fill(~target.any(-1), _NAN).float()


def label_hits(top_ids: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """How many rows have their target among the k likeliest labels, for each k: the counts of top-k
    accuracies, which are divided by `(target != ignore_index).sum()`.

    Args:
        top_ids: int64 [..., K], `top_ids` of `linear_cross_entropy`, or its `predicted[..., None]`.
        target: int64 [...].
        ignore_index: marks rows that count for nothing.

    Returns:
        int64 [K]: the hits among the first 1, 2, ... K.

    Raises:
        ValueError: shapes that do not match.
    """
    shape = list(top_ids.shape[:-1])
    got = list(target.shape)
    require(top_ids.dim() > 0 and shape == got, "target", f"top_ids' shape {shape}", got)
    counted = (target != ignore_index)[..., None]
    hits = (top_ids == target[..., None]) & counted
    return hits.reshape(-1, top_ids.shape[-1]).sum(0).cumsum(0)


def map_point(scores: Tensor, rects: Tensor, *, share: float = 0.3) -> Tensor:
    """Where a map points: the weighted mean of the centres of the region around its peak.

    The region is what of the columns above `share` times the maximum hangs together with the peak
    by common edges; of equal peaks the first counts.

    Args:
        scores: [C] float >= 0, attention.
        rects: [C, 4] float (x0, y0, x1, y1), the place of each column; one without area is left
            out.
        share: of the maximum, in [0, 1).

    Returns:
        [2] fp64 (x, y) in the unit of `rects`; NaN if no column with a place scores above 0.

    Raises:
        ValueError: shapes that do not match, or a share out of range.

    Source: GUI-AIMA (arXiv 2511.00810), its inference.
    """
    count = len(scores) if scores.dim() == 1 else None
    require(count is not None, "scores", "a [C] tensor", list(scores.shape))
    got = list(rects.shape)
    require(got == [count, 4], "rects", f"shape [{count}, 4], one for each score", got)
    require(0.0 <= share < 1.0, "share", "a number in [0, 1)", share)
    rects, scores = rects.double(), scores.detach().double()
    size = rects[:, 2:] - rects[:, :2]
    scores = scores.masked_fill(~(size > 0).all(1), 0.0)
    if not bool((scores > 0).any()):
        return rects.new_full((2,), _NAN)
    kept = (scores > share * scores.max()).nonzero()[:, 0]
    rects, scores = rects[kept], scores[kept]
    reached = hanging_together(rects, scores.argmax())
    weight = scores.masked_fill(~reached, 0.0)[:, None]
    return (weight * (rects[:, :2] + rects[:, 2:]) / 2).sum(0) / weight.sum()


def attention_reward(
    maps: Tensor,
    inside: Tensor,
    valid: Tensor,
    counted: Tensor | None = None,
    *,
    eps: float = 1e-8,
) -> Tensor:
    """`tanh(log(a / v))`: attention of a visual token on the evidence against one of the image.

    Equals `(a ** 2 - v ** 2) / (a ** 2 + v ** 2)` with a the mean of `maps` over counted rows and
    tokens inside, v that over counted rows and all tokens.

    Args:
        maps: [B, R, C] >= 0, attention of R rows of each completion, of any scale that its rows
            share.
        inside: bool [B, C], the tokens of the evidence.
        valid: bool [B, C], the tokens that exist.
        counted: bool [B, R], the rows that count; None: all.
        eps: added to a and v.

    Returns:
        [B] fp32 in [-1, 1], without a gradient; 0 for a completion without counted rows, without
        evidence or without an image.

    Raises:
        ValueError: shapes that do not agree.

    Source: SAYO (arXiv 2602.08241), (R4).
    """
    batch, rows, columns = maps.shape
    for name, x in (("inside", inside), ("valid", valid)):
        require(x.shape == (batch, columns), name, f"shape {[batch, columns]}", list(x.shape))
    if counted is None:
        counted = torch.ones(batch, rows, dtype=torch.bool, device=maps.device)
    require(counted.shape == (batch, rows), "counted", f"shape {[batch, rows]}", counted.shape)
    each = maps.detach().float().masked_fill(~counted[..., None], 0.0).sum(1)  # [B, C]
    inside = inside & valid
    a, v = (
        each.masked_fill(~of, 0.0).sum(1) / (of.sum(1) * counted.sum(1)).clamp(min=1)
        for of in (inside, valid)
    )
    found = torch.tanh(torch.log((a + eps) / (v + eps)))
    known = inside.any(1) & counted.any(1)
    return torch.where(known, found, 0.0)


def high_entropy(entropy: Tensor, counted: Tensor, share: float) -> Tensor:
    """The rows of each completion whose next token is least certain.

    Args:
        entropy: [B, R] float.
        counted: bool [B, R], the rows that exist.
        share: of them, in (0, 1]; at least one row of a completion that has any.

    Returns:
        bool [B, R].

    Raises:
        ValueError: a share outside (0, 1].

    Source: SAYO (arXiv 2602.08241), which takes .3.
    """
    require(0.0 < share <= 1.0, "share", "a number in (0, 1]", share)
    order = entropy.masked_fill(~counted, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    most = (counted.sum(1, keepdim=True) * share).floor().clamp(min=1)
    return (rank < most) & counted
