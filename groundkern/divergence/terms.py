"""Divergences of maps [n, C] from targets, and their gradients in closed form (K5).

P is 0 off a row's own columns, and so is Q; both are what the row's sums run over.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """Which divergence of (K5).

    Args:
        kind: "kl" | "reverse_kl" | "js".
        beta: of "js".
        rest: 1, or 0 where another rank adds what "js" counts off the columns.
    """

    kind: str
    beta: float
    rest: float = 1.0


def value(q: Tensor, p: Tensor, terms: Terms, total: Tensor | None = None) -> Tensor:
    """[n]: the divergence of Q from P (K5).

    Args:
        q, p: [n, C].
        terms: which.
        total: [n], the sums of Q, if they are known to be 1 (or 0). Then terms are summed as
            a log(a / b) - a + b: what is added is 0 in sum, and an error of a map no longer reaches
            the divergence in first order.
    """
    if terms.kind == "kl":
        return _sum(p, q, total)
    if terms.kind == "reverse_kl":
        return _sum(q, p, total)
    beta = terms.beta
    rows = -beta * _log_mixture(p, q, 1.0 - beta).mul_(p).sum(1)
    rows -= (1.0 - beta) * _log_mixture(q, p, beta).mul_(q).sum(1)
    total = q.sum(1) if total is None else total
    return rows - (1.0 - beta) * math.log1p(-beta) * (terms.rest - total)


def _sum(a: Tensor, b: Tensor, even: Tensor | None) -> Tensor:
    """[n]: sum a log(a / b), less a - b in rows [n] where `even` is 1."""
    terms = _log_ratio(a, b).mul_(a)
    return (terms if even is None else terms.sub_((a - b).mul_(even[:, None]))).sum(1)


def gradient(q: Tensor, p: Tensor, terms: Terms) -> Tensor:
    """[n, C]: that of `value` in Q."""
    if terms.kind == "kl":
        return -p / q.clamp_min(torch.finfo(q.dtype).tiny)
    if terms.kind == "reverse_kl":
        return _log_ratio(q, p).add_(1.0)
    beta = terms.beta
    return _log_mixture(q, p, beta).sub_(math.log1p(-beta)).mul_(beta - 1.0)


def _log_mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """log(((1 - share) a + share b) / a), finite, and with all digits where a and b are alike."""
    finfo = torch.finfo(a.dtype)
    return (b - a).div_(a.clamp_min(finfo.tiny)).clamp_(max=finfo.max).mul_(share).log1p_()


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b) of numbers >= 0, finite, and with all digits where they are alike."""
    finfo = torch.finfo(a.dtype)
    b = b.clamp_min(finfo.tiny)
    far = (a / b).clamp_(finfo.tiny, finfo.max).log_()
    near = (a - b).div_(b)
    return torch.where(near.abs() < 0.5, near.log1p_(), far)
