"""What the metrics may know of a sample: its right answers, and how places in texts are read."""

from __future__ import annotations

from dataclasses import dataclass

from groundkern.hf.data.example import Region
from trainer.metrics import boxes
from trainer.metrics.boxes import Places
from trainer.metrics.places import SCALES, Box, Coord, Point, Size, parse_boxes, parse_points

_SAME_BOX = 0.9  # IoU of a box in the answer with its region in the right coordinates: rounding


@dataclass(frozen=True)
class Gold:
    """What a metric may know of a sample.

    Args:
        answers: the right answers; one of them will do.
        task: the sample's label.
        size: (width, height) of its first image as the model saw it, in pixels; None: no image.
        regions: of this answer, in fractions of the image.
        metrics: names that the sample asks for itself.
        coord: what the numbers of boxes and points count where their notation does not say so.
    """

    answers: tuple[str, ...]
    task: str = ""
    size: Size | None = None
    regions: tuple[Region, ...] = ()
    metrics: tuple[str, ...] = ()
    coord: Coord = "per_mille"


def coord_of(gold: Gold) -> Coord:
    """The coordinates in which the boxes of the gold answer are its regions; else per_mille."""
    regions = [box for region in gold.regions for box in region.boxes]
    if regions:
        for coord in ("per_mille", "pixel", "unit", "percent"):
            if boxes.box_iou(boxes_in(gold.answers[0], gold, coord), regions) >= _SAME_BOX:
                return coord
    return "per_mille"


def boxes_in(text: str, gold: Gold, coord: Coord | None = None) -> list[Box]:
    return parse_boxes(text, **_units(gold, coord))


def points_in(text: str, gold: Gold, coord: Coord | None = None) -> list[Point]:
    return parse_points(text, **_units(gold, coord))


def _units(gold: Gold, coord: Coord | None) -> dict:
    """Pixels of an image of unknown size are compared as they are: IoU has no unit."""
    coord = coord or gold.coord
    known = coord in SCALES or gold.size is not None
    return {"coord": coord if known else "unit", "size": gold.size}


def gold_boxes(gold: Gold) -> list[Box]:
    """The boxes of the first gold answer, or if it has none of the regions, in fractions."""
    written = boxes_in(gold.answers[0], gold)
    return written or [box for region in gold.regions for box in region.boxes]


def gold_places(gold: Gold) -> Places:
    """The boxes, polygons and points of the regions; without any those of the first answer."""
    places = Places(
        boxes=[box for region in gold.regions for box in region.boxes],
        polygons=[corners for region in gold.regions for corners in region.polygons],
        points=[point for region in gold.regions for point in region.points],
    )
    if len(places):
        return places
    written = boxes_in(gold.answers[0], gold)
    return Places(boxes=written, points=() if written else points_in(gold.answers[0], gold))


def predicted_points(predicted: str, gold: Gold) -> list[Point]:
    """The points of a text, or the centres of its boxes."""
    points = points_in(predicted, gold)
    return points or [boxes.centre(box) for box in boxes_in(predicted, gold)]
