"""Target maps: which visual tokens a box, point, line, polygon or mask falls on, how strongly.

A visual token is a rectangle `(x0, y0, x1, y1)` of the image and a map is one number per rectangle,
so a plain grid (`patch_grid`), a center-cropped one and a pyramid of tiles are treated alike.
Rectangles and shapes share one coordinate system, any unit (`groundkern.hf` uses fractions of the
original image; beside rasters, which cover the unit square, it must be these). A rectangle without
area, such as (-1, -1, -1, -1), is a token without a place: nothing falls on it. Areas are exact and
computed in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern.areas import covered
from groundkern.bells import centred
from groundkern.checks import fail, require
from groundkern.rasters import Raster

FIXED_POINT_ONE = 1 << 20
"""The integer that `quantise` stores for a map's maximum."""

_CLEARLY_COVERED = 0.01  # share of a token below which a shape merely grazes it

Coordinates = Sequence | Tensor  # rows of numbers


class _Shapes(NamedTuple):
    """Shapes whose union is the target."""

    boxes: Coordinates  # [m, 4]
    points: Coordinates  # [m, 2]
    polygons: Sequence[Coordinates]  # of [k, 2]
    polylines: Sequence[Coordinates]  # of [k, 2]
    rasters: Sequence[Raster]


def patch_grid(height: int, width: int) -> Tensor:
    """Rectangles of a `height` x `width` grid over the unit square, row by row.

    Args:
        height, width: rows and columns of the grid.

    Returns:
        [height * width, 4] fp64 (x0, y0, x1, y1).
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    corners = torch.stack([x, y, x + 1, y + 1], -1).reshape(-1, 4).double()
    return corners / torch.tensor([width, height, width, height], dtype=torch.float64)


def _rows(name: str, values: Coordinates, width: int) -> Tensor:
    rows = torch.as_tensor(values, dtype=torch.float64)
    rows = rows.reshape(0, width) if rows.numel() == 0 else rows
    require(
        rows.dim() == 2 and rows.shape[1] == width, name, f"shape [*, {width}]", list(rows.shape)
    )
    return rows


def _area(rects: Tensor) -> Tensor:
    return (rects[:, 2] - rects[:, 0]).clamp_min(0) * (rects[:, 3] - rects[:, 1]).clamp_min(0)


def _share(covered: Tensor, rects: Tensor) -> Tensor:
    area = _area(rects)
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
    rects, boxes = _rows("rects", rects, 4), _rows("boxes", boxes, 4)
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
    rects, a = _rows("rects", rects, 4), _rows("polygon", polygon, 2)
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
    """Share of each rectangle that a mask covers; of a heat, its mean there over its maximum.

    Exact, whether or not the edges of rectangles fall on those of pixels (`areas.covered`).

    Args:
        rects: [n, 4] float (x0, y0, x1, y1), in fractions of the image.
        raster: a mask or a heat over the whole image.

    Returns:
        [n] fp64 in [0, 1].

    Raises:
        ValueError: another shape than [*, 4].
    """
    rects = _rows("rects", rects, 4)
    solid = (_area(rects) > 0)[:, None]
    inside = covered(raster.values, torch.where(solid, rects, 0.0))
    return _share(inside / float(raster.values.max()), rects)


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
    rects, points = _rows("rects", rects, 4), _rows("points", points, 2)
    low, high, p = rects[None, :, :2], rects[None, :, 2:], points[:, None]
    solid = _area(rects) > 0
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
    rects, vertices = _rows("rects", rects, 4), _rows("polyline", polyline, 2)
    solid = _area(rects) > 0
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


def _shares(rects: Tensor, shapes: _Shapes) -> Tensor:
    """[m, n]: the share of each rectangle that each shape covers; a point fills its rectangle, and
    so does a line that runs through it for its width or height."""
    parts = [overlap(rects, shapes.boxes), contains(rects, shapes.points).double()]
    parts += [polygon_overlap(rects, polygon)[None] for polygon in shapes.polygons]
    parts += [polyline_length(rects, line)[None].clamp_max(1) for line in shapes.polylines]
    parts += [raster_overlap(rects, raster)[None] for raster in shapes.rasters]
    return torch.cat(parts)


def _clearly(shares: Tensor) -> Tensor:
    """[n] bool: a shape covers a hundredth, or is too small for that and covers most here."""
    if shares.shape[0] == 0 or shares.shape[1] == 0:
        return shares.new_zeros(shares.shape[1], dtype=torch.bool)
    most = shares.amax(-1, keepdim=True)
    enough = (most / 2).clamp_max(_CLEARLY_COVERED)
    return ((shares >= enough) & (most > 1e-12)).any(0)


def inside(
    rects: Tensor,
    *,
    boxes: Coordinates = (),
    points: Coordinates = (),
    polygons: Sequence[Coordinates] = (),
    polylines: Sequence[Coordinates] = (),
    rasters: Sequence[Raster] = (),
) -> Tensor:
    """Which rectangles the union of the shapes covers.

    A shape covers a rectangle if it overlaps at least a hundredth of it (a polyline: runs through a
    hundredth of its width or height), so that an edge which grazes a patch by a rounding error does
    not count; a shape too small for that covers the rectangle it lies in.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        boxes: [m, 4] float (x0, y0, x1, y1).
        points: [m, 2] float (x, y).
        polygons, polylines: sequences of [k, 2] float (x, y).
        rasters: masks, and heats, which are a mask where they have half of their maximum or more.

    Returns:
        [n] bool.

    Raises:
        ValueError: rectangles or shapes of another width.
    """
    rects = _rows("rects", rects, 4)
    masks = [raster.mask() for raster in rasters]
    return _clearly(_shares(rects, _Shapes(boxes, points, polygons, polylines, masks)))


def _touching(rects: Tensor, target: Tensor) -> Tensor:
    """[n] bool: rectangles that touch a target rectangle, enlarged by a hundredth."""
    slack = 0.01 * (rects[:, 2:] - rects[:, :2])
    low, high = rects[:, :2] - slack, rects[:, 2:] + slack
    touch = torch.zeros_like(target)
    # 1024 at a time: a target as large as the image must not cost [n, n]
    for chunk in target.nonzero()[:, 0].split(1024):
        near = (low[chunk, None] <= rects[None, :, 2:]) & (high[chunk, None] >= rects[None, :, :2])
        touch |= near.all(-1).any(0)
    return touch & (_area(rects) > 0)


def _bounds(shapes: _Shapes, lines: Sequence[Coordinates] = ()) -> Tensor:
    """[m, 4]: the boxes around all shapes, polylines only if they are given as `lines`."""
    bounds = [_rows("boxes", shapes.boxes, 4), _rows("points", shapes.points, 2).repeat(1, 2)]
    for polygon in (*shapes.polygons, *lines):
        corners = _rows("polygon", polygon, 2)
        bounds.append(torch.cat([corners.amin(0), corners.amax(0)])[None])
    bounds += [_rows("bounds", [mask.bounds()], 4) for mask in shapes.rasters]
    return torch.cat(bounds)


def _gaussian(rects: Tensor, shapes: _Shapes) -> Tensor:
    """[n]: the highest of the shapes' bells, as wide as the shape and at least as a token; along a
    polyline, as wide as a token."""
    bounds = _bounds(shapes)[:, None]  # [m, 1, 4]
    low, high = rects[:, :2], rects[:, 2:]
    sigma = torch.maximum((bounds[..., 2:] - bounds[..., :2]) / 2, (high - low) / 2)
    sigma = sigma.clamp_min(1e-12)
    away = ((low + high) / 2 - (bounds[..., :2] + bounds[..., 2:]) / 2) / sigma  # [m, n, 2]
    squares = [away.square().sum(-1)]
    squares += [_from_line(rects, line)[None] for line in shapes.polylines]
    bell = torch.exp(-0.5 * torch.cat(squares)).amax(0)
    return bell.masked_fill(_area(rects) == 0, 0.0)


def _from_line(rects: Tensor, polyline: Coordinates) -> Tensor:
    """[n]: squared distance of each rectangle's centre from a polyline, in half rectangles."""
    vertices = _rows("polyline", polyline, 2)
    half = ((rects[:, 2:] - rects[:, :2]) / 2).clamp_min(1e-12)[:, None]
    local = (vertices - (rects[:, None, :2] + rects[:, None, 2:]) / 2) / half  # [n, k, 2]
    start, run = local[:, :-1], local.diff(dim=1)
    along = -(start * run).sum(-1) / run.square().sum(-1).clamp_min(1e-300)
    nearest = start + along.clamp(0, 1)[..., None] * run
    return nearest.square().sum(-1).amin(-1)


def target_map(
    rects: Tensor,
    *,
    kind: str = "neighbours",
    levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
    sigma: float = 0.8,
    boxes: Coordinates = (),
    points: Coordinates = (),
    polygons: Sequence[Coordinates] = (),
    polylines: Sequence[Coordinates] = (),
    rasters: Sequence[Raster] = (),
) -> Tensor:
    """The distribution over visual tokens of a map that looks at the union of the shapes.

    Args:
        rects: [n, 4] float, one rectangle per visual token. Tokens without a place get 0.
        kind: "neighbours": `levels` (a, b, c) for tokens on the target (`inside`), tokens that
            touch these, and the rest. "uniform": a on the target, c elsewhere. "overlap": the share
            of the token that is covered (along a polyline: the length that runs through it, at most
            1), 0 elsewhere. "gaussian": a bell over each shape, its standard deviation half the
            shape's width and height and at least half a token; around a polyline half a token; of a
            mask it is that of the box around it. "centre": the share that is covered times a bell
            about the centre of the shape (`bells.centred`), GUI-AIMA's target.
        sigma: of "centre": the bell's standard deviation over the sides of the box around a shape.
        levels: the triple (a, b, c), each >= 0 and a > 0.
        boxes, points, polygons, polylines: as in `inside`.
        rasters: masks, shapes like the others; and heats, which are the target themselves, of
            whatever kind: a token has the heat's mean over it. Beside shapes a heat's maximum
            counts as much as being on a shape, and the larger of the two values is taken.

    Returns:
        [n] fp32, sums to 1; all zero if the shapes fall on no token.

    Raises:
        ValueError: rectangles or shapes of another width, an unknown kind, or levels out of range.

    Source: P of KLAL's (K3) (arXiv 2511.12738; the triple is open in the paper).
    """
    how = {"kind": kind, "levels": levels, "sigma": sigma, "rasters": rasters}
    shapes = {"boxes": boxes, "points": points, "polygons": polygons, "polylines": polylines}
    values = target_values(rects, **how, **shapes)
    return (values / values.sum().clamp_min(1e-300)).float()


def target_values(
    rects: Tensor,
    *,
    kind: str = "neighbours",
    levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
    sigma: float = 0.8,
    boxes: Coordinates = (),
    points: Coordinates = (),
    polygons: Sequence[Coordinates] = (),
    polylines: Sequence[Coordinates] = (),
    rasters: Sequence[Raster] = (),
) -> Tensor:
    """`target_map` before it is divided by its sum.

    Args:
        rects, kind, levels, sigma, boxes, points, polygons, polylines, rasters: as there.

    Returns:
        [n] fp64; all zero if the shapes fall on no token.

    Raises:
        ValueError: as there.
    """
    rects = _rows("rects", rects, 4)
    good = len(levels) == 3 and min(levels) >= 0 and levels[0] > 0
    require(good, "levels", "three numbers >= 0", levels)
    require(sigma > 0, "sigma", "a number above 0", sigma)
    masks = [raster for raster in rasters if not raster.heat]
    heats = [raster for raster in rasters if raster.heat]
    shapes = _Shapes(boxes, points, polygons, polylines, masks)
    values = _by_kind(rects, kind, levels, sigma, shapes)
    most = levels[0] if kind in ("neighbours", "uniform") else 1.0
    for heat in heats:
        values = torch.maximum(values, most * raster_overlap(rects, heat))
    return values


def _by_kind(rects: Tensor, kind: str, levels: tuple, sigma: float, shapes: _Shapes) -> Tensor:
    """[n] fp64: a target map that is not normalised; zeros if the shapes fall on no token."""
    shares = _shares(rects, shapes)
    target = _clearly(shares)
    if not target.any():
        return torch.zeros(rects.shape[0], dtype=torch.float64)
    if kind in ("neighbours", "uniform"):
        values = torch.full((rects.shape[0],), levels[2], dtype=torch.float64)
        if kind == "neighbours":
            values[_touching(rects, target)] = levels[1]
        values[target] = levels[0]
        values[_area(rects) == 0] = 0.0
    elif kind == "overlap":
        values = shares.amax(0) * target
    elif kind == "gaussian":
        values = _gaussian(rects, shapes)
    elif kind == "centre":
        values = centred(rects, shares, _bounds(shapes, shapes.polylines), sigma) * target
    else:
        fail("kind", "'neighbours', 'uniform', 'overlap', 'gaussian' or 'centre'", repr(kind))
    return values


def quantise(target: Tensor) -> Tensor:
    """A map as integers, which survive frameworks that cast every float of a batch to bf16.

    Equals `round(target / target.amax(-1, keepdim=True) * 2**20)`; an empty map stays 0.

    Args:
        target: [..., C] float >= 0.

    Returns:
        [..., C] int32 in [0, 2**20]; 2**20 marks the maximum.
    """
    if target.shape[-1] == 0:
        return target.to(torch.int32)
    target = target.double()
    most = target.amax(-1, keepdim=True).clamp_min(1e-300)
    return (target / most * FIXED_POINT_ONE).round().to(torch.int32)


def dequantise(target: Tensor) -> Tensor:
    """What `quantise` stored, as a distribution; padding (negative numbers) becomes 0.

    Equals `target.clamp(min=0) / target.clamp(min=0).sum(-1, keepdim=True)`.

    Args:
        target: [..., C] int32.

    Returns:
        [..., C] fp32, sums to 1; all zero in a row without a positive number.
    """
    values = target.clamp_min(0).float()
    return values / values.sum(-1, keepdim=True).clamp_min(1.0)
