"""OCR words as lines of text, and lines as the blocks they are stacked in.

A line is a run of words at one height and close together: a label, a legend entry, a cell, a line
of a paragraph. A block is a run of lines below one another in one type size: a label that wraps, a
paragraph. All lengths are relative to the height of the letters, so that no image size is assumed.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass

from trainer.prepare.marks.normalise import Token, tokens

Box = tuple[float, float, float, float]
GAP = 0.8  # between words of a line, in letter heights; a space is 0.3 to 0.6
LEADING = 0.9  # between lines of a block, in letter heights


@dataclass(frozen=True)
class PrintedWord:
    """A word printed in image `image`; `box` is x0, y0, x1, y1 in pixels."""

    text: str
    box: Box
    image: int = 0

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]


@dataclass(frozen=True)
class Line:
    """Words of one line, in reading order."""

    words: tuple[PrintedWord, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    @property
    def image(self) -> int:
        return self.words[0].image

    @property
    def box(self) -> Box:
        return union([word.box for word in self.words])

    def tokens(self) -> list[tuple[Token, int, int]]:
        """The line's tokens, each with the range of words it is printed in."""
        ends, at = [], -1
        for word in self.words:
            at += 1 + len(word.text)
            ends.append(at)
        return [
            (token, bisect_left(ends, token.start + 1), bisect_left(ends, token.stop) + 1)
            for token in tokens(self.text)
        ]


def union(boxes: list[Box]) -> Box:
    """The smallest box around all of `boxes`."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def lines_of(words: list[PrintedWord], gap: float = GAP) -> list[Line]:
    """Group words into lines.

    Two words join if they overlap in height by half, are of similar size, and are at most `gap`
    letter heights apart. Two numbers side by side are two labels, unless they read as the digit
    groups of one ("1 234").
    """
    by_image = defaultdict(list)
    for word in words:
        if word.text.strip():
            by_image[word.image].append(word)
    return [line for each in by_image.values() for line in _lines_of_image(each, gap)]


def blocks_of(lines: list[Line]) -> list[list[Line]]:
    """Chain lines below one another, of similar size and aligned; a line alone is a block.

    Every line is in exactly one block, top to bottom.
    """
    lines = sorted(lines, key=lambda line: (line.image, line.box[1], line.box[0]))
    tops = [(line.image, line.box[1]) for line in lines]
    pairs = []
    for i, line in enumerate(lines):
        height = line.box[3] - line.box[1]
        low = bisect_left(tops, (line.image, line.box[3] - 0.5 * height))
        high = bisect_left(tops, (line.image, line.box[3] + 1.5 * LEADING * height))
        near = (j for j in range(max(low, i + 1), high) if _stacked(line, lines[j]))
        pairs.extend((_shift(line, lines[j]) + lines[j].box[1] - line.box[3], i, j) for j in near)
    below: dict[int, int] = {}
    taken: set[int] = set()
    for _, i, j in sorted(pairs):  # the best aligned first
        if i not in below and j not in taken:
            below[i] = j
            taken.add(j)
    blocks = []
    for first in sorted(set(range(len(lines))) - taken):
        chain = [first]
        while chain[-1] in below:
            chain.append(below[chain[-1]])
        blocks.append([lines[i] for i in chain])
    return blocks


def scale_numbers(lines: list[Line]) -> set[Line]:
    """The lines that are ticks of an axis: numbers whose values are linear in their positions.

    Three or more in a row or column. Years are categories more often than a scale, and are left
    out, as is everything that is not a number alone.
    """
    numbers = []
    for line in lines:
        found = line.tokens()
        if len(found) == 1 and found[0][0].number and re.fullmatch(r"-?[\d.]+", found[0][0].key):
            numbers.append((line, float(found[0][0].key)))
    if all(1900 <= number <= 2100 and number % 1 == 0 for _, number in numbers):
        return set()
    ticks = set()
    for along in (0, 1):  # a row, whose x counts; a column, whose y counts
        for aligned in _aligned(numbers, 1 - along):
            aligned.sort(key=lambda item: item[0].box[along] + item[0].box[along + 2])
            for triple in zip(aligned, aligned[1:], aligned[2:]):
                if _linear([((x.box[along] + x.box[along + 2]) / 2, y) for x, y in triple]):
                    ticks.update(line for line, _ in triple)
    return ticks


def _lines_of_image(words: list[PrintedWord], gap: float) -> list[Line]:
    words = sorted(words, key=lambda word: word.box[0])
    starts = [word.box[0] for word in words]
    following: dict[int, int] = {}
    taken: set[int] = set()
    for i, word in enumerate(words):
        reach = gap * max(word.height, 1.0) * 1.6
        low = bisect_left(starts, word.box[2] - 0.3 * word.height)
        high = bisect_left(starts, word.box[2] + reach)
        for j in range(max(low, i + 1), high):
            if j not in taken and _side_by_side(word, words[j], gap):
                following[i] = j
                taken.add(j)
                break
    found = []
    for first in sorted(set(range(len(words))) - taken, key=lambda i: words[i].box[1]):
        chain = [first]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        run = [words[i] for i in chain]
        directions = [unicodedata.bidirectional(c) for word in run for c in word.text]
        leftwards = sum(d in ("R", "AL") for d in directions)
        if leftwards > sum(d == "L" for d in directions):
            run.reverse()
        found.append(Line(tuple(run)))
    return found


def _side_by_side(left: PrintedWord, right: PrintedWord, gap: float) -> bool:
    tall, short = max(left.height, right.height), min(left.height, right.height)
    overlap = min(left.box[3], right.box[3]) - max(left.box[1], right.box[1])
    apart = right.box[0] - left.box[2]
    if tall > 2.2 * short or overlap < 0.5 * short or not -0.3 * tall <= apart <= gap * tall:
        return False
    both = all(re.fullmatch(r"[\W_]*\d[\d.,%\W]*", word.text) for word in (left, right))
    if not both:
        return True
    digit_groups = re.fullmatch(r"\W?\d{1,3}", left.text) and re.match(r"\d{3}\b", right.text)
    return bool(digit_groups) and apart <= 0.5 * tall


def _stacked(upper: Line, lower: Line) -> bool:
    a, b = upper.box, lower.box
    heights = a[3] - a[1], b[3] - b[1]
    if upper.image != lower.image or max(heights) > 1.5 * min(heights):
        return False
    if not -0.5 * min(heights) <= b[1] - a[3] <= LEADING * max(heights):
        return False
    overlap = min(a[2], b[2]) - max(a[0], b[0])
    return _shift(upper, lower) <= max(heights) and overlap > 0


def _shift(upper: Line, lower: Line) -> float:
    """How far two lines are from sharing a left edge, a right edge or a middle."""
    a, b = upper.box, lower.box
    return min(abs(a[0] - b[0]), abs(a[2] - b[2]), abs(a[0] + a[2] - b[0] - b[2]) / 2)


def _aligned(numbers: list, across: int) -> list[list]:
    """Numbers at one height (`across` 1) or with one left edge, right edge or middle (0)."""
    groups = []
    anchors = [lambda b: (b[across] + b[across + 2]) / 2]
    if across == 0:
        anchors += [lambda b: b[0], lambda b: b[2]]
    for anchor in anchors:
        ordered = sorted(numbers, key=lambda item: (item[0].image, anchor(item[0].box)))
        group: list = []
        for item in ordered:
            box = item[0].box
            near = group and item[0].image == group[0][0].image
            if not near or anchor(box) - anchor(group[0][0].box) > 0.5 * (box[3] - box[1]):
                group = []
                groups.append(group)
            group.append(item)
    return [group for group in groups if len(group) >= 3]


def _linear(points: list[tuple[float, float]]) -> bool:
    (x0, y0), (x1, y1), (x2, y2) = points
    if not x0 < x1 < x2 or y0 == y1:
        return False
    expected = y0 + (y1 - y0) * (x2 - x0) / (x1 - x0)
    return abs(expected - y2) <= 0.04 * abs(y2 - y0)
