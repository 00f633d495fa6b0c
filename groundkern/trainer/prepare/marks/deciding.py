"""Which of several equal texts an answer means: the one in the row or column of its other names.

Three cells of a table show "20.00"; an answer that says "20.00 for Tea in 2019" means the one that
stands beside "Tea", below "2019", or both.
"""

from __future__ import annotations

from dataclasses import dataclass

from groundkern.trainer.prepare.marks.grouping import Box, Line, is_slanted, union


@dataclass(frozen=True)
class Anchor:
    """A name that an answer or its question took from the image: a label, all of its lines.

    `stop` is where it ends in the text, `header` whether only what is below it belongs to it.
    """

    lines: tuple[Line, ...]
    header: bool = False

    @property
    def image(self) -> int:
        return self.lines[0].image

    @property
    def box(self) -> Box:
        return union([line.box for line in self.lines])


def decide(places: list[Line], anchors: list[Anchor]) -> int | None:
    """The one place that has most anchors in its row or column; None if there is no such one.

    Args:
        places: lines that hold the same text.
        anchors: what may stand in their rows and columns.
    """
    support = [sum(_belongs(place, anchor) for anchor in anchors) for place in places]
    most = max(support)
    return support.index(most) if most and support.count(most) == 1 else None


def _belongs(place: Line, anchor: Anchor) -> bool:
    if place.image != anchor.image or place in anchor.lines:
        return False
    box, other = place.box, anchor.box
    if anchor.header and other[3] > box[1]:
        return False
    tall = box[3] - box[1]
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    if len(anchor.lines) == 1 and is_slanted(anchor.lines[0]):  # its end is at its bar
        return abs(other[2] - x) <= (box[2] - box[0]) / 2
    in_row = other[1] - 0.5 * tall <= y <= other[3] + 0.5 * tall
    in_column = other[0] - 0.5 * tall <= x <= other[2] + 0.5 * tall
    return in_row or in_column
