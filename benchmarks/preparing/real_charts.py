"""How good `marks` is on real charts, labelled by hand.

`python -m benchmarks.preparing.real_charts FOLDER --engine rapid` prints precision and recall of
links for the two halves of `real_charts.jsonl`: rules were made by looking at the first only. The
file has links to the charts, not the charts: each names its repository, commit, path and SHA-256.
FOLDER holds them under their own names, in any folders below it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks.preparing.links import Link, Score
from groundkern.trainer.data.finding import occurrences
from groundkern.trainer.data.images import load_rgb
from groundkern.trainer.prepare.arguments import ENGINES, add_choice
from groundkern.trainer.prepare.marks.frames import read_chart
from groundkern.trainer.prepare.marks.grouping import PrintedWord
from groundkern.trainer.prepare.marks.matching import Match, PrintedText
from groundkern.trainer.prepare.ocr.settings import OcrSettings

LABELS = Path(__file__).with_suffix(".jsonl")


@dataclass(frozen=True)
class Labelled:
    """An answer about a chart and the places its phrases are printed in."""

    image: str
    sha256: str
    half: str
    style: str
    question: str
    answer: str
    links: tuple[Link, ...]
    allowed: tuple[Link, ...]


def labelled(path: Path = LABELS) -> Iterator[Labelled]:
    """The labels of a file, in order."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Labelled(
                Path(row["path"]).name,
                row["sha256"],
                row["half"],
                row["style"],
                row["question"],
                row["answer"],
                tuple(_link(row["answer"], each) for each in row["regions"]),
                tuple(_link(row["answer"], each) for each in row["allowed"]),
            )


def _link(answer: str, region: dict[str, Any]) -> Link:
    start, stop = occurrences(region["text"], answer)[region.get("occurrence", 0)]
    return Link(start, stop, tuple(region["box"]))


def images_of(folder: Path, wanted: dict[str, str]) -> dict[str, Path]:
    """Where below `folder` the wanted images are: SHA-256 to path; others' names do not matter.

    Args:
        folder: looked through with all its folders.
        wanted: file names by SHA-256.
    """
    names = set(wanted.values())
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in names and path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in wanted:
                found[digest] = path
    return found


class Words:
    """The words of images: from a file, or by OCR and then kept in it."""

    def __init__(self, read: Callable[[Path], list[PrintedWord]], kept: Path | None) -> None:
        self._read, self._kept = read, kept
        self._known: dict[str, list] = {}
        if kept is not None and kept.exists():
            self._known = json.loads(kept.read_text(encoding="utf-8"))

    def of(self, digest: str, path: Path) -> list[PrintedWord]:
        """The words of the image at `path`, whose SHA-256 is `digest`."""
        if digest not in self._known:
            self._known[digest] = [[word.text, word.box, word.line] for word in self._read(path)]
            if self._kept is not None:
                self._kept.write_text(json.dumps(self._known), encoding="utf-8")
        return [PrintedWord(text, tuple(box), line=line) for text, box, line in self._known[digest]]


def reader(ocr: OcrSettings, *, keep_lines: bool, min_confidence: float = 0.3) -> Callable:
    """Reads the file of an image as `prepare marks` does."""

    def read(path: Path) -> list[PrintedWord]:
        with Image.open(path) as opened:
            size = opened.size
        image = load_rgb(path, size, where=str(path), field="image")
        words = read_chart(image, ocr, keep_lines=keep_lines)
        return [
            PrintedWord(word.text, word.box, line=word.line)
            for word in words
            if word.confidence >= min_confidence
        ]

    return read


def measure(
    labels: list[Labelled],
    paths: dict[str, Path],
    words: Words,
    match: Callable[[list[PrintedWord], Labelled], list[Match]],
    show: Path | None = None,
) -> dict[str, Score]:
    """Scores by half and by style, and of all together.

    Args:
        labels: what is true.
        paths: where the images are; labels of other images are left out.
        words: of an image.
        match: finds the phrases of an answer among words.
        show: gets a picture of each answer, true links green, found ones red.
    """
    scores: dict[str, Score] = defaultdict(Score)
    seen: Counter[str] = Counter()
    for label in labels:
        if label.sha256 not in paths:
            continue
        matches = match(words.of(label.sha256, paths[label.sha256]), label)
        where = f"{label.image} ({seen[label.image]})"
        for name in (label.half, f"{label.half}, {label.style}", "all"):
            scores[name].add(label.answer, label.links, matches, where, label.allowed)
        if show is not None:
            _draw(paths[label.sha256], label, matches, show / f"{where}.png")
        seen[label.image] += 1
    return dict(scores)


def _draw(path: Path, label: Labelled, matches: list[Match], to: Path) -> None:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    draw = ImageDraw.Draw(image)
    for link in label.links:
        draw.rectangle(link.box, outline="green", width=2)
    for match in matches:
        for place in match.places:
            draw.rectangle(place.box, outline="red")
            phrase = label.answer[match.start : match.stop]
            draw.text(place.box[:2], phrase.encode("latin-1", "replace").decode("latin-1"), "red")
    image.save(to)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing.real_charts")
    parser.description = "Precision and recall of marks on real charts labelled by hand."
    parser.add_argument("folder", type=Path, help="with the images that the labels name")
    add_choice(parser, "--engine", ENGINES, "OCR")
    parser.add_argument(
        "--keep-lines", action="store_true", help="tesseract: read with frames, axes and bars"
    )
    parser.add_argument("--words", type=Path, help="file the words are kept in, or taken from")
    add_choice(parser, "--ambiguous", ("drop", "union"), "a text in several places")
    add_choice(parser, "--scales", ("last", "keep", "drop"), "ticks of an axis")
    parser.add_argument("--wrong", action="store_true", help="print every wrong link")
    parser.add_argument("--half", choices=("development", "held out"), help="only this one")
    parser.add_argument("--show", type=Path, help="folder for pictures of all links")
    arguments = parser.parse_args(words)
    labels = [label for label in labelled() if arguments.half in (None, label.half)]
    wanted = {label.sha256: label.image for label in labels}
    paths = images_of(arguments.folder, wanted)
    if arguments.show:
        arguments.show.mkdir(parents=True, exist_ok=True)
    ocr = OcrSettings(engine=arguments.engine, page_mode=11)
    read = reader(ocr, keep_lines=arguments.keep_lines)

    def match(printed: list[PrintedWord], label: Labelled) -> list[Match]:
        text = PrintedText(printed, scales=arguments.scales)
        return text.matches(label.answer, arguments.ambiguous, question=label.question)

    scores = measure(labels, paths, Words(read, arguments.words), match, arguments.show)
    print(f"{len(paths)} of {len(wanted)} images found")
    for name in sorted(scores):
        print(f"{name}: {scores[name]}")
    if arguments.wrong and "all" in scores:
        print("\n".join(scores["all"].wrong))
    return 0


if __name__ == "__main__":
    sys.exit(main())
