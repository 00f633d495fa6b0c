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


def value(q: Tensor, p: Tensor, terms: Terms) -> Tensor:
    """[n]: the divergence of Q from P (K5)."""
    if terms.kind == "kl":
        return (p * log_ratio(p, q)).sum(1)
    if terms.kind == "reverse_kl":
        return (q * log_ratio(q, p)).sum(1)
    beta = terms.beta
    m = _between(p, q, beta)
    rows = beta * (p * log_ratio(p, m)).sum(1) + (1.0 - beta) * (q * log_ratio(q, m)).sum(1)
    return rows - (1.0 - beta) * math.log1p(-beta) * (terms.rest - q.sum(1))


def gradient(q: Tensor, p: Tensor, terms: Terms) -> Tensor:
    """[n, C]: that of `value` in Q."""
    if terms.kind == "kl":
        return -p / q.clamp_min(torch.finfo(q.dtype).tiny)
    if terms.kind == "reverse_kl":
        return log_ratio(q, p).add_(1.0)
    beta = terms.beta
    log_q_m = log_ratio(q, _between(p, q, beta))
    return log_q_m.add_(math.log1p(-beta)).mul_(1.0 - beta)


def _between(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """M = beta P + (1 - beta) Q, exactly Q where P is Q."""
    return q + beta * (p - q)


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """log(a / b) of numbers >= 0, finite, and with all digits where they are alike."""
    finfo = torch.finfo(a.dtype)
    b = b.clamp_min(finfo.tiny)
    far = (a / b).clamp_(finfo.tiny, finfo.max).log_()
    near = (a - b).div_(b)
    return torch.where(near.abs() < 0.5, near.log1p_(), far)
