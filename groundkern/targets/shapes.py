"""How much of each rectangle boxes, points, polygons, lines and rasters cover.

Exact areas in fp64; what rectangles and shapes are, `groundkern.maps` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.rasters import Raster
from groundkern.targets.areas import covered

_CLEARLY_COVERED = 0.01  # share of a token below which a shape merely grazes it

Coordinates = Sequence[Any] | Tensor  # rows of numbers


class Shapes(NamedTuple):
    """Shapes whose union is the target."""

    boxes: Coordinates  # [m, 4]
    points: Coordinates  # [m, 2]
    polygons: Sequence[Coordinates]  # of [k, 2]
    polylines: Sequence[Coordinates]  # of [k, 2]
    rasters: Sequence[Raster]


def rows_of(name: str, values: Coordinates, width: int) -> Tensor:
    """Coordinates as rows of numbers.

    Args:
        name: what an error calls them.
        values: [m, width] float, or nothing.
        width: numbers of a row.

    Returns:
        [m, width] fp64.

    Raises:
        ValueError: another shape.
    """
    rows = torch.as_tensor(values, dtype=torch.float64)
    rows = rows.reshape(0, width) if rows.numel() == 0 else rows
    require(
        rows.dim() == 2 and rows.shape[1] == width, name, f"shape [*, {width}]", list(rows.shape)
    )
    return rows


def area_of(rects: Tensor) -> Tensor:
    """The area of each rectangle; 0 for one that is turned inside out.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).

    Returns:
        [n], in the dtype of `rects`.
    """
    return (rects[:, 2] - rects[:, 0]).clamp_min(0) * (rects[:, 3] - rects[:, 1]).clamp_min(0)


def _share(covered: Tensor, rects: Tensor) -> Tensor:
    area = area_of(rects)
    return torch.where(area > 0, covered / area.clamp_min(1e-300), 0.0).clamp(0.0, 1.0)


def overlap(rects: Tensor, boxes: Coordinates) -> Tensor:
    """Share of each rectangle that each box covers.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        boxes: [m, 4] float (x0, y0, x1, y1).

    Returns:
        [m, n] fp64 in [0, 1].

    Raises:
        ValueError: another shape than [*, 4].
    """
    rects, boxes = rows_of("rects", rects, 4), rows_of("boxes", boxes, 4)
    low = torch.maximum(boxes[:, None, :2], rects[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], rects[None, :, 2:])
    return _share((high - low).clamp_min(0).prod(-1), rects)


def polygon_overlap(rects: Tensor, polygon: Coordinates) -> Tensor:
    """Share of each rectangle that a simple polygon covers.

    The area between every edge and the rectangle's floor is integrated in closed form, so concave
    polygons are exact.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        polygon: [k, 2] float, corners (x, y) in order, in either orientation, the first not
            repeated at the end.

    Returns:
        [n] fp64 in [0, 1].

    Raises:
        ValueError: another shape than [*, 4] or [*, 2].
    """
    rects, a = rows_of("rects", rects, 4), rows_of("polygon", polygon, 2)
    b = a.roll(-1, 0)  # edges a -> b, [k, 2]
    x0, y0, x1, y1 = rects[:, :, None].unbind(1)  # [n, 1]
    (ax, ay), (bx, by) = a.unbind(1), b.unbind(1)  # [k]
    upright = (bx - ax).abs() < 1e-100  # a smaller run overflows in the slope
    run = torch.where(upright, 1.0, bx - ax)
    slope = (by - ay) / run
    left = torch.minimum(torch.maximum(ax, x0), x1)  # [n, k] the edge between the rectangle's sides
    right = torch.minimum(torch.maximum(bx, x0), x1)
    ya, yb = ay + slope * (left - ax), ay + slope * (right - ax)

    def integral(y: Tensor) -> Tensor:  # of clamp(y, y0, y1) - y0
        inner = torch.minimum(torch.maximum(y, y0), y1) - y0
        return inner * inner / 2 + (y - y1).clamp_min(0) * (y1 - y0)

    rise = yb - ya
    flat = rise.abs() < 1e-9
    middle = torch.minimum(torch.maximum((ya + yb) / 2, y0), y1) - y0
    height = torch.where(flat, middle, (integral(yb) - integral(ya)) / torch.where(flat, 1.0, rise))
    covered = torch.where(upright, 0.0, height * (right - left)).sum(-1).abs()
    return _share(covered, rects)


def raster_overlap(rects: Tensor, raster: Raster) -> Tensor:
    """Share of each rectangle that a mask covers; of a heat, its mean there over its peak.

    Exact, whether or not the edges of rectangles fall on those of pixels (`areas.covered`).

    Args:
        rects: [n, 4] float (x0, y0, x1, y1), in fractions of the image.
        raster: a mask or a heat over the whole image.

    Returns:
        [n] fp64 in [0, 1].

    Raises:
        ValueError: another shape than [*, 4].
    """
    rects = rows_of("rects", rects, 4)
    solid = (area_of(rects) > 0)[:, None]
    inside = covered(raster.values, torch.where(solid, rects, 0.0))
    return _share(inside / raster.most, rects)


def contains(rects: Tensor, points: Coordinates) -> Tensor:
    """Which rectangle each point lies in.

    A point on a shared edge belongs to the right or lower rectangle; on the last edge, to the last
    rectangle.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        points: [m, 2] float (x, y).

    Returns:
        [m, n] bool.

    Raises:
        ValueError: another shape than [*, 4] or [*, 2].
    """
    rects, points = rows_of("rects", rects, 4), rows_of("points", points, 2)
    low, high, p = rects[None, :, :2], rects[None, :, 2:], points[:, None]
    solid = area_of(rects) > 0
    held = ((low <= p) & (p <= high)).all(-1) & solid
    for axis in (0, 1):  # one at a time: the last edge in y may cross a shared edge in x
        half_open = held & (p < high)[..., axis]
        held = torch.where(half_open.any(-1, keepdim=True), half_open, held)
    return held


def polyline_length(rects: Tensor, polyline: Coordinates) -> Tensor:
    """How much of a line of straight segments runs through each rectangle.

    Measured in the rectangle's own width and height: a line straight across it has length 1, its
    diagonal sqrt(2). A segment along an edge counts for the rectangles on both sides of it.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        polyline: [k, 2] float, vertices (x, y) in order, k >= 2.

    Returns:
        [n] fp64 >= 0; 0 for a rectangle without area.

    Raises:
        ValueError: another shape than [*, 4] or [*, 2].
    """
    rects, vertices = rows_of("rects", rects, 4), rows_of("polyline", polyline, 2)
    solid = area_of(rects) > 0
    size = torch.where(solid[:, None], rects[:, 2:] - rects[:, :2], 1.0)[:, None]  # [n, 1, 2]
    local = (vertices - rects[:, None, :2]) / size  # [n, k, 2], the rectangle is the unit square
    start, run = local[:, :-1], local.diff(dim=1)
    still = run == 0
    safe = torch.where(still, 1.0, run)
    first, second = -start / safe, (1 - start) / safe  # where the segment meets the sides
    outside = still & ((start < 0) | (start > 1))
    enter = torch.where(still, 0.0, torch.minimum(first, second)).amax(-1).clamp_min(0)
    leave = torch.where(still, 1.0, torch.maximum(first, second)).amin(-1).clamp_max(1)
    part = torch.where(outside.any(-1), 0.0, (leave - enter).clamp_min(0))
    return (part * run.norm(dim=-1)).sum(-1) * solid


def shares_of(rects: Tensor, shapes: Shapes) -> Tensor:
    """The share of each rectangle that each shape covers; a point fills its rectangle, and so does
    a line that runs through it for its width or height.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        shapes: m of them.

    Returns:
        [m, n] fp64 in [0, 1].

    Raises:
        ValueError: rectangles or shapes of another width.
    """
    parts = [overlap(rects, shapes.boxes), contains(rects, shapes.points).double()]
    parts += [polygon_overlap(rects, polygon)[None] for polygon in shapes.polygons]
    parts += [polyline_length(rects, line)[None].clamp_max(1) for line in shapes.polylines]
    parts += [raster_overlap(rects, raster)[None] for raster in shapes.rasters]
    return torch.cat(parts)


def clearly(shares: Tensor) -> Tensor:
    """Where a shape covers a hundredth, or is too small for that and covers most.

    Args:
        shares: [m, n] fp64, see `shares_of`.

    Returns:
        [n] bool.
    """
    if shares.shape[0] == 0 or shares.shape[1] == 0:
        return shares.new_zeros(shares.shape[1], dtype=torch.bool)
    most = shares.amax(-1, keepdim=True)
    enough = (most / 2).clamp_max(_CLEARLY_COVERED)
    return ((shares >= enough) & (most > 1e-12)).any(0)
