"""Points with a spread: normal distributions about them, integrated over visual tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.targets.shapes import Coordinates, area_of, rows_of

LEAST = 0.01
"""Of a bell: with less of it on the visual tokens it falls on none of them."""

_HALF = math.sqrt(2 * math.log(2))  # standard deviations at which a bell has half of its height
_CORNERS = 64


def bell_mass(rects: Tensor, bells: Coordinates) -> Tensor:
    """How each bell is distributed over the rectangles.

    The bell of a point (x, y) is the normal density with standard deviations sx and sy. Its
    integral over a rectangle is a product of two differences of erf, so nothing is sampled.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        bells: [m, 4] float (x, y, sx, sy), sx and sy > 0.

    Returns:
        [m, n] fp64; each row sums to 1, or is 0 where less than `LEAST` of the bell is on the
        rectangles.

    Raises:
        ValueError: another shape than [*, 4], or a spread that is not above 0.

    Source: G_sigma about a fixation, each point's map divided by its sum (arXiv 2510.21356, where
        it is sampled at pixels).
    """
    rects, bells = rows_of("rects", rects, 4), _checked(bells)
    mass = _along(rects, bells, 0) * _along(rects, bells, 1)
    mass = torch.where(area_of(rects) > 0, mass, 0.0)
    total = mass.sum(-1, keepdim=True)
    return torch.where(total >= LEAST, mass / total.clamp_min(LEAST), 0.0)


def _along(rects: Tensor, bells: Tensor, axis: int) -> Tensor:
    """[m, n] >= 0: how much of each bell lies between the sides of each rectangle in x or in y."""
    sides = torch.cat([rects[:, axis], rects[:, 2 + axis]])
    edges, at = sides.unique(return_inverse=True)  # a grid has few, and erf takes most of the time
    middle, spread = bells[:, axis, None], bells[:, 2 + axis, None]
    reached = torch.erf((edges - middle) / (spread * math.sqrt(2)))  # [m, edges]
    low, high = at.view(2, len(rects))
    return ((reached[:, high] - reached[:, low]) / 2).clamp_min(0)


def outlines_of(bells: Coordinates) -> list[Tensor]:
    """Where each bell has half of its height or more, as a polygon.

    Args:
        bells: [m, 4] float (x, y, sx, sy), sx and sy > 0.

    Returns:
        [64, 2] fp64 for each: corners on its ellipse, at most 0.12 % of the radius inside.

    Raises:
        ValueError: as `bell_mass`.
    """
    bells = _checked(bells)
    angle = torch.arange(_CORNERS, dtype=torch.float64) * (2 * math.pi / _CORNERS)
    circle = torch.stack([angle.cos(), angle.sin()], -1) * _HALF
    return list(bells[:, None, :2] + bells[:, None, 2:] * circle)


def _checked(bells: Coordinates) -> Tensor:
    rows = rows_of("bells", bells, 4)
    require(bool((rows[:, 2:] > 0).all()), "bells", "spreads above 0", rows[:, 2:].tolist())
    return rows
