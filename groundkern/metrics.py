"""How well a map over visual tokens finds its target: one number per row.

Everything takes `scores` [N, C], a bool `target` [N, C] and optionally a bool `valid` [N, C]
(columns that exist; the others take part in nothing), and returns [N] fp32. **A row for which a
number is not defined gets NaN**, so average with `torch.nanmean`. Sums run in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.checks import fail, require

_NAN = float("nan")


def _columns(scores: Tensor, target: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
    """1 where the highest score lies on the target, 0 where it does not.

    When several columns share the highest score it is the fraction of them on the target (what
    choosing one at random gives), so a constant map earns no luck from the order of its columns.

    Args:
        scores: [N, C] attention or contribution.
        target: [N, C] bool.
        valid: [N, C] bool, None: all.

    Returns:
        [N] fp32; NaN for a row without a target column.
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
    """Probability that a target column scores above another one, ties counting one half (exact,
    from ranks).

    Args:
        scores: [N, C] attention or contribution.
        target: [N, C] bool.
        valid: [N, C] bool, None: all.

    Returns:
        [N] fp32; NaN for a row in which no column, or every column, is a target, or with a NaN
        score.
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


def attention_ratio(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean score of the target columns over the mean score of all columns; 1 is indifference.

    Args:
        scores: [N, C] attention, >= 0.
        target: [N, C] bool.
        valid: [N, C] bool, None: all.

    Returns:
        [N] fp32; NaN for a row without a target column, or without any score.
    """
    scores, target, valid = _columns(scores, target, valid)
    on_target = scores.masked_fill(~target, 0.0).sum(-1) / target.sum(-1)
    everywhere = scores.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1)
    return (on_target / everywhere).masked_fill(everywhere == 0, _NAN).float()


def mass_on_target(scores: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of the row's score that lies on the target columns.

    Args:
        scores: [N, C] attention, >= 0.
        target: [N, C] bool.
        valid: [N, C] bool, None: all.

    Returns:
        [N] fp32 in [0, 1]; NaN for a row without a target column, or without any score.
    """
    scores, target, valid = _columns(scores, target, valid)
    everywhere = scores.masked_fill(~valid, 0.0).sum(-1)
    share = scores.masked_fill(~target, 0.0).sum(-1) / everywhere
    return share.masked_fill(~target.any(-1) | (everywhere == 0), _NAN).float()
