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
from dataclasses import dataclass, replace
from itertools import pairwise

from groundkern.trainer.prepare.marks.normalise import Token, tokens

Box = tuple[float, float, float, float]
GAP = 0.8  # between words of a line, in letter heights; a space is 0.3 to 0.6
SIZES = 2.0  # of lines of a block: one without tall letters ("over") is half as high as others
LEADING = 0.9  # between lines of a block, in letter heights


@dataclass(frozen=True)
class PrintedWord:
    """A word printed in image `image`.

    Args:
        text: as it was read.
        box: x0, y0, x1, y1 in pixels.
        image: the image's index.
        line: words of one printed line share it, in reading order; None: not known.
    """

    text: str
    box: Box
    image: int = 0
    line: int | None = None

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

    def across(self, at: int) -> float:
        """Where character `at` of the text begins, in pixels, if letters are equally wide."""
        start = 0
        for word in self.words:
            if at <= start + len(word.text):
                share = max(0, at - start) / len(word.text)
                return word.box[0] + share * (word.box[2] - word.box[0])
            start += len(word.text) + 1
        return self.box[2]


def is_on_its_side(line: Line) -> bool:
    """Whether a line runs from bottom to top or from top to bottom, as titles of y axes do."""
    x0, y0, x1, y1 = line.box
    return len(line.text) > 2 and y1 - y0 > 1.5 * (x1 - x0)


def is_slanted(text: Line | PrintedWord) -> bool:
    """Whether a text climbs, as long labels of bars do: then its box is about a square."""
    x0, y0, x1, y1 = text.box
    return len(text.text) > 3 and 0.7 * (x1 - x0) < y1 - y0 <= 1.5 * (x1 - x0)


def union(boxes: list[Box]) -> Box:
    """The smallest box around all of `boxes`."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def lines_of(words: list[PrintedWord], gap: float = GAP) -> list[Line]:
    """Group words into lines.

    Two words join if they overlap in height by half, are of similar size, and are at most `gap`
    letter heights apart. Two numbers side by side are two labels, unless they read as the digit
    groups of one ("1 234"). Words that OCR read as one line which is not level are a line too.
    """
    by_image = defaultdict(list)
    for word in words:
        if word.text.strip():
            by_image[word.image].append(word)
    return [line for each in by_image.values() for line in _lines_of_image(_joined(each), gap)]


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


def continued(block: list[Line]) -> set[int]:
    """The places in a block of lines that go on with the label above: "energy" below "Renewable".

    Labels stacked closely are one block too, so a line counts only if it begins in lower case and
    the block does not.
    """
    lower = [line.text.lstrip("\"'(")[:1].islower() for line in block]
    return {i for i, each in enumerate(lower) if each and not lower[0]}


def scale_numbers(lines: list[Line]) -> set[Line]:
    """The lines that are ticks of an axis: numbers whose values are linear in their positions.

    Three or more in a row, or in a column with nothing to its left. Years are categories more often
    than a scale, and are left out, as is everything that is not a number alone.
    """
    numbers = []
    for line in lines:
        found = line.tokens()
        if len(found) == 1 and found[0][0].number and re.fullmatch(r"-?[\d.]+", found[0][0].key):
            numbers.append((line, float(found[0][0].key)))
    level = [line for line in lines if not is_on_its_side(line)]
    ticks = set()
    for along in (0, 1):  # a row, whose x counts; a column, whose y counts
        for aligned in _aligned(numbers, 1 - along):
            if all(1900 <= number <= 2100 and number % 1 == 0 for _, number in aligned):
                continue
            if along == 1 and _has_left(aligned, level):
                continue
            aligned.sort(key=lambda item: item[0].box[along] + item[0].box[along + 2])
            for triple in zip(aligned, aligned[1:], aligned[2:]):
                if _linear([((x.box[along] + x.box[along + 2]) / 2, y) for x, y in triple]):
                    ticks.update(line for line, _ in triple)
    return ticks


def _has_left(column: list, lines: list[Line]) -> bool:
    """Whether most numbers of a column have text on their left, as cells of a table do."""
    edge = min(line.box[0] for line, _ in column)
    beside = [line.box for line in lines if line.box[2] <= edge]
    with_left = sum(
        any(box[1] < (line.box[1] + line.box[3]) / 2 < box[3] for box in beside)
        for line, _ in column
    )
    return with_left > len(column) / 2


def _joined(words: list[PrintedWord]) -> list[PrintedWord]:
    """The words, with numbers whole that OCR has cut at a gap within one line ("20", "18")."""
    found: list[PrintedWord] = []
    for word in words:
        last = found[-1] if found else None
        if last is not None and last.line is not None and last.line == word.line:
            apart = word.box[0] - last.box[2]
            digits = re.fullmatch(r"\D?[\d.,]*[\d.,]", last.text) and re.match(
                r"[\d.,%]", word.text
            )
            if digits and apart <= 0.65 * min(last.height, word.height):
                found[-1] = replace(
                    last, text=last.text + word.text, box=union([last.box, word.box])
                )
                continue
        found.append(word)
    return found


def _lines_of_image(words: list[PrintedWord], gap: float) -> list[Line]:
    turned = _turned_lines(words)
    inside = {id(word) for line in turned for word in line.words}
    words = sorted((word for word in words if id(word) not in inside), key=lambda w: w.box[0])
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
    found = turned
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


def _turned_lines(words: list[PrintedWord]) -> list[Line]:
    """Lines of OCR whose words do not stand side by side: on their side, or slanted."""
    by_line = defaultdict(list)
    for word in words:
        if word.line is not None:
            by_line[word.line].append(word)
    return [
        Line(tuple(run))
        for run in by_line.values()
        if len(run) > 1 and not any(_level(a, b) for a, b in pairwise(run))
    ]


def _level(left: PrintedWord, right: PrintedWord) -> bool:
    overlap = min(left.box[3], right.box[3]) - max(left.box[1], right.box[1])
    return overlap >= 0.5 * min(left.height, right.height)


def _side_by_side(left: PrintedWord, right: PrintedWord, gap: float) -> bool:
    tall, short = max(left.height, right.height), min(left.height, right.height)
    overlap = min(left.box[3], right.box[3]) - max(left.box[1], right.box[1])
    apart = right.box[0] - left.box[2]
    if tall > 2.2 * short or overlap < 0.5 * short or not -0.3 * tall <= apart <= gap * tall:
        return False
    if is_slanted(left) and is_slanted(right):
        return False
    both = all(re.fullmatch(r"[\W_]*\d[\d.,%\W]*", word.text) for word in (left, right))
    if not both:
        return True
    digit_groups = re.fullmatch(r"\W?\d{1,3}", left.text) and re.match(r"\d{3}\b", right.text)
    return bool(digit_groups) and apart <= 0.5 * tall


def _stacked(upper: Line, lower: Line) -> bool:
    a, b = upper.box, lower.box
    heights = a[3] - a[1], b[3] - b[1]
    if upper.image != lower.image or max(heights) > SIZES * min(heights):
        return False
    if b[1] - a[3] < -0.5 * min(heights) or b[3] - a[3] > (1 + LEADING) * max(heights):
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
    """Whether steps in value are as steps in position, in a ratio of small whole numbers."""
    (x0, y0), (x1, y1), (x2, y2) = points
    if not x0 < x1 < x2 or y1 == y2:
        return False
    apart, step = (x1 - x0) / (x2 - x1), (y1 - y0) / (y2 - y1)
    return any(
        abs(step - m / n) <= 1e-6 and abs(apart - m / n) <= 0.12 * m / n
        for m in range(1, 4)
        for n in range(1, 4)
    )
