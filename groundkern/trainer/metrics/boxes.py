"""Metrics of boxes and points, in fractions of the image; text is read by `places`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from groundkern.trainer.metrics.places import Box, Point

THRESHOLD = 0.5
RADIUS = 0.05


def iou(first: Box, second: Box) -> float:
    """Area that two boxes share over the area that they cover together; 0 for no area at all."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    covered = _area(first) + _area(second) - shared
    return shared / covered if covered > 0 else 0.0


def box_iou(predicted: Sequence[Box], gold: Sequence[Box]) -> float:
    """Mean IoU over the gold boxes; 0 for one that no predicted box is left for.

    Of n golds the first n predicted boxes count, matched so that the sum is highest, so that more
    boxes are no more chances (of one gold: the first box, as REC is evaluated). Without a gold it
    is 1 if nothing was predicted, else 0.

    Args:
        predicted, gold: (x0, y0, x1, y1) each, at any scale.

    Source: Kazemzadeh et al., ReferItGame, 2014; Mao et al., arXiv 1511.02283.
    """
    return _matched(predicted, gold, iou)


def box_accuracy(
    predicted: Sequence[Box], gold: Sequence[Box], *, threshold: float = THRESHOLD
) -> float:
    """Share of the gold boxes that a predicted box meets with an IoU of at least `threshold`.

    IoU@.5, the accuracy of referring expressions. Matching as `box_iou`.

    Source: Mao et al., arXiv 1511.02283.
    """
    return _matched(predicted, gold, lambda p, g: float(iou(p, g) >= threshold))


def centre_accuracy(predicted: Sequence[Box], gold: Sequence[Box]) -> float:
    """Share of the gold boxes that hold the centre of a predicted box; matching as `box_iou`.

    Source: Cheng et al., SeeClick, arXiv 2401.10935, ScreenSpot.
    """
    return _matched(predicted, gold, lambda p, g: float(_in_box(centre(p), g)))


def centre(box: Box) -> Point:
    """The middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@dataclass(frozen=True)
class Places:
    """Things that are pointed at; each box, polygon, mask and point is one.

    Args:
        boxes: (x0, y0, x1, y1), in fractions of the image.
        polygons: corners (x, y), three or more each.
        masks: bool [height, width], of the whole image.
        points: (x, y); a prediction within `radius` of one is right.
        radius: in fractions of the image's sides.
    """

    boxes: Sequence[Box] = ()
    polygons: Sequence[Sequence[Point]] = ()
    masks: Sequence[NDArray[np.bool_]] = ()
    points: Sequence[Point] = ()
    radius: float = RADIUS

    def __len__(self) -> int:
        return sum(map(len, (self.boxes, self.polygons, self.masks, self.points)))

    def hit(self, point: Point) -> list[bool]:
        """For each thing, whether the point lies in it: boxes, polygons, masks, points."""
        return [
            *(_in_box(point, box) for box in self.boxes),
            *(_in_polygon(point, corners) for corners in self.polygons),
            *(_in_mask(point, mask) for mask in self.masks),
            *(np.hypot(point[0] - x, point[1] - y) <= self.radius for x, y in self.points),
        ]


def pointing_accuracy(predicted: Sequence[Point], gold: Places) -> float:
    """Whether the first predicted point lies in any of the places; 1 if there is neither.

    Source: Zhang et al., arXiv 1608.00507, pointing game; Yuan et al., RoboPoint, arXiv 2406.10721.
    """
    if not predicted or not len(gold):
        return float(not predicted and not len(gold))
    return float(any(gold.hit(predicted[0])))


def pointing_f1(predicted: Sequence[Point], gold: Places) -> float:
    """F1 of pointing at several things: each thing is met by one point, each point meets one.

    Points and things are matched so that as many points as can lie in their thing. With m of p
    points that do and g things, it is 2 m / (p + g); 1 if there is neither.

    Source: Deitke et al., Molmo and PixMo, arXiv 2409.17146.
    """
    if not predicted or not len(gold):
        return float(not predicted and not len(gold))
    hits = np.array([gold.hit(point) for point in predicted], float)  # [p, g]
    rows, columns = linear_sum_assignment(hits, maximize=True)
    return 2 * float(hits[rows, columns].sum()) / sum(hits.shape)


def _matched(predicted: Sequence[Box], gold: Sequence[Box], value) -> float:
    if not gold:
        return float(not predicted)
    if not predicted:
        return 0.0
    values = np.array([[value(p, g) for g in gold] for p in predicted[: len(gold)]])
    rows, columns = linear_sum_assignment(values, maximize=True)
    return float(values[rows, columns].sum()) / len(gold)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _in_box(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _in_polygon(point: Point, corners: Sequence[Point]) -> bool:
    """Even-odd rule: how often a ray to the right crosses the outline."""
    x, y = point
    inside = False
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
            inside = not inside
    return inside


def _in_mask(point: Point, mask: NDArray[np.bool_]) -> bool:
    height, width = mask.shape
    column, row = int(np.floor(point[0] * width)), int(np.floor(point[1] * height))
    column, row = column - (point[0] == 1), row - (point[1] == 1)  # the edge belongs to the image
    return bool(0 <= row < height and 0 <= column < width and mask[row, column])
