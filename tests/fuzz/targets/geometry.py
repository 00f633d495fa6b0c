"""Places of an image: areas and counts of boxes, points, polygons and lines, exact on any grid."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import torch

from groundkern import maps
from groundkern.targets.bells import bell_mass
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.writing import PER_MILLE
from groundkern.trainer.prepare.placing import Frame
from tests.fuzz.target import Target, expect, json_object

GRID = (3, 4)  # rows, columns
NEAR = 1e-9


def check_frame(data: bytes) -> bool:
    """A box in three orders is one box; it is inside, and cut only where it stuck out."""
    found = json_object(data)
    width, height = (_side(found.get(name)) for name in ("width", "height"))
    overhang = found.get("overhang")
    if not isinstance(overhang, float) or not 0 <= overhang < 10:
        overhang = 0.01
    frame = Frame(width, height, overhang, "a.json[0]")
    values, order = found.get("box"), found.get("order")
    order = order if order in ("xyxy", "xywh", "cxcywh") else "xyxy"
    box, counts = frame.box(values, "bbox", order=order)
    x0, y0, x1, y1 = box
    expect(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height, "a box inside", box)
    expect(all(type(edge) is float for edge in box), "numbers of one type", box)
    a, b, c, d = values
    raw = {
        "xyxy": (a, b, c, d),
        "xywh": (a, b, a + c, b + d),
        "cxcywh": (a - c / 2, b - d / 2, a - c / 2 + c, b - d / 2 + d),
    }[order]
    sides = (width, height) * 2
    expect(box == [min(float(s), max(0.0, float(v))) for v, s in zip(raw, sides, strict=True)],
           "the given edges, cut", box, raw)  # fmt: skip
    expect(bool(counts) == (list(map(float, raw)) != box), "a count of what was cut", counts)
    again, none = frame.box([x0, y0, x1, y1], "bbox")
    expect(again == box and not none, "the same box when read again", again)
    place = Place(tuple(v / side for v, side in zip(box, (width, height) * 2, strict=True)))
    text = json.loads(PER_MILLE.write([place], (1, 1)).text)
    expect(all(0 <= v <= 1000 for v in text), "thousandths", text)
    return True


def check_places(data: bytes) -> bool:
    """Shapes in the unit square: the shares of a grid's cells add up to their areas and lengths."""
    found = json_object(data)
    rects = maps.patch_grid(*GRID)
    cell = 1 / (GRID[0] * GRID[1])
    taken = 0
    for box in _rows(found.get("boxes"), 4):
        x0, x1 = sorted((box[0], box[2]))
        y0, y1 = sorted((box[1], box[3]))
        share = maps.overlap(rects, [[x0, y0, x1, y1]])
        area = float(share.sum()) * cell
        expect(abs(area - (x1 - x0) * (y1 - y0)) < NEAR, "the box's area", area, box)
        corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
        same = (maps.polygon_overlap(rects, corners) - share[0]).abs().max()
        expect(float(same) < NEAR, "the same as its polygon", box)
        taken += 1
    for point in _rows(found.get("points"), 2):
        held = int(maps.contains(rects, [point]).sum())
        expect(held == 1, "one cell for each point", held, point)
        taken += 1
    for bell in _rows(found.get("bells"), 4):
        if min(bell[2:]) > 0:
            mass = bell_mass(rects, [bell])[0]
            expect(abs(float(mass.sum()) - 1) < NEAR, "all of the bell", mass, bell)
            expect(float(mass.min()) >= 0, "no negative mass", mass, bell)
            taken += 1
    corners = _rows(found.get("polygon"), 2)
    if len(corners) >= 3:
        hull = _hull(corners)
        area = abs(_shoelace(hull))
        share = maps.polygon_overlap(rects, hull) if len(hull) >= 3 else torch.zeros(1)
        got = float(share.sum()) * cell
        expect(abs(got - area) < 1e-8, f"the hull's area {area}", got, hull)
        taken += 1
    line = _rows(found.get("polyline"), 2)
    if len(line) >= 2:
        runs = maps.polyline_length(rects, line)
        expect(bool(torch.isfinite(runs).all()) and float(runs.min()) >= 0, "lengths", line)
        long = sum(math.hypot((bx - ax) * GRID[1], (by - ay) * GRID[0])
                   for (ax, ay), (bx, by) in pairwise(line))  # fmt: skip
        got = float(runs.sum())  # a segment on an edge counts on both of its sides
        expect(long - 1e-6 <= got <= 2 * long + 1e-6, f"{long} to twice that", got, line)
        taken += 1
    return taken > 0


def _side(value: Any) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < 1e6
    return value if usable else 40


def _rows(values: Any, width: int) -> list[list[float]]:
    """Rows of numbers within the unit square, from whatever is there."""
    rows = []
    for row in values if isinstance(values, list) else ():
        if not isinstance(row, list) or len(row) != width:
            continue
        if all(isinstance(v, int | float) and 0 <= v <= 1 for v in row):
            rows.append([float(v) for v in row])
    return rows[:12]


def _hull(points: list[list[float]]) -> list[list[float]]:
    """The convex hull, whose area is known by the shoelace formula."""
    points = sorted(map(tuple, points))

    def half(ordered: list) -> list:
        chain: list = []
        for p in ordered:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], p) <= 0:
                chain.pop()
            chain.append(p)
        return chain[:-1]

    return [list(p) for p in half(points) + half(points[::-1])]


def _turn(a: tuple, b: tuple, c: tuple) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _shoelace(points: list[list[float]]) -> float:
    return sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1])) / 2


FRAMES = {
    "inside": b'{"width": 40, "height": 30, "box": [1, 2, 20, 30], "overhang": 0.01}',
    "xywh": b'{"width": 40, "height": 30.5, "box": [-0.1, 2, 20.25, 28.6], "order": "xywh"}',
    "centre": b'{"width": 1, "height": 1, "box": [0.5, 0.5, 1, 0.1], "order": "cxcywh"}',
}
PLACES = {
    "all": json.dumps(
        {
            "boxes": [[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.9]],
            "bells": [[0.2, 0.9, 0.1, 0.01], [0, 1, 1e-300, 1], [0.5, 0.5, 0.5, 0.5]],
            "points": [[0, 0], [1, 1], [0.25, 0.5], [0.3333333333333333, 0.1]],
            "polygon": [[0, 0], [1, 0.1], [0.9, 1], [0.2, 0.7]],
            "polyline": [[0, 0], [0.5, 0.1], [0.5, 0.9], [1, 1]],
        }
    ).encode()
}
TARGETS = (
    Target("frame", check_frame, FRAMES, "json", ("box", "order", "xywh"), 3, (SampleError,)),
    Target("places_areas", check_places, PLACES, "json", ("boxes", "points"), 0.5),
)
