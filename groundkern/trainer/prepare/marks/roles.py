"""What each printed line of a chart is for: told by its size, place, neighbours and turn.

A chart, a table or a form has lines that name one thing (a cell, a value, the label of a bar, a
tick, an entry of a legend) and lines that speak of the whole (titles of the chart and its axes,
notes below it). An answer takes its values and names from the former; a word that it shares with
the latter only ("share", "time") says nothing about a place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from enum import IntEnum
from itertools import pairwise
from statistics import median

from groundkern.trainer.prepare.marks.grouping import Line, is_on_its_side, union

# A line begins with it: what follows, and all that stands below it, says where data come from.
_SOURCE = re.compile(
    r"^\W*(?:(?:data )?sources?|notes?|quellen?|anmerkung(?:en)?|fuentes?|nota)\s*:"
    r"|^\W*(?:survey conducted)\b|\u00a9|\(c\)",
    re.IGNORECASE,
)
SHORT = 4  # tokens of a line that can be one of several labels side by side
PROSE = 6  # tokens from which a line below a chart is a sentence
FAR = 20.0  # letter heights between two lines of a footer that are no pair of labels


class Role(IntEnum):
    """What a line is for; the lower, the sooner an answer speaks of it."""

    CELL = 0  # a value, a cell, the label of a bar, a row, a column or a slice
    LEGEND = 1
    AXIS_TITLE = 2
    TITLE = 3
    SUBTITLE = 4
    NOTE = 5
    TICK = 6  # a number of an axis: it only happens to be a value

    @property
    def general(self) -> bool:
        """Whether such a line speaks of the whole chart."""
        return self in (Role.AXIS_TITLE, Role.TITLE, Role.SUBTITLE, Role.NOTE)


def roles_of(blocks: list[list[Line]], ticks: Iterable[Line] = ()) -> dict[int, Role]:
    """The role of each line, by the line's `id`.

    Args:
        blocks: of `groundkern.trainer.prepare.marks.grouping.blocks_of`, of any number of images.
        ticks: lines that `scale_numbers` took for ticks.
    """
    roles = {id(line): Role.TICK for line in ticks}
    by_image = defaultdict(list)
    for block in blocks:
        by_image[block[0].image].append(block)
    for each in by_image.values():
        roles = {**_Chart(each).roles(roles), **roles}
    return roles


class _Chart:
    """The lines of one image in rows, from top to bottom."""

    def __init__(self, blocks: list[list[Line]]) -> None:
        self.lines = [line for block in blocks for line in block]
        self.height = median(line.box[3] - line.box[1] for line in self.lines)
        self.size = {id(line): len(line.tokens()) for line in self.lines}
        paragraphs = {id(line) for block in blocks if self._is_prose(block) for line in block}
        self.values = {
            id(line)
            for line in self.lines
            if id(line) not in paragraphs and self.size[id(line)] <= 3 and _starts_with_number(line)
        }
        self.upright = [line for line in self.lines if not is_on_its_side(line)]
        self.rows = _rows(self.upright)
        self.wrapped = {
            id(line)
            for block in blocks
            for above, line in pairwise(block)
            if id(above) not in self.values or self.size[id(above)] > 1
        }

    def roles(self, known: dict[int, Role]) -> dict[int, Role]:
        data = [line for line in self.lines if id(line) in self.values]
        roles = {id(line): Role.CELL for line in self.lines}
        if not data:
            return roles
        top, bottom = min(line.box[1] for line in data), max(line.box[3] for line in data)
        for row in self.rows:
            outside = row[0].box[1] >= bottom - self.height or row[0].box[3] <= top + self.height
            if outside and self._entries(row) and not self._over_values(row, data):
                roles.update({id(line): Role.LEGEND for line in row})
        for line in self._axis_titles(data):
            roles[id(line)] = Role.AXIS_TITLE
        roles.update(self._titles())
        roles.update({id(line): Role.NOTE for line in self._notes(bottom)})
        return roles

    def _is_prose(self, block: list[Line]) -> bool:
        return max(self.size[id(line)] for line in block) >= SHORT and len(block) > 1

    def _titles(self) -> dict[int, Role]:
        """Lines above everything that is one of several: neither a value nor labels side by side.

        A title is the largest of them, the others are subtitles.
        """
        found: list[Line] = []
        for row in self.rows:
            alone = len(row) == 1 or any(self.size[id(line)] > SHORT for line in row)
            large = max(line.box[3] - line.box[1] for line in row) >= 1.25 * self.height
            worded = max(self.size[id(line)] for line in row) >= 2
            if any(id(line) in self.values for line in row) or not alone:
                break
            if not large and not worded:
                break
            found += row
        if len(found) == len(self.upright):
            return {}
        largest = max((line.box[3] - line.box[1] for line in found), default=0.0)
        return {
            id(line): Role.TITLE if line.box[3] - line.box[1] >= 0.85 * largest else Role.SUBTITLE
            for line in found
        }

    def _notes(self, bottom: float) -> list[Line]:
        """Lines that name a source, and in the lower half all that stands below the first such.

        Sentences below all values count too.
        """
        edges = union([line.box for line in self.lines])
        middle = (edges[1] + edges[3]) / 2
        starts = [
            line
            for line in self.upright
            if _SOURCE.search(line.text) or (line.box[1] >= bottom and self.size[id(line)] >= PROSE)
        ]
        below = [line.box[1] for line in starts if line.box[1] > middle]
        height = 0.5 * self.height
        return starts + [
            line for line in self.upright if below and line.box[1] >= min(below) - height
        ]

    def _axis_titles(self, data: list[Line]) -> list[Line]:
        """Text on its side, unless it is one of several in a row; a line alone below an axis."""
        found = []
        turned = [line for line in self.lines if is_on_its_side(line)]
        for line in turned:
            beside = [o for o in turned if o is not line and _overlap(o, line, 1) > 0.5]
            if len(beside) < 2 and any(c.isalpha() for c in line.text):
                found.append(line)
        left, _, right, low = union([line.box for line in data])
        for row in self.rows:
            line = row[0]
            if line.box[1] < low - 0.5 * self.height or len(row) > 1:
                low = max(low, row[0].box[3]) if len(row) > 1 else low
                continue
            inside = left <= (line.box[0] + line.box[2]) / 2 <= right
            if line.box[1] - low <= 3 * self.height and inside and id(line) not in self.wrapped:
                found.append(line)
            break
        return found

    def _entries(self, row: list[Line]) -> bool:
        """Whether a row is short texts side by side, close together."""
        if len(row) < 2 or any(id(line) in self.values for line in row):
            return False
        gaps = [b.box[0] - a.box[2] for a, b in pairwise(row)]
        return max(gaps) <= FAR * self.height and all(self.size[id(o)] <= SHORT + 1 for o in row)

    def _over_values(self, row: list[Line], data: list[Line]) -> bool:
        """Whether most texts of a row have a value above them, as the labels of bars do."""
        under = 0
        for line in row:
            middle = (line.box[0] + line.box[2]) / 2
            reach = max((line.box[2] - line.box[0]) / 2, self.height)
            under += any(
                abs((value.box[0] + value.box[2]) / 2 - middle) <= reach
                and value.box[3] <= line.box[1] + 0.5 * self.height
                for value in data
            )
        return len(row) >= 2 and under >= 0.6 * len(row)


def _rows(lines: list[Line]) -> list[list[Line]]:
    """Lines at one height, from left to right; rows from top to bottom."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box[1] + line.box[3]):
        if rows and _overlap(rows[-1][-1], line, 1) > 0.5:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [sorted(row, key=lambda line: line.box[0]) for row in rows]


def _overlap(a: Line, b: Line, axis: int) -> float:
    """How much of the shorter one's extent two lines share: along x (0) or y (1)."""
    shared = min(a.box[axis + 2], b.box[axis + 2]) - max(a.box[axis], b.box[axis])
    return shared / max(1e-9, min(a.box[axis + 2] - a.box[axis], b.box[axis + 2] - b.box[axis]))


def _starts_with_number(line: Line) -> bool:
    found = line.tokens()
    return bool(found) and found[0][0].number
