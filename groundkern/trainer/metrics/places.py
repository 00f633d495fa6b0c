"""Boxes and points in what a model writes, in fractions of the image.

The notations are those of `groundkern.trainer.places.notations`, which `prepare` reads too. Most
say themselves what their numbers count. In lists (`[100, 100, 300, 300]`) and JSON nothing does;
there `coord` decides, as in a data file (docs/data/data-format.md), and the caller has to know it.
"""

from __future__ import annotations

from typing import Literal

from groundkern.trainer.places.notations import BOXES, POINTS, sound
from groundkern.trainer.places.patterns import Scale

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Size = tuple[int, int]
Coord = Literal["pixel", "unit", "per_mille", "percent"]

SCALES = {"unit": 1.0, "percent": 100.0, "per_mille": 1000.0}


def parse_boxes(text: str, *, coord: Coord = "per_mille", size: Size | None = None) -> list[Box]:
    """The boxes in a text, in fractions of the image, in the order of the text.

    Args:
        text: anything; what is no box is left out, so that malformed boxes are no boxes. So are
            boxes without area or with their corners swapped.
        coord: what the numbers of notations count that do not say so: "pixel", "unit", "per_mille"
            or "percent".
        size: (width, height) of the image whose pixels are counted; "pixel" needs it.

    Returns:
        (x0, y0, x1, y1) each; may exceed 0 to 1.

    Raises:
        ValueError: an unknown `coord`, or "pixel" without a size.
    """
    own = _scale(coord, size)
    for notation in BOXES:
        boxes = [m.fractions(m.whole or own) for m in notation.find(text) if sound(m)]
        if boxes:
            return boxes
    return []


def parse_points(text: str, *, coord: Coord = "per_mille", size: Size | None = None) -> list[Point]:
    """The points in a text, in fractions of the image; arguments as for `parse_boxes`.

    Boxes are not read as points, except that `(x0,y0),(x1,y1)` without a tag is two of them.

    Returns:
        (x, y) each; may exceed 0 to 1.

    Raises:
        ValueError: as `parse_boxes`.
    """
    own = _scale(coord, size)
    for notation in POINTS:
        points = [mark.fractions(mark.whole or own) for mark in notation.find(text)]
        if points:
            return points
    return []


def _scale(coord: str, size: Size | None) -> Scale:
    if coord == "pixel":
        if size is None:
            raise ValueError("`size`: expected (width, height) for pixel coordinates, got None")
        return float(size[0]), float(size[1])
    if coord not in SCALES:
        raise ValueError(f"`coord`: expected pixel or one of {', '.join(SCALES)}, got {coord!r}")
    return SCALES[coord], SCALES[coord]
