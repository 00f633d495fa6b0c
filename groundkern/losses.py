"""Losses on what the ops return: log probabilities, cross-entropy rows, attention maps.

Every function is a few lines of torch on per-row values, in fp32 (fp64 input stays fp64). Rows are
returned as they are: which rows count, and what their sum is divided by, is the caller's knowledge
(padding, gradient accumulation); `mean_rows` is the usual answer. Equation numbers are those of
METHODS.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundkern.checks import require


class SmamLoss(NamedTuple):
    """Per row: `total = gamma * grounding + alpha * cross_entropy`."""

    total: Tensor  # [...]
    grounding: Tensor  # [...] L_G
    cross_entropy: Tensor  # [...] L_CE+


class DvSftLoss(NamedTuple):
    """Scalars: `total = text + weight * word`."""

    total: Tensor
    text: Tensor
    word: Tensor


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
    rows: Tensor, counted: Tensor | None = None, *, denominator: Tensor | float | None = None
) -> Tensor:
    """Mean of the counted rows; 0, with a zero gradient, when there are none.

    Equals `rows[counted].sum() / denominator` without a host sync; rows that are not counted may
    hold anything.

    Args:
        rows: [...] per-row losses.
        counted: bool, broadcastable to `rows`; None counts all.
        denominator: what to divide by, for example the number of rows of a whole accumulated batch;
            None: the number of counted rows. 0 gives 0.

    Returns:
        Scalar.
    """
    if counted is None:
        counted = torch.ones((), dtype=torch.bool, device=rows.device)
    counted = counted.expand(rows.shape)
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
        log_prob: [...] log pi[w_t], of the ordinary forward pass.
        side_log_prob: [...] log pi+[w_t], of the pass that sees only the token's regions.
        beta, alpha, gamma: the paper's weights; gamma 2.0 for LLaVA, 0.5 for Qwen. No gradient
            pushes pi+ down exactly when gamma * beta / 2 <= alpha (at pi = pi+).
        detach_reference: stop the gradient of (S4) towards pi+. (S3) still trains it.

    Returns:
        SmamLoss of [...] fp32 rows.

    Source: phrase-grounding-aware SFT (CVPR 2026), METHODS.md section 1.
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

    Equals `-((1 - b) * log_prob + b * other_log_prob)` with b = smoothing, or 0 where there is no
    other label. `groundkern.linear_cross_entropy(..., bags=, smoothing=)` computes the same from
    hidden states; this form is for log probabilities that are already there.

    Args:
        log_prob: [...] log p_i(w_i).
        other_log_prob: [...] mean of log p_i(y) over the image's other labels; anything where there
            are none.
        has_others: [...] bool, whether the image has another label.
        smoothing: b.

    Returns:
        [...] fp32 rows.

    Source: arXiv 2605.26656 (D3).
    """
    _same_shape("other_log_prob", other_log_prob, "log_prob", log_prob)
    _same_shape("has_others", has_others, "log_prob", log_prob)
    require(0.0 <= smoothing < 1.0, "smoothing", "a number in [0, 1)", smoothing)
    log_prob = _at_least_fp32(log_prob)
    other_log_prob = _at_least_fp32(other_log_prob).masked_fill(~has_others, 0.0)
    smoothed = (1.0 - smoothing) * log_prob + smoothing * other_log_prob
    return -torch.where(has_others, smoothed, log_prob)


def dv_sft(
    text_rows: Tensor,
    word_rows: Tensor,
    *,
    text_counted: Tensor | None = None,
    word_counted: Tensor | None = None,
    weight: float = 2e-3,
) -> DvSftLoss:
    """DV-SFT's objective from cross-entropy rows: answer tokens and labelled visual tokens.

    Equals `text_rows.mean() + weight * word_rows.mean()` over the counted rows; a set without rows
    gives 0.

    Args:
        text_rows: [...] cross entropy of answer tokens (D1).
        word_rows: [...] cross entropy of labelled visual tokens (D3).
        text_counted, word_counted: bool masks of the rows that count; None: all.
        weight: lambda of (D4).

    Returns:
        DvSftLoss of fp32 scalars.

    Source: arXiv 2605.26656 (D1), (D3), (D4).
    """
    text = mean_rows(_at_least_fp32(text_rows), text_counted)  # (D1)
    word = mean_rows(_at_least_fp32(word_rows), word_counted)  # (D3)
    return DvSftLoss(text + weight * word, text, word)  # (D4)


def map_kl(target: Tensor, attention: Tensor, *, renormalise: bool = False) -> Tensor:
    """KL(P || Q) of a target map against a differentiable attention map.

    Equals `(P * (P.log() - attention.log())).sum(-1)` with `P = target / target.sum(-1)`. It is
    finite everywhere: attention below the smallest normal number counts as that number, without a
        gradient. From q and k,
    `groundkern.attention_kl` computes it in log space.

    Args:
        target: [..., C] >= 0, of any scale; no gradient. A row that sums to 0 has no target: loss
            and gradient 0.
        attention: [..., C] >= 0, for example of `groundkern.attention_map`.
        renormalise: divide `attention` by its sum first (normalise after the head mean).

    Returns:
        [...] fp32.

    Source: arXiv 2511.12738 (K3), one layer's term.
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


def klal(kl: Tensor, owns_map: Tensor) -> Tensor:
    """KLAL: the mean of per-layer, per-row KL over the layers and rows that have a target.

    Equals `kl[owns_map].mean()`; 0 when no row owns a map.

    Args:
        kl: [L, N] or [N], for example of `groundkern.attention_kl`, one row of it per layer.
        owns_map: bool, [N] or [L, N]: rows (of a layer) with a target column that they see.

    Returns:
        Scalar; the objective is `L_NTP + weight * klal` with weight 1 (K4).

    Source: arXiv 2511.12738 (K3).
    """
    return mean_rows(_at_least_fp32(kl), owns_map)


def composition(
    whole: Tensor, first: Tensor, second: Tensor, *, detach_parts: bool = False
) -> Tensor:
    """How far the map of "p1 and p2" is from the sum of the maps of p1 and p2.

    Equals `(whole - (first + second)).norm(dim=-1)`; the gradient is 0 where they agree exactly.

    Args:
        whole, first, second: [..., C] maps of the composite and of its two phrases.
        detach_parts: let only the composite learn.

    Returns:
        [...] fp32.

    Source: arXiv 2412.08110 (H3).
    """
    _same_shape("first", first, "whole", whole)
    _same_shape("second", second, "whole", whole)
    parts = _at_least_fp32(first) + _at_least_fp32(second)
    difference = _at_least_fp32(whole) - (parts.detach() if detach_parts else parts)
    return torch.linalg.vector_norm(difference, dim=-1)
