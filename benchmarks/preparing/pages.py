"""How well words are read on real pages: FUNSD's forms and SROIE's receipts.

`python -m benchmarks.preparing.pages FOLDER --format funsd` prints recall and precision of the
words, of the texts alone and of texts that also stand where they should. FOLDER is the data
set as it is distributed; nothing of it is in this repository.

Two things are compared. Runs of letters and digits (of any script), lower-cased: FUNSD's annotators
cut "466-5087" in two and engines do not, so both sides are cut, a box in proportion to the number
of characters. And words as they are, lower-cased and without what is no letter or digit. Words
without any are left out on both sides. The last line but one says how many true words are parts,
cut at punctuation, of a word that was read whole: no engine could get these right.

The texts of a page are a multiset: of one that stands three times and is read twice, two are
found. With place, a read word goes to the true word of the same text whose box it overlaps most,
each true word once, and counts if the intersection over union is 0.5 or more.

Every second page, in the order of the files' names, is for development (`--half dev`); the others
are held out (`--half held`). Settings were chosen on the first and are reported on the second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from groundkern.trainer.data.images import image_size, load_rgb
from groundkern.trainer.prepare.arguments import ENGINES
from groundkern.trainer.prepare.ocr.quality import MIN_KEPT, complaint
from groundkern.trainer.prepare.ocr.reading import read_words
from groundkern.trainer.prepare.ocr.rotation import common_turn, turned
from groundkern.trainer.prepare.ocr.settings import Box, OcrSettings
from groundkern.trainer.prepare.reading import split_lines

WORD = re.compile(r"\S+")
RUN = re.compile(r"[^\W_]+")  # letters and digits of any script
OVERLAP = 0.5  # intersection over union that a word's place needs


class TrueWord(NamedTuple):
    text: str
    box: Box


class Page(NamedTuple):
    """An image and the words that stand on it."""

    image: Path
    words: list[TrueWord]


@dataclass
class Tally:
    """True words, read words, and of these the right ones, without and with their place."""

    true: int = 0
    read: int = 0
    right: int = 0
    placed: int = 0

    def add(self, true: Sequence[TrueWord], read: Sequence[TrueWord]) -> None:
        """Counts the words of a page, as they are compared."""
        common = Counter(word.text for word in true) & Counter(word.text for word in read)
        self.true += len(true)
        self.read += len(read)
        self.right += common.total()
        self.placed += _placed(true, read)

    def lines(self, title: str) -> list[str]:
        """Recall and precision, without and with place."""
        return [
            f"{name:>21}: recall {right / max(1, self.true):.3f}  "
            f"precision {right / max(1, self.read):.3f}"
            for name, right in ((title, self.right), (f"{title} in place", self.placed))
        ]


@dataclass
class Score:
    """Of all pages: runs of letters and digits, whole words, true words that are parts of one, CPU
    seconds, pages that were turned and those whose words mostly fell away."""

    runs: Tally = field(default_factory=Tally)
    whole: Tally = field(default_factory=Tally)
    parts: int = 0
    pages: int = 0
    seconds: float = 0.0
    turned: int = 0
    rejected: int = 0

    def add(self, true: Sequence[TrueWord], read: Sequence[TrueWord]) -> None:
        """Counts a page."""
        self.pages += 1
        self.runs.add(runs(true), runs(read))
        self.whole.add(whole(true), whole(read))
        self.parts += sum(len(parts) for word in read if (parts := parts_of(word, true)))

    def lines(self) -> list[str]:
        """What is printed."""
        counted = f"{self.pages} pages, {self.runs.true:,} runs, {self.runs.read:,} read; "
        counted += f"{self.turned} pages turned, {self.rejected} would be rejected"
        cut = f"{self.parts:,} of {self.whole.true:,} words are parts of a word that was read whole"
        took = f"{self.seconds / max(1, self.pages):.2f} s of CPU a page"
        return [counted, *self.runs.lines("runs"), *self.whole.lines("words"), cut, took]


def funsd(folder: Path) -> Iterator[Page]:
    """FUNSD: `annotations/*.json` beside `images/*.png`, in one folder or in two."""
    for path in _below(folder, "annotations/*.json"):
        form = json.loads(path.read_bytes())["form"]
        words = [
            TrueWord(text, tuple(word["box"]))
            for entry in form
            for word in entry["words"]
            for text in word["text"].split()
        ]
        yield Page(path.parents[1] / "images" / f"{path.stem}.png", words)


def sroie(folder: Path) -> Iterator[Page]:
    """SROIE: `box/*.csv` or `*.txt` (eight corners, then the line's text) beside `img/*.jpg`.

    A line is cut into words at white space, its box in proportion to the number of characters.
    """
    for path in _below(folder, "box/*.csv", "box/*.txt"):
        words: list[TrueWord] = []
        for line in split_lines(path.read_text("utf-8", "replace")):
            cells = line.split(",", 8)
            if len(cells) == 9:
                corners = [float(cell) for cell in cells[:8]]
                xs, ys = corners[::2], corners[1::2]
                words += _cut(cells[8], (min(xs), min(ys), max(xs), max(ys)), WORD)
        yield Page(path.parents[1] / "img" / f"{path.stem}.jpg", words)


FORMATS = {"funsd": funsd, "sroie": sroie}


def evaluate(
    pages: Sequence[Page],
    settings: OcrSettings,
    *,
    min_confidence: float,
    turn: int = 0,
) -> Score:
    """Reads the pages and counts.

    Args:
        pages: what to read.
        settings: how.
        min_confidence: words below it are not counted as read.
        turn: degrees, clockwise, by which the images are turned before; their words turn too.
    """
    score = Score()
    for page in pages:
        size = image_size(page.image, where=page.image.name, field="image")
        image = load_rgb(page.image, size, where=page.image.name, field="image")
        image = image.rotate(-turn, expand=True)
        began = _cpu()
        found = read_words(image, settings)
        score.seconds += _cpu() - began
        score.turned += bool(common_turn(found))
        bad = complaint(found, min_confidence=min_confidence, min_kept=MIN_KEPT)
        score.rejected += bad is not None
        read = [
            TrueWord(word.text, word.box) for word in found if word.confidence >= min_confidence
        ]
        true = [word._replace(box=turned(word.box, image.size, -turn % 360)) for word in page.words]
        score.add(true, read)
    return score


def runs(words: Sequence[TrueWord]) -> list[TrueWord]:
    """Runs of letters and digits, lower-cased, each with its share of its word's box."""
    parts = (part for word in words for part in _cut(word.text, word.box, RUN))
    return [part._replace(text=part.text.lower()) for part in parts]


def whole(words: Sequence[TrueWord]) -> list[TrueWord]:
    """Words, lower-cased and without what is no letter or digit."""
    kept = ["".join(char for char in word.text.lower() if char.isalnum()) for word in words]
    return [word._replace(text=text) for word, text in zip(words, kept) if text]


def parts_of(word: TrueWord, true: Sequence[TrueWord]) -> list[TrueWord]:
    """The true words that lie in a read word, spell it, and part only at punctuation; none if there
    are not several."""
    inside = sorted(
        (part for part in true if _shared(part.box, word.box) > _area(part.box) / 2),
        key=lambda part: part.box[0],
    )
    spelt = TrueWord("".join(part.text for part in inside), word.box)
    cut = all(not (a.text[-1].isalnum() and b.text[0].isalnum()) for a, b in pairwise(inside))
    parts = whole(inside)
    return parts if len(parts) > 1 and cut and whole([spelt]) == whole([word]) else []


def _placed(true: Sequence[TrueWord], read: Sequence[TrueWord]) -> int:
    """Read words on a true word of the same text, those that overlap most first."""
    by_text: dict[str, list[int]] = {}
    for index, word in enumerate(true):
        by_text.setdefault(word.text, []).append(index)
    pairs = [
        (share, n, index)
        for n, word in enumerate(read)
        for index in by_text.get(word.text, ())
        if (share := overlap(word.box, true[index].box)) >= OVERLAP
    ]
    gone: set[tuple[str, int]] = set()
    for _, n, index in sorted(pairs, reverse=True):
        if ("read", n) not in gone and ("true", index) not in gone:
            gone |= {("read", n), ("true", index)}
    return len(gone) // 2


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    shared = _shared(a, b)
    return shared / max(_area(a) + _area(b) - shared, 1e-9)


def _shared(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _cut(text: str, box: Box, pattern: re.Pattern) -> list[TrueWord]:
    """The parts of a text, each with its share of the text's box."""
    x0, y0, x1, y1 = box
    step = (x1 - x0) / max(1, len(text))
    return [
        TrueWord(found.group(), (x0 + step * found.start(), y0, x0 + step * found.end(), y1))
        for found in pattern.finditer(text)
    ]


def _below(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.rglob(pattern))


def _cpu() -> float:
    """CPU seconds of this process and of the programs it has run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing.pages")
    parser.description = "Recall and precision of the words that OCR reads on real pages."
    parser.add_argument("folder", type=Path, help="the data set as it is distributed")
    parser.add_argument("--format", choices=tuple(FORMATS), required=True)
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--language")
    parser.add_argument("--page-mode", type=int, help="tesseract's (default: auto)")
    parser.add_argument("--no-rotation", dest="rotation", action="store_false")
    parser.add_argument("--scale", type=float, help="default: the engine's")
    parser.add_argument("--min-confidence", type=float, default=0.5)
    parser.add_argument("--half", choices=("held", "dev", "both"), default="held")
    parser.add_argument("--turn", type=int, choices=(0, 90, 180, 270), default=0)
    parser.add_argument("--limit", type=int, help="pages, spread over the half")
    arguments = parser.parse_args()
    pages = list(FORMATS[arguments.format](arguments.folder))
    halves = {"dev": pages[::2], "held": pages[1::2], "both": pages}
    pages = halves[arguments.half]
    if not pages:
        parser.error(f"no pages of {arguments.format} below {arguments.folder}")
    if arguments.limit:
        pages = pages[:: max(1, len(pages) // arguments.limit)][: arguments.limit]
    settings = OcrSettings.of(arguments)
    score = evaluate(pages, settings, min_confidence=arguments.min_confidence, turn=arguments.turn)
    print("\n".join(score.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
