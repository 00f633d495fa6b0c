"""Where captions stand on a picture, so that none is over another at any size it is shown at.

A caption is placed in the picture's own units, beside the box it belongs to, and is written no
wider than planned (`textLength`). The whole grows with the picture; the page may shrink a caption
towards its anchor, the corner next to its box, which frees room and never takes any.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import dataclass

Rect = tuple[float, float, float, float]  # x, y, width, height

ADVANCE = 0.61  # of the font size: a monospaced character
LINE = 1.2  # of the font size: a line
PAD = 0.2  # of the font size: free on either side
LONGEST = 28  # characters of a caption
SMALLEST = 9.0  # units: smaller is not readable on a picture that is not enlarged
OF_SIDE = 1 / 70  # of the longer side: 12 pixels where a picture is shown 850 pixels high


@dataclass(frozen=True)
class Caption:
    """A text beside its box.

    Args:
        text: as it is written.
        rect: what it covers.
        right, bottom: which corner of it stays where it is when the caption is made smaller.
        font: its size.
    """

    text: str
    rect: Rect
    right: bool
    bottom: bool
    font: float

    @property
    def anchor(self) -> tuple[float, float]:
        """The corner that stays."""
        x, y, width, height = self.rect
        return round(x + width * self.right, 1), round(y + height * self.bottom, 1)

    @property
    def start(self) -> tuple[float, float]:
        """Where the text's baseline begins, seen from the anchor."""
        _, _, width, height = self.rect
        x = PAD * self.font - width * self.right
        return round(x, 1), round(0.95 * self.font - height * self.bottom, 1)

    @property
    def length(self) -> float:
        """How wide the text is written."""
        return round(self.rect[2] - 2 * PAD * self.font, 1)


class Room:
    """The free room on a picture, which captions take one after another: first come, first served.

    Args:
        width, height: of the picture.

    Attributes:
        font: size of all captions on it.
        hidden: how many found no room.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.font = round(max(SMALLEST, max(width, height) * OF_SIDE), 1)
        self.hidden = 0
        self._rows: dict[int, list[Rect]] = defaultdict(list)  # captions by the lines they touch

    def take(self, text: str, box: Rect) -> Caption | None:
        """A caption above the box, or below, beside or inside it; None if all is taken."""
        text = shortened(text)
        wide, high = self._size(text)
        x, y, width, height = box
        along = max(0.0, min(x, self.width - wide))
        for left, top, right, bottom in (
            (along, y - high, False, True),
            (along, y + height, False, False),
            (x + width, y, False, False),
            (x - wide, y, True, False),
            (along, y, False, False),
            (along, y + height - high, False, True),
        ):
            rect = (round(left, 1), round(top, 1), wide, high)
            if self._free(rect):
                for row in self._touched(rect):
                    self._rows[row].append(rect)
                return Caption(text, rect, right, bottom, self.font)
        self.hidden += 1
        return None

    def _size(self, text: str) -> tuple[float, float]:
        cells = sum(cells_of(character) for character in text)
        return round((cells * ADVANCE + 2 * PAD) * self.font, 1), round(LINE * self.font, 1)

    def _free(self, rect: Rect) -> bool:
        x, y, width, height = rect
        if x < 0 or y < 0 or x + width > self.width or y + height > self.height:
            return False
        near = (other for row in self._touched(rect) for other in self._rows[row])
        return not any(overlap(rect, other) for other in near)

    def _touched(self, rect: Rect) -> range:
        line = LINE * self.font
        return range(int(rect[1] // line), int((rect[1] + rect[3]) // line) + 1)


def overlap(one: Rect, other: Rect) -> bool:
    """Whether two rectangles share an area."""
    apart = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
    return not (apart or one[1] + one[3] <= other[1] or other[1] + other[3] <= one[1])


def touches(box: Rect, paper: Rect) -> bool:
    """Whether a box, which may be a point or a line, has a part on the paper."""
    return all(box[i] <= paper[i + 2] and box[i] + box[i + 2] >= paper[i] for i in (0, 1))


def cells_of(character: str) -> int:
    """How many columns of a terminal a character takes: 0, 1 or 2."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shortened(text: str) -> str:
    """One line of at most `LONGEST` characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
