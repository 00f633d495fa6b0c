"""From the characters of a printed line to words with tight boxes, by the ink between them.

A recogniser of lines says about where each character stands, and often leaves out the spaces
between words. The line's own picture has them: columns without ink.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np

from groundkern.trainer.prepare.ocr.scripts import ALONE
from groundkern.trainer.prepare.ocr.settings import Box

# Without a space in the text, two letters belong to two words if a strip without ink between them
# is `WIDE` letter heights wide; or `GAP`, and they stand `STEP` times as far apart as is usual in
# their line. Two digits belong to two words only if it is `DIGITS` heights wide: charts set "3 000"
# with gaps of up to 0.9. Found on the development halves of FUNSD and SROIE
# (benchmarks/preparing/pages.py) and on charts for training.
GAP, STEP, WIDE, DIGITS = 0.25, 1.6, 0.6, 0.95
RULE = 0.7  # of a line's width: a row with more ink is a printed rule, not letters
MARGIN = 0.08  # of a line's letters' height, left around a word's ink as people draw boxes

Letter = tuple[int, str]  # place in the line's text, character


class Crop:
    """A line cut out of an image and turned upright, as the recogniser saw it.

    Args:
        quad: [4, 2], the line's corners in the image: left top, right top, right bottom, left
            bottom.
        pixels: [H, W, 3], the cut, before it was turned upside down.
        upside_down: whether the recogniser was shown it turned by 180 degrees.
        tall: a quadrangle this many times as high as wide was turned by 90 degrees.
    """

    def __init__(
        self, quad: np.ndarray, pixels: np.ndarray, upside_down: bool, tall: float
    ) -> None:
        self.quad, self.upside_down = np.asarray(quad, float), upside_down
        self.pixels = pixels[::-1, ::-1] if upside_down else pixels
        self.height, self.width = pixels.shape[:2]
        sides = np.linalg.norm(self.quad - np.roll(self.quad, -1, axis=0), axis=1).astype(int)
        self.upended = max(sides[1], sides[3]) >= tall * max(sides[0], sides[2])

    @property
    def turn(self) -> int:
        """Degrees, clockwise, by which the image would have to be turned to read the line."""
        return (90 if self.upside_down else 270) if self.upended else 180 * self.upside_down

    @cached_property
    def ink(self) -> np.ndarray:
        """[H, W], where letters are: what differs from the paper, without printed rules."""
        import cv2  # of the extra [ocr]: which engine is chosen is decided without it

        gray = cv2.cvtColor(np.ascontiguousarray(self.pixels), cv2.COLOR_BGR2GRAY).astype(np.int16)
        contrast = np.abs(gray - np.median(gray)).astype(np.uint8)
        threshold, _ = cv2.threshold(contrast, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        ink = contrast > threshold
        ink[ink.mean(axis=1) > RULE] = False
        return ink

    def box(self, left: float, top: float, right: float, bottom: float) -> Box:
        """What a box of the cut covers in the image, as a box."""
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float)
        width, height = self.width, self.height
        if self.upside_down:
            corners = (width, height) - corners
        if self.upended:  # the cut was turned counterclockwise
            corners = np.stack([height - corners[:, 1], corners[:, 0]], axis=1)
            width, height = height, width
        across, down = (corners / (width, height)).T[..., None]  # [4, 1] each
        top_left, top_right, bottom_right, bottom_left = self.quad
        places = (1 - down) * ((1 - across) * top_left + across * top_right)
        places = places + down * ((1 - across) * bottom_left + across * bottom_right)
        (x0, y0), (x1, y1) = places.min(axis=0), places.max(axis=0)
        return float(x0), float(y0), float(x1), float(y1)


def line_words(
    crop: Crop, letters: Sequence[Letter], centres: Sequence[float]
) -> Iterator[tuple[list[Letter], Box]]:
    """The words of a line: its letters and a box around their ink.

    Args:
        crop: the line.
        letters: its characters without the spaces, each with its place in the printed text.
        centres: where each stands, in pixels of the cut.
    """
    rows = np.flatnonzero(crop.ink.any(axis=1))
    size = rows[-1] - rows[0] + 1 if len(rows) else crop.height
    gaps = _gaps(crop.ink.any(axis=0))
    usual = float(np.median(np.diff(centres))) if len(centres) > 1 else 0.0
    begin, part = 0.0, [letters[0]]
    for (before, after), (left, right) in zip(pairwise(letters), pairwise(centres)):
        low, high = _widest(gaps, left, right)
        if before[1].isdigit() and after[1].isdigit():
            far = DIGITS
        else:
            far = GAP if right - left > STEP * usual else WIDE
        parted = after[0] > before[0] + 1 or high - low > far * size
        if parted or ALONE.match(before[1]) or ALONE.match(after[1]):
            middle = (low + high) / 2
            yield part, crop.box(*_tight(crop, begin, middle, MARGIN * size))
            begin, part = middle, []
        part.append(after)
    yield part, crop.box(*_tight(crop, begin, crop.width, MARGIN * size))


def _gaps(filled: np.ndarray) -> np.ndarray:
    """[G, 2], starts and stops of the runs of columns without ink."""
    steps = np.diff(np.pad(~filled, 1).astype(np.int8))
    return np.stack([np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)], axis=1)


def _widest(gaps: np.ndarray, left: float, right: float) -> tuple[float, float]:
    """The widest gap whose middle lies between two letters' centres; an empty one if there is
    none."""
    middles = gaps.sum(axis=1) / 2
    between = gaps[(left < middles) & (middles < right)]
    if not len(between):
        return (left + right) / 2, (left + right) / 2
    low, high = between[np.argmax(between[:, 1] - between[:, 0])]
    return float(low), float(high)


def _tight(
    crop: Crop, begin: float, end: float, margin: float
) -> tuple[float, float, float, float]:
    """The box around the ink between two columns; all of the height where there is none."""
    first, last = int(begin), max(int(begin) + 1, int(np.ceil(end)))
    ink = crop.ink[:, first:last]
    columns, rows = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
    if not len(rows):
        return begin, 0, end, crop.height
    left, right = first + columns[0] - margin, first + columns[-1] + 1 + margin
    top, bottom = rows[0] - margin, rows[-1] + 1 + margin
    return max(0, left), max(0, top), min(crop.width, right), min(crop.height, bottom)
