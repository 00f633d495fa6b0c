"""Losses on the mass that an attention map has on its target, wherever on it."""

from __future__ import annotations

import torch
from torch import Tensor

from groundkern.checks import require


def divided_by_sum(attention: Tensor) -> Tensor:
    """A map over its sum; of a map that is 0, or too small to divide, there is no gradient.

    Args:
        attention: [..., C] fp32 or fp64 >= 0.

    Returns:
        [..., C]; the gradient of what lies below 1e-31 (in fp32) in all would be beyond fp32.
    """
    finfo = torch.finfo(attention.dtype)
    total = attention.sum(-1, keepdim=True)
    shares = attention / total.clamp_min(finfo.tiny)
    return torch.where(total >= finfo.tiny / finfo.eps, shares, shares.detach())


def mass_loss(
    target: Tensor, attention: Tensor, *, squared: bool = False, renormalise: bool = False
) -> Tensor:
    """How much of an attention map misses its target: -log of the mass on it, or (1 - mass)^2.

    Equals `-(target / target.amax(-1) * attention).sum(-1).log()`; a column of half the highest
    target counts with half of its attention. The logarithm is finite down to the smallest normal
    number, below which there is no gradient.

    Args:
        target: [..., C] float >= 0, of any scale; no gradient. A row that is 0 everywhere has no
            target: its loss and gradient are 0.
        attention: [..., C] float >= 0, differentiable.
        squared: `(1 - mass) ** 2` instead of `-mass.log()`.
        renormalise: divide `attention` by its sum first, so that the mass is a share of the map.

    Returns:
        [...] fp32, "-log" in nats.

    Raises:
        ValueError: the two shapes differ.

    Source: GuidedVLA (arXiv 2605.12369) and, squared and renormalised, A3Tune (arXiv 2505.18503),
        (G4).
    """
    shapes = list(target.shape), list(attention.shape)
    require(shapes[0] == shapes[1], "attention", f"the shape of `target`, {shapes[0]}", shapes[1])
    attention = attention if attention.dtype == torch.float64 else attention.float()
    target = target.detach().to(attention.dtype)
    if target.shape[-1] == 0:
        return attention.sum(-1)
    tiny = torch.finfo(attention.dtype).tiny
    most = target.amax(-1, keepdim=True)
    weight = target / most.clamp_min(tiny)
    if squared:
        part = divided_by_sum(attention) if renormalise else attention
        rows = (1.0 - (weight * part).sum(-1)).square()
    else:
        rows = -(weight * attention).sum(-1).clamp_min(tiny).log()
        if renormalise:
            rows = rows + attention.sum(-1).clamp_min(tiny).log()
    return torch.where(most[..., 0] > 0, rows, torch.zeros_like(rows))
