"""Turned boxes, circles and ellipses as polygons, cut at the edge of their image."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = Sequence[float]

# Of an ellipse. Its corners are on the curve; between them the polygon is at most
# 1 - cos(pi / 64) = 0.12 % of the radius inside it, and its area is 0.16 % smaller.
CORNERS = 64


def turned(points: Sequence[Point], degrees: float, about: Point) -> list[list[float]]:
    """Points turned clockwise (y runs down) about another.

    Args:
        points: in units in which x and y have the same length.
        degrees: how far.
        about: what stays where it is.
    """
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    away = [(x - about[0], y - about[1]) for x, y in points]
    found = [[about[0] + x * cos - y * sin, about[1] + x * sin + y * cos] for x, y in away]
    return [[round(value, 9) for value in point] for point in found]  # at the edge is inside


def corners(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    """Of a box, clockwise from the top left."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def ellipse(x: float, y: float, rx: float, ry: float) -> list[list[float]]:
    """`CORNERS` points of an ellipse about (x, y); a circle has two equal radii."""
    steps = [2 * math.pi * i / CORNERS for i in range(CORNERS)]
    return [[x + rx * math.cos(step), y + ry * math.sin(step)] for step in steps]


def clipped(points: Sequence[Point], width: float, height: float) -> list[list[float]]:
    """A convex polygon's part within [0, width] x [0, height]; empty if there is none.

    Source: Sutherland and Hodgman, Reentrant polygon clipping, 1974.
    """
    found = [list(point) for point in points]
    for axis, edge, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        kept: list[list[float]] = []
        for before, here in zip(found[-1:] + found[:-1], found, strict=True):
            inside = [sign * (point[axis] - edge) for point in (before, here)]
            if inside[0] * inside[1] < 0:  # the side crosses the edge
                share = inside[0] / (inside[0] - inside[1])
                crossing = [b + (h - b) * share for b, h in zip(before, here, strict=True)]
                crossing[axis] = edge
                kept.append(crossing)
            if inside[1] >= 0:
                kept.append(here)
        found = kept
    return found
