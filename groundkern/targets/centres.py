"""Bells about the centres of shapes, by which GUI-AIMA weighs how much of a token they cover."""

from __future__ import annotations

import torch
from torch import Tensor

_NARROWEST = 0.02  # of a token's side: a narrower bell would be 0 at every token's centre


def centred(rects: Tensor, shares: Tensor, bounds: Tensor, sigma: float) -> Tensor:
    """The highest of the shapes' values: the share that a shape covers of a rectangle, times a bell
    about the centre of the box around the shape.

    Args:
        rects: [n, 4] fp64 (x0, y0, x1, y1), of a rectangle for each visual token.
        shares: [m, n] fp64, the share of each rectangle that each shape covers.
        bounds: [m, 4] fp64, the box around each shape.
        sigma: the bell's standard deviation over the sides of that box; a fiftieth of the
            rectangle's side at least.

    Returns:
        [n] fp64 >= 0.

    Source: GUI-AIMA (arXiv 2511.00810), (G3).
    """
    low, high, box = rects[:, :2], rects[:, 2:], bounds[:, None]
    width = torch.maximum(sigma * (box[..., 2:] - box[..., :2]), _NARROWEST * (high - low))
    away = (low + high) / 2 - (box[..., :2] + box[..., 2:]) / 2  # [m, n, 2]
    bell = torch.exp(-0.5 * (away / width.clamp_min(1e-12)).square().sum(-1))
    return (shares * bell).amax(0)
