"""What the metrics may know of a sample: its right answers, and how places in texts are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundkern.hf.data.example import Region
from groundkern.trainer.data.rasters import Stored
from groundkern.trainer.metrics import boxes
from groundkern.trainer.metrics.boxes import Places
from groundkern.trainer.metrics.places import (
    SCALES,
    Box,
    Coord,
    Point,
    Size,
    parse_boxes,
    parse_points,
)

Units = Coord | Literal["resized"]
"""What the numbers of boxes and points count. Of "pixel" it is pixels of the image in the data, of
"resized" pixels of what the processor made of the whole image, as Qwen2.5-VL writes them."""

_UNITS: tuple[Units, ...] = ("per_mille", "pixel", "resized", "unit", "percent")
_SAME_BOX = 0.9  # IoU of a box in the answer with its region in the right coordinates: rounding


@dataclass(frozen=True)
class Gold:
    """What a metric may know of a sample.

    Args:
        answers: the right answers, each once; one of them will do.
        votes: the sample's `answers` as it has them: each as often as someone gave it.
        task: the sample's label.
        size: (width, height) of its first image in the data, in pixels; None: no image.
        resized: the same of what the processor made of the whole image; None: unknown.
        regions: of this answer, in fractions of the image.
        rasters: where the masks and heats of these are.
        metrics: names that the sample asks for itself.
        coord: what the numbers of boxes and points in the answers count where their notation does
            not say so.
        said: the same of predictions; None: as in the answers.
    """

    answers: tuple[str, ...]
    votes: tuple[str, ...] = ()
    task: str = ""
    size: Size | None = None
    resized: Size | None = None
    regions: tuple[Region, ...] = ()
    rasters: tuple[Stored, ...] = ()
    metrics: tuple[str, ...] = ()
    coord: Units = "per_mille"
    said: Units | None = None


def coord_of(gold: Gold, otherwise: Units = "per_mille") -> Units:
    """The coordinates in which the boxes of the gold answer are its regions.

    Those that fit best, of equals the first of thousandths, pixels, pixels of the resized image,
    fractions, percent; `otherwise` if none fits or there are no regions.
    """
    regions = [box for region in gold.regions for box in region.boxes]
    unknown = {"pixel": gold.size is None, "resized": gold.resized is None}
    units = [coord for coord in _UNITS if not unknown.get(coord)]
    if not regions:
        return otherwise
    fits = {c: boxes.box_iou(boxes_in(gold.answers[0], gold, c), regions) for c in units}
    found = max(units, key=fits.__getitem__)
    return found if fits[found] >= _SAME_BOX else otherwise


def boxes_in(text: str, gold: Gold, coord: Units | None = None) -> list[Box]:
    """The boxes in a text about a gold's image; `coord` is that of its answers if not given."""
    return parse_boxes(text, **_units(gold, coord))


def points_in(text: str, gold: Gold, coord: Units | None = None) -> list[Point]:
    """The points in a text, as `boxes_in`."""
    return parse_points(text, **_units(gold, coord))


def _units(gold: Gold, coord: Units | None) -> dict:
    """Pixels of an image of unknown size are compared as they are: IoU has no unit."""
    coord = coord or gold.coord
    if coord in SCALES:
        return {"coord": coord}
    size = gold.resized if coord == "resized" else gold.size
    return {"coord": "unit"} if size is None else {"coord": "pixel", "size": size}


def gold_boxes(gold: Gold) -> list[Box]:
    """The boxes of the first gold answer, or if it has none of the regions, in fractions."""
    written = boxes_in(gold.answers[0], gold)
    return written or [box for region in gold.regions for box in region.boxes]


def gold_places(gold: Gold) -> Places:
    """The boxes, polygons, masks and points of the regions; without any those of the first answer.

    Masks are decoded, heats a mask where they have half of their maximum.
    """
    places = Places(
        boxes=[box for region in gold.regions for box in region.boxes],
        polygons=[corners for region in gold.regions for corners in region.polygons],
        masks=[stored.load({}).mask().values.numpy() for stored in gold.rasters],
        points=[point for r in gold.regions for point in (*r.points, *(b[:2] for b in r.bells))],
    )
    if len(places):
        return places
    written = boxes_in(gold.answers[0], gold)
    return Places(boxes=written, points=() if written else points_in(gold.answers[0], gold))


def predicted_boxes(predicted: str, gold: Gold) -> list[Box]:
    """The boxes of what a model wrote."""
    return boxes_in(predicted, gold, gold.said)


def predicted_points(predicted: str, gold: Gold) -> list[Point]:
    """The points of what a model wrote, or the centres of its boxes."""
    points = points_in(predicted, gold, gold.said)
    return points or [boxes.centre(box) for box in predicted_boxes(predicted, gold)]
