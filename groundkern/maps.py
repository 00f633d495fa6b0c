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
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.rasters import Raster
from groundkern.targets.bells import bell_mass, outlines_of
from groundkern.targets.centres import centred
from groundkern.targets.shapes import (
    Coordinates,
    Shapes,
    area_of,
    clearly,
    contains,
    overlap,
    polygon_overlap,
    polyline_length,
    raster_overlap,
    rows_of,
    shares_of,
)

__all__ = [
    "FIXED_POINT_ONE",
    "contains",
    "dequantise",
    "heat_of",
    "inside",
    "mixed",
    "overlap",
    "patch_grid",
    "polygon_overlap",
    "polyline_length",
    "quantise",
    "raster_overlap",
    "target_map",
    "target_values",
    "with_floor",
]

FIXED_POINT_ONE = 1 << 20
"""The integer that `quantise` stores for a map's maximum."""
KINDS = ("neighbours", "uniform", "overlap", "gaussian", "evidence", "centre")
EVIDENCE_SIGMA = 0.25  # of EASE's bells, in sides of their boxes


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


def inside(
    rects: Tensor,
    *,
    boxes: Coordinates = (),
    points: Coordinates = (),
    polygons: Sequence[Coordinates] = (),
    polylines: Sequence[Coordinates] = (),
    rasters: Sequence[Raster] = (),
    grow: float = 0.0,
    bells: Coordinates = (),
) -> Tensor:
    """Which rectangles the union of the shapes covers.

    A shape covers a rectangle if it overlaps at least a hundredth of it (a polyline: runs through a
    hundredth of its width or height), so that an edge which grazes a patch by a rounding error does
    not count; a shape too small for that covers the rectangle it lies in.

    With `grow` the shapes reach so much further on all sides, for each rectangle in units of its
    own width and height: a rectangle is asked what is within that distance of it. On a grid 1 adds
    the eight neighbours of every covered rectangle, and coarse and fine views grow each by theirs.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        boxes: [m, 4] float (x0, y0, x1, y1).
        points: [m, 2] float (x, y).
        polygons, polylines: sequences of [k, 2] float (x, y).
        rasters: masks, and heats, which are a mask where they have half of their maximum or more.
        bells: [m, 4] float (x, y, sx, sy): points with a spread, which cover the ellipse where
            their bell has half of its height or more.
        grow: in widths and heights of a rectangle, >= 0.

    Returns:
        [n] bool.

    Raises:
        ValueError: rectangles or shapes of another width, or a negative `grow`.
    """
    rects = rows_of("rects", rects, 4)
    require(grow >= 0, "grow", "a number >= 0", grow)
    masks = [mask for raster in rasters if (mask := raster.mask()) is not None]
    polygons = [*polygons, *outlines_of(bells)]
    shapes = Shapes(boxes, points, polygons, polylines, masks)
    if grow == 0:
        return clearly(shares_of(rects, shapes))
    reach = grow * (rects[:, 2:] - rects[:, :2]).clamp_min(0)
    near = torch.cat((rects[:, :2] - reach, rects[:, 2:] + reach), 1)
    # back to shares of the rectangle itself, so that what was covered before still is
    return clearly(shares_of(near, shapes) * (1 + 2 * grow) ** 2)


def _touching(rects: Tensor, target: Tensor) -> Tensor:
    """[n] bool: rectangles that touch a target rectangle, enlarged by a hundredth."""
    slack = 0.01 * (rects[:, 2:] - rects[:, :2])
    low, high = rects[:, :2] - slack, rects[:, 2:] + slack
    touch = torch.zeros_like(target)
    # 1024 at a time: a target as large as the image must not cost [n, n]
    for chunk in target.nonzero()[:, 0].split(1024):
        near = (low[chunk, None] <= rects[None, :, 2:]) & (high[chunk, None] >= rects[None, :, :2])
        touch |= near.all(-1).any(0)
    return touch & (area_of(rects) > 0)


def _bounds(shapes: Shapes, lines: Sequence[Coordinates] = ()) -> Tensor:
    """[m, 4]: the boxes around all shapes, polylines only if they are given as `lines`."""
    bounds = [rows_of("boxes", shapes.boxes, 4), rows_of("points", shapes.points, 2).repeat(1, 2)]
    for polygon in (*shapes.polygons, *lines):
        corners = rows_of("polygon", polygon, 2)
        bounds.append(torch.cat([corners.amin(0), corners.amax(0)])[None])
    bounds += [rows_of("bounds", [mask.bounds()], 4) for mask in shapes.rasters]
    return torch.cat(bounds)


def _evidence(rects: Tensor, shapes: Shapes) -> Tensor:
    """[n]: the sum of the shapes' bells, each a distribution, over the highest of the sums (W2)."""
    low, high = _bounds(shapes).split(2, 1)
    spread = (EVIDENCE_SIGMA * (high - low)).clamp_min(1e-9)  # of a point nearly nothing
    parts = [bell_mass(rects, torch.cat([(low + high) / 2, spread], 1))]
    for line in shapes.polylines:
        length = polyline_length(rects, line)[None]
        parts.append(length / length.sum().clamp_min(1e-300))
    mass = torch.cat(parts).sum(0)
    return mass / mass.max().clamp_min(1e-300)


def _gaussian(rects: Tensor, shapes: Shapes) -> Tensor:
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
    return bell.masked_fill(area_of(rects) == 0, 0.0)


def _from_line(rects: Tensor, polyline: Coordinates) -> Tensor:
    """[n]: squared distance of each rectangle's centre from a polyline, in half rectangles."""
    vertices = rows_of("polyline", polyline, 2)
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
    bells: Coordinates = (),
) -> Tensor:
    """The distribution over visual tokens of a map that looks at the union of the shapes.

    Args:
        rects: [n, 4] float, one rectangle per visual token. Tokens without a place get 0.
        kind: "neighbours": `levels` (a, b, c) for tokens on the target (`inside`), tokens that
            touch these, and the rest. "uniform": a on the target, c elsewhere. "overlap": the share
            of the token that is covered (along a polyline: the length that runs through it, at most
            1), 0 elsewhere. "gaussian": a bell over each shape, its standard deviation half the
            shape's width and height and at least half a token; around a polyline half a token; of a
            mask it is that of the box around it. "evidence": a mixture of such bells, one for each
            shape and all of the same mass, with a quarter of the shape's width and height; of a
            polyline the length that runs through a token (W2). "centre": the share that is covered
            times a bell about the centre of the shape (`centres.centred`), GUI-AIMA's target.
        sigma: of "centre": the bell's standard deviation over the sides of the box around a shape.
        levels: the triple (a, b, c), each >= 0 and a > 0.
        boxes, points, polygons, polylines: as in `inside`.
        rasters: masks, shapes like the others; and heats, which are the target themselves, of
            whatever kind: a token has the heat's mean over it. Beside shapes a heat's maximum
            counts as much as being on a shape, and the larger of the two values is taken.
        bells: [m, 4] float (x, y, sx, sy): points with a spread, their standard deviation. They
            are the target themselves, as heats are: a token has the sum of what each bell has over
            it (`targets.bells`), every point as much as another. Beside shapes a whole bell counts
            as much as being on a shape.

    Returns:
        [n] fp32, sums to 1; all zero if the shapes fall on no token.

    Raises:
        ValueError: rectangles or shapes of another width, an unknown kind, or levels out of range.

    Source: P of KLAL's (K3) (arXiv 2511.12738; the triple is open in the paper).
    """
    how: dict[str, Any] = {"kind": kind, "levels": levels, "sigma": sigma}
    how |= {"rasters": rasters, "bells": bells}
    shapes: dict[str, Any] = {
        "boxes": boxes,
        "points": points,
        "polygons": polygons,
        "polylines": polylines,
    }
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
    bells: Coordinates = (),
) -> Tensor:
    """`target_map` before it is divided by its sum.

    Args:
        rects, kind, levels, sigma, boxes, points, polygons, polylines, rasters, bells: as there.

    Returns:
        [n] fp64; all zero if the shapes fall on no token.

    Raises:
        ValueError: as there.
    """
    rects = rows_of("rects", rects, 4)
    good = len(levels) == 3 and min(levels) >= 0 and levels[0] > 0
    require(good, "levels", "three numbers >= 0", levels)
    require(sigma > 0, "sigma", "a number above 0", sigma)
    wanted = "'neighbours', 'uniform', 'overlap', 'gaussian', 'evidence' or 'centre'"
    require(kind in KINDS, "kind", wanted, repr(kind))
    masks = [raster for raster in rasters if not raster.heat]
    heats = [raster for raster in rasters if raster.heat]
    shapes = Shapes(boxes, points, polygons, polylines, masks)
    values = _by_kind(rects, kind, levels, sigma, shapes)
    most = levels[0] if kind in ("neighbours", "uniform") else 1.0
    for heat in heats:
        values = torch.maximum(values, most * raster_overlap(rects, heat))
    spread = torch.zeros_like(values)
    for some in rows_of("bells", bells, 4).split(64):  # a record of gaze has thousands
        spread += bell_mass(rects, some).sum(0)
    return torch.maximum(values, most * spread)


def _by_kind(
    rects: Tensor, kind: str, levels: tuple[float, ...], sigma: float, shapes: Shapes
) -> Tensor:
    """[n] fp64: a target map that is not normalised; zeros if the shapes fall on no token."""
    shares = shares_of(rects, shapes)
    target = clearly(shares)
    if not target.any():
        return torch.zeros(rects.shape[0], dtype=torch.float64)
    if kind in ("neighbours", "uniform"):
        values = torch.full((rects.shape[0],), levels[2], dtype=torch.float64)
        if kind == "neighbours":
            values[_touching(rects, target)] = levels[1]
        values[target] = levels[0]
        values[area_of(rects) == 0] = 0.0
    elif kind == "overlap":
        values = shares.amax(0) * target
    elif kind == "gaussian":
        values = _gaussian(rects, shapes)
    elif kind == "evidence":
        values = _evidence(rects, shapes)
    else:
        values = centred(rects, shares, _bounds(shapes, shapes.polylines), sigma) * target
    return values


def with_floor(target: Tensor, rects: Tensor, floor: float) -> Tensor:
    """A target map, a part of which is spread evenly over all tokens with a place.

    Equals `(1 - floor) * target + floor / n` over the n rectangles that have an area.

    Args:
        target: [n] float, a distribution; a map of zeros stays one.
        rects: [n, 4] float, one rectangle per visual token.
        floor: the part, in [0, 1].

    Returns:
        [n] in the dtype of `target`.

    Raises:
        ValueError: a floor outside [0, 1].

    Source: alpha of EASE's evidence map (arXiv 2605.30912), (W2).
    """
    require(0.0 <= floor <= 1.0, "floor", "a number in [0, 1]", floor)
    if floor == 0 or not bool(target.any()):
        return target
    placed = (area_of(rows_of("rects", rects, 4)) > 0).to(target.dtype)
    return (1.0 - floor) * target + floor * placed / placed.sum().clamp_min(1.0)


def mixed(targets: Tensor, shares: Sequence[float]) -> Tensor:
    """The target of several regions, each with its share of the attention.

    Equals `sum_r s_r P_r / sum_r s_r` over the regions that fall on a token.

    Args:
        targets: [m, n] float >= 0, a distribution each, or zeros where a region falls on no token.
        shares: of each, > 0.

    Returns:
        [n] fp32, sums to 1; all zero if no region falls on a token.

    Raises:
        ValueError: another number of shares, or one that is not above 0.

    Source: (K8).
    """
    require(len(shares) == len(targets), "shares", f"{len(targets)} of them", len(shares))
    require(min(shares, default=1) > 0, "shares", "numbers above 0", list(shares))
    values = torch.as_tensor(shares, dtype=torch.float64) @ targets.double()
    return (values / values.sum().clamp_min(1e-300)).float()


def heat_of(rects: Tensor, values: Tensor, *, height: int, width: int) -> Tensor:
    """A map over visual tokens as pixels of the image, which another model's tokens can be taught.

    What a token has is spread evenly over its rectangle, and a pixel has the sum of what falls on
    it, by exact areas: neither grid has to divide the other, and tokens of several views add up.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1), in fractions of the image; those without area get
            lost.
        values: [..., n] float >= 0: a recorded map (`GroundedOutput.maps`), or a patch map of CLIP.
        height, width: of the result in pixels; as many as there are rows and columns of tokens lose
            nothing of a plain grid.

    Returns:
        [..., height, width] fp32, the values of a `Raster`; sums to what `values` has within the
        image.

    Raises:
        ValueError: another shape, or values that are negative or not finite.

    Source: (K9).
    """
    rects = rows_of("rects", rects, 4)
    count = len(rects)
    fits = values.dim() > 0 and values.shape[-1] == count
    require(fits, "values", f"[..., {count}], one a rectangle", list(values.shape))
    usable = bool(torch.isfinite(values).all()) and bool((values >= 0).all())
    require(usable, "values", "finite numbers >= 0", "others")
    across = _shares_of_side(rects[:, 0], rects[:, 2], width)  # [n, width]
    down = _shares_of_side(rects[:, 1], rects[:, 3], height)
    weighted = values.double().unsqueeze(-1) * across  # [..., n, width]
    return (down.T @ weighted).float()


def _shares_of_side(low: Tensor, high: Tensor, pixels: int) -> Tensor:
    """[n, pixels]: the share of each interval that lies in each pixel of the unit interval."""
    edges = torch.arange(pixels + 1, dtype=torch.float64) / pixels
    start = torch.maximum(low[:, None], edges[:-1])
    covered = (torch.minimum(high[:, None], edges[1:]) - start).clamp_min(0)
    length = (high - low)[:, None]
    return torch.where(length > 0, covered / length.clamp_min(1e-300), 0.0)


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
