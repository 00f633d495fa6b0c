"""Boxes in the messages of a sample: regions of the answers, and the style they are written in."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from groundkern.hf.data.example import message_text
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.finding import occurrences
from groundkern.trainer.places.kinds import LOOKED_AT, Kinds
from groundkern.trainer.places.patterns import Span
from groundkern.trainer.places.styles import STYLES
from groundkern.trainer.places.units import UNITS, Size
from groundkern.trainer.places.writing import Writer, resized_of
from groundkern.trainer.prepare.boxes import finding, rewriting
from groundkern.trainer.prepare.boxes.finding import Found, Reading
from groundkern.trainer.prepare.boxes.rewriting import Rewritten, rewrite

TITLES = {**finding.TITLES, **rewriting.TITLES}
Sized = tuple[Mapping[str, Any], Sequence[Size], str]
"""A canonical record, the sizes of its images, and what it is called."""
IMAGE_ROOT = "further folders that images of another program's file may be in, by absolute paths"
TIES = ("both", "label", "numbers")


def add_arguments(parser: Any) -> None:
    """Adds `--boxes`, `--coord` and `--tie`; `--box-style` and `--model` are `add_style`'s."""
    add_boxes(parser)
    add_coord(parser)
    parser.add_argument(
        "--tie",
        choices=TIES,
        default=TIES[0],
        help="what of an answer is tied to a box in it: its label and its numbers, or one of them",
    )


def add_coord(parser: Any) -> None:
    """Adds `--coord`."""
    parser.add_argument(
        "--coord",
        choices=tuple(UNITS),
        help="what numbers of boxes in answers count that do not say so: "
        + "; ".join(f"{name}: {text}" for name, text in UNITS.items()),
    )


def add_boxes(parser: Any) -> None:
    """Adds `--boxes`."""
    parser.add_argument(
        "--boxes",
        default="auto",
        metavar="STYLE",
        help="boxes in answers that become regions: auto (whatever says itself what its numbers "
        f"count, and lists if --coord is given), none, or one of {', '.join(STYLES)}",
    )


@dataclass(frozen=True)
class BoxSettings:
    """What becomes of boxes and points in messages: `record, counts = settings(record, ...)`.

    Args:
        reading: how they are read; None: they are not.
        writer: the style that they are written in; None: as they are.
        tie: "label", "numbers" or "both": what of an answer is tied to a place; the numbers if it
            has no label.
        prefix: of the options in warnings: `--coord`, `--data.coord`.
    """

    reading: Reading | None = field(default_factory=Reading)
    writer: Writer | None = None
    tie: str = "both"
    prefix: str = "--"

    @classmethod
    def read_as(
        cls,
        name: str,
        coord: str | None,
        model: str | Path | None,
        *,
        overhang: float = 0.01,
        prefix: str = "--",
    ) -> BoxSettings:
        """The settings of `--boxes` and `--coord`, with everything else as it is by default.

        Args:
            name: "auto", "none" or a style.
            coord: of `UNITS`, or None.
            model: the folder of the model whose processor decides what resized pixels are.
            overhang: see `Reading`.
            prefix: see above.

        Raises:
            ConfigError: an unknown style, or no model where one is needed.
        """
        if name not in ("auto", "none", *STYLES):
            known = ", ".join(("auto", "none", *STYLES))
            raise ConfigError(f"`{prefix}boxes`: expected one of {known}, got {name!r:.80}")
        if name == "none":
            return cls(None, prefix=prefix)
        option = f"{prefix}coord resized" if coord else f"{prefix}boxes {name}"
        reading = Reading(name, coord, resized_of(_unit(name, coord), model, option), overhang)
        return cls(reading, prefix=prefix)

    @property
    def identity(self) -> list[Any]:
        """Plain values that differ when boxes are read in another way."""
        if self.reading is None:
            return []
        resized = self.reading.resized
        pixels = resized and [resized.factor, resized.least, resized.most]
        return [self.reading.notation, self.reading.coord, pixels]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> BoxSettings:
        """The settings of parsed arguments.

        Raises:
            ConfigError: an unknown style, no model where one is needed, options that contradict
                each other.
        """
        name, coord = arguments.boxes, arguments.coord
        style, model, writer = arguments.box_style, arguments.model, None
        if style not in (None, "keep"):
            if name == "none":
                raise ConfigError(
                    "`--box-style`: expected none with --boxes none, which reads none"
                )
            writer = Writer.of(style, model)
            resized = _unit(name, coord) == "resized"
            if style == "auto" and resized and writer.rules.unit != "resized":
                raise ConfigError(
                    "`--box-style`: expected a style by its name, and --model the one whose pixels "
                    f"the boxes count, got auto of {model}, which writes {writer.style}"
                )
        read = cls.read_as(name, coord, model, overhang=arguments.overhang)
        return replace(read, writer=writer, tie=arguments.tie)

    def __call__(
        self, record: Mapping[str, Any], sizes: Sequence[Size], where: str
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """A canonical record with the regions of its boxes, and what `TITLES` counts.

        Regions that are there stay; one of the same words is not made again. Spans move with their
        words where a message is written anew.

        Args:
            record: of docs/data/data-format.md.
            sizes: (width, height) of its images, EXIF rotation applied.
            where: what it is called, such as `train.jsonl:17`.
        """
        if self.reading is None:
            return dict(record), {}
        counts: Counter = Counter()
        messages = [dict(message) for message in record["messages"]]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        tied = {name: list(record[name]) for name in ("regions", "phrases") if name in record}
        found_in = {
            turn: self.reading.find(message_text(message), sizes, where, counts)
            for turn, message in enumerate(messages)
            if message["role"] in ("user", "assistant")
        }
        for turn, found in found_in.items():
            message, text = messages[turn], message_text(messages[turn])
            if turn in answers and found:
                there = {_words(region, answers) for region in tied.get("regions", ())}
                added = [
                    {"char_span": list(span), **_place(each, turn, answers, sizes)}
                    for each in found
                    for span in self._spans(each)
                ]
                added = [region for region in added if _words(region, answers) not in there]
                if added:
                    tied["regions"] = [*tied.get("regions", ()), *added]
                counts["boxes_read"] += sum(each.numbers is not None for each in found)
                counts["regions"] += len(added)
            if self.writer is not None and any(found_in.values()):
                changed = rewrite(text, found, sizes, self.writer, counts)
                if changed.edits:
                    message["content"] = _with(message["content"], changed)
                    for name, spans in tied.items():
                        tied[name] = [_moved(span, turn, answers, changed) for span in spans]
        return {**record, "messages": messages, **tied}, {k: n for k, n in counts.items() if n}

    def warnings(self, records: Iterable[Sized]) -> list[str]:
        """What a look at the first records of a file says against what is read here.

        Args:
            records: canonical records, the sizes of their images, and what they are called; of
                these `LOOKED_AT` are looked at.

        Returns:
            A sentence for each thing to warn of, which names the first record that shows it.
        """
        if self.reading is None:
            return []
        kinds, thousandths, first = Kinds(self.reading.unit), Kinds("per_mille"), {}
        for record, sizes, where in islice(records, LOOKED_AT):
            for message in record["messages"]:
                if message["role"] in ("user", "assistant"):
                    text, counts = message_text(message), Counter()
                    self.reading.look(text, sizes, where, kinds, thousandths)
                    self.reading.find(text, sizes, where, counts)
                    for name in counts:
                        first.setdefault(name, where)
        coord = f"{self.prefix}coord"
        said = [kinds.warning(coord), thousandths.warning(f"{self.prefix}boxes STYLE {coord}")]
        if said[0]:  # which says the same with a reason
            first.pop("boxes_unknown", None)
        said += [f"{where}: the first of {finding.TITLES[name]}" for name, where in first.items()]
        return [sentence for sentence in said if sentence]

    def _spans(self, found: Found) -> list[Span]:
        """What is tied to a place."""
        if found.numbers is None:
            return []
        label = found.mark.label
        if label is None or self.tie == "numbers":
            return [found.mark.span]
        words = (label.start, label.stop)
        return [words] if self.tie == "label" else [words, found.mark.span]


def _unit(name: str, coord: str | None) -> str | None:
    """What numbers count that do not say so, by `--boxes` and `--coord`."""
    return coord or (STYLES[name].unit if name in STYLES else None)


def _place(found: Found, turn: int, answers: list[int], sizes: Sequence[Size]) -> dict[str, Any]:
    """The fields of a region that say where: pixels of the image, to a thousandth."""
    where: dict[str, Any] = {} if len(answers) == 1 else {"turn": turn}
    if len(sizes) > 1:
        where["image"] = found.image
    sides = sizes[found.image]
    pixels = [round(value * sides[i % 2], 3) for i, value in enumerate(found.numbers)]
    return where | ({"box": pixels} if found.mark.is_box else {"points": [pixels]})


def _words(region: Mapping[str, Any], answers: list[int]) -> tuple:
    """What tells whether two regions have the same words."""
    turn = region.get("turn", answers[0])
    return turn, tuple(region.get("char_span") or ()), region.get("text"), region.get("occurrence")


def _moved(
    span: Mapping[str, Any], turn: int, answers: list[int], changed: Rewritten
) -> dict[str, Any]:
    """A region or phrase whose words are in a message that was written anew."""
    moved = dict(span)
    if span.get("turn", answers[0]) != turn:
        return moved
    at = span.get("char_span")
    if at is None and isinstance(span.get("text"), str) and span["text"]:
        found = occurrences(span["text"], changed.old)
        number = span.get("occurrence", 0)
        at = found[number] if number < len(found) else None
    if at is None:  # of no words, which `parse_sample` says better
        return moved
    for name in ("text", "occurrence"):
        moved.pop(name, None)
    return {**moved, "char_span": list(changed.moved(*at))}


def _with(content: str | list, changed: Rewritten) -> str | list:
    """A message's content with its text written anew; of several text parts, each its own."""
    if isinstance(content, str):
        return changed.text
    parts, start = [], 0
    for part in content:
        if part["type"] == "text":
            stop = start + len(part.get("text", ""))
            part = {**part, "text": changed.between(start, stop)}
            start = stop
        parts.append(part)
    return parts
