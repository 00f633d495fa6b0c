"""How each family of models writes boxes and points: a row of `STYLES` for each.

A style has a grid, on which a box is rounded, and a layout, which puts numbers, labels and tags
together. What is written is read again before it is handed out, so that a label that a style cannot
hold (one with its closing tag in it) is an error and never another label.

Sources: the model cards and processors of the families; docs/boxes.md has an example of each.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, floor
from typing import Literal, NamedTuple

from trainer.places.notations import CELLS, Mark, Numbers, Span, marks_in

Size = tuple[int, int]


class Place(NamedTuple):
    """A box (x0, y0, x1, y1) or a point (x, y) in fractions of the image, and its label."""

    numbers: Numbers
    label: str | None = None


class Part(NamedTuple):
    """Where a place's numbers and its label stand in what was written."""

    numbers: Span
    label: Span | None


class Written(NamedTuple):
    """A text, and the parts of it that belong to each place."""

    text: str
    parts: tuple[Part, ...]


Texts = Sequence[tuple[str, Place]]
"""The numbers of each place as text."""
Layout = Callable[[Texts], Written]


@dataclass(frozen=True)
class Grid:
    """The whole numbers that a style has for a side of an image.

    Args:
        steps: into which a side is divided; None: its pixels.
        last: the largest number; None: `steps`.
        rounding: "nearest" edge of a step; the step that an edge is in ("inside"); the first and
            the last step that a box touches ("cells").
    """

    steps: int | None
    last: int | None = None
    rounding: Literal["nearest", "inside", "cells"] = "nearest"

    def ticks(self, numbers: Numbers, size: Size | None) -> tuple[int, ...]:
        """The numbers on the grid; a box keeps a step of width and height."""
        found = [0] * len(numbers)
        for axis in (0, 1):
            steps = self.steps or size[axis]
            last = steps if self.last is None else self.last
            low = self._tick(numbers[axis] * steps, last)
            found[axis] = low
            if len(numbers) == 4 and self.rounding == "cells":
                high = ceil(numbers[axis + 2] * steps - 1)
                found[axis + 2] = min(max(high, low), last)
            elif len(numbers) == 4:
                high = max(self._tick(numbers[axis + 2] * steps, last), min(low + 1, last))
                found[axis], found[axis + 2] = min(low, high - 1), high
        return tuple(found)

    def _tick(self, value: float, last: int) -> int:
        whole = round(value) if self.rounding == "nearest" else floor(value)
        return min(max(whole, 0), last)


@dataclass(frozen=True)
class Style:
    """How a family writes places.

    Args:
        name: on the command line.
        notations: the names of those that it is read as.
        grid: of its numbers.
        box, point: the numbers of a place with `{0}` for x0 or x, `{1}` for y0 or y, `{2}` for x1
            and `{3}` for y1 (`#`: the number of the place); None: the style has none.
        layout: what is written around them.
        unit: of numbers that the notation leaves open: "resized", "pixel", "unit" or "per_mille".
        number: a tick as it is written.
        families: values of `model_type` in config.json of the models that write so.
        has_labels: whether a label is a part of what is written.
    """

    name: str
    notations: tuple[str, ...]
    grid: Grid
    box: str | None
    point: str | None
    layout: Layout
    unit: str | None = None
    number: Callable[[int], object] = int
    families: tuple[str, ...] = ()
    has_labels: bool = True

    @property
    def in_pixels(self) -> bool:
        """Whether its numbers depend on the size of the image."""
        return self.grid.steps is None

    def can(self, place: Place) -> bool:
        """Whether the style has boxes, or points."""
        return (self.box if len(place.numbers) == 4 else self.point) is not None

    def write(self, places: Sequence[Place], size: Size | None = None) -> Written:
        """Places as the family writes them, with their labels.

        Args:
            places: at least one; those with the same label stand together if they follow each
                other.
            size: (width, height) that the pixels of `unit` are those of; None: it has no pixels.

        Returns:
            The text, and where in it each place stands.

        Raises:
            ValueError: the style has no boxes, no points, or cannot hold a label.
        """
        named = [
            Place(place.numbers, (place.label or "").strip() or None)
            if self.has_labels
            else Place(place.numbers)
            for place in places
        ]
        written = self.layout([(self._text(place, size), place) for place in named])
        read = [(mark.span, mark.label and mark.label.text) for mark in self.read(written.text)]
        for i, (place, part) in enumerate(zip(named, written.parts, strict=True)):
            if read[i : i + 1] != [(part.numbers, place.label)] or len(read) != len(named):
                raise ValueError(
                    f"expected a label that {self.name} can hold, got {place.label!r:.80}"
                )
        return written

    def read(self, text: str) -> list[Mark]:
        """The places of a text in this style's notation."""
        return marks_in(text, only=self.notations)

    def _text(self, place: Place, size: Size | None) -> str:
        form = self.box if len(place.numbers) == 4 else self.point
        if form is None:
            what = "points" if self.box is None else "boxes"
            raise ValueError(f"expected {what}, which are all that {self.name} has")
        ticks = self.grid.ticks(place.numbers, size)
        if self.grid.rounding == "cells":
            x0, y0, x1, y1 = ticks
            ticks = y0 * CELLS + x0, y1 * CELLS + x1
        return form.format(*map(self.number, ticks))


class _Draft:
    """A text that grows, and knows where its parts are."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, text: str) -> Span:
        start, self.text = len(self.text), self.text + text
        return start, len(self.text)


def _tags(
    ref: tuple[str, str],
    tag: tuple[str, str],
    joiner: str | None = None,
    between: str = ", ",
) -> Layout:
    """A label in tags, then its boxes in tags: all in one pair with `joiner`, or one each."""

    inner = tag[1] + tag[0] if joiner is None else joiner

    def layout(places: Texts) -> Written:
        draft, parts = _Draft(), []
        for label, texts in _by_label(places):
            draft.add(between if draft.text else "")
            span = None
            if label is not None:
                draft.add(ref[0])
                span = draft.add(label)
                draft.add(ref[1])
            draft.add(tag[0])
            for i, text in enumerate(texts):
                draft.add(inner if i else "")
                parts.append(Part(draft.add(text), span))
            draft.add(tag[1])
        return Written(draft.text, tuple(parts))

    return layout


def _label_behind(places: Texts) -> Written:
    """PaliGemma: numbers, label; numbers, label."""
    draft, parts = _Draft(), []
    for text, place in places:
        draft.add(" ; " if draft.text else "")
        numbers, span = draft.add(text), None
        if place.label is not None:
            draft.add(" ")
            span = draft.add(place.label)
        parts.append(Part(numbers, span))
    return Written(draft.text, tuple(parts))


def _json(box: str, point: str) -> Layout:
    """A list of objects, as json.dumps writes it."""

    def layout(places: Texts) -> Written:
        draft, parts = _Draft(), []
        draft.add("[")
        for text, place in places:
            draft.add(", " if parts else "")
            draft.add(f'{{"{box if len(place.numbers) == 4 else point}": ')
            numbers, span = draft.add(text), None
            if place.label is not None:
                draft.add(', "label": "')
                span = draft.add(json.dumps(place.label, ensure_ascii=False)[1:-1])
                draft.add('"')
            draft.add("}")
            parts.append(Part(numbers, span))
        draft.add("]")
        return Written(draft.text, tuple(parts))

    return layout


def _points(places: Texts) -> Written:
    """Molmo: a tag with the points of a label, and the label in it and in `alt`."""
    draft, parts = _Draft(), []
    for label, texts in _by_label(places):
        name, alone = ("point", True) if len(texts) == 1 else ("points", False)
        draft.add(f"{' ' if draft.text else ''}<{name}")
        spans = []
        for i, text in enumerate(texts, start=1):
            draft.add(" ")
            spans.append(draft.add(text.replace("#", "" if alone else str(i))))
            draft.add('"')
        draft.add("" if label is None else f' alt="{html.escape(label)}"')
        draft.add(">")
        span = None if label is None else draft.add(html.escape(label, quote=False))
        draft.add(f"</{name}>")
        parts += [Part(numbers, span) for numbers in spans]
    return Written(draft.text, tuple(parts))


def _coords(places: Texts) -> Written:
    """Molmo 2: the first image's number, then number, x, y of each point of a label."""
    draft, parts = _Draft(), []
    for label, texts in _by_label(places):
        draft.add(f'{" " if draft.text else ""}<points coords="1')
        spans = []
        for i, text in enumerate(texts, start=1):
            draft.add(" ")
            spans.append(draft.add(text.replace("#", str(i))))
        draft.add('">')
        span = None if label is None else draft.add(html.escape(label, quote=False))
        draft.add("</points>")
        parts += [Part(numbers, span) for numbers in spans]
    return Written(draft.text, tuple(parts))


def _lists(places: Texts) -> Written:
    """The numbers alone."""
    draft, parts = _Draft(), []
    for text, _ in places:
        draft.add(" " if parts else "")
        parts.append(Part(draft.add(text), None))
    return Written(draft.text, tuple(parts))


def _by_label(places: Texts) -> Iterator[tuple[str | None, list[str]]]:
    """The texts of places that follow each other under one label."""
    for label, pairs in groupby(places, key=lambda pair: pair[1].label):
        yield label, [text for text, _ in pairs]


_MILLE = Grid(1000)
_LIST, _PAIR = "[{0}, {1}, {2}, {3}]", "[{0}, {1}]"
_CORNERS, _POINT = "({0},{1}),({2},{3})", "({0},{1})"
_QWEN_JSON = _json("bbox_2d", "point_2d")
_BBOX = ("bbox_2d", "point_2d")
_ROWS = (
    Style("per_mille", ("list",), _MILLE, _LIST, _PAIR, _lists, unit="per_mille", has_labels=False),
    Style(
        "unit",
        ("list",),
        _MILLE,
        _LIST,
        _PAIR,
        _lists,
        unit="unit",
        has_labels=False,
        number=lambda tick: tick / 1000,
        families=("llava", "llava_next", "llava_onevision", "vipllava"),
    ),
    Style("pixel", ("list",), Grid(None), _LIST, _PAIR, _lists, unit="pixel", has_labels=False),
    Style(
        "qwen",
        ("box",),
        _MILLE,
        _CORNERS,
        _POINT,
        _tags(("<ref>", "</ref>"), ("<box>", "</box>")),
        families=("qwen",),
    ),
    Style(
        "qwen2",
        ("box",),
        _MILLE,
        _CORNERS,
        _POINT,
        _tags(("<|object_ref_start|>", "<|object_ref_end|>"), ("<|box_start|>", "<|box_end|>")),
        families=("qwen2_vl",),
    ),
    Style(
        "qwen2.5",
        _BBOX,
        Grid(None),
        _LIST,
        _PAIR,
        _QWEN_JSON,
        unit="resized",
        families=("qwen2_5_vl", "qwen2_5_omni"),
    ),
    Style(
        "qwen3",
        _BBOX,
        _MILLE,
        _LIST,
        _PAIR,
        _QWEN_JSON,
        unit="per_mille",
        families=("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_5", "qwen3_5_moe"),
    ),
    Style(
        "internvl",
        ("box",),
        _MILLE,
        _LIST,
        None,
        _tags(("<ref>", "</ref>"), ("<box>[", "]</box>"), ", "),
        families=("internvl", "internvl_chat"),
    ),
    Style(
        "minicpm",
        ("box",),
        _MILLE,
        "{0} {1} {2} {3}",
        None,
        _tags(("<ref>", "</ref>"), ("<box>", "</box>")),
        families=("minicpmv",),
    ),
    Style(
        "paligemma",
        ("paligemma",),
        Grid(1024, 1023),
        "<loc{1:04}><loc{0:04}><loc{3:04}><loc{2:04}>",
        None,
        _label_behind,
        families=("paligemma",),
    ),
    Style(
        "florence2",
        ("florence2",),
        Grid(1000, 999, "inside"),
        "<loc_{0}><loc_{1}><loc_{2}><loc_{3}>",
        None,
        _tags(("", ""), ("", ""), "", ""),
        families=("florence2",),
    ),
    Style(
        "kosmos2",
        ("kosmos2",),
        Grid(CELLS, CELLS - 1, "cells"),
        "<patch_index_{0:04}><patch_index_{1:04}>",
        None,
        _tags(
            ("<phrase>", "</phrase>"), ("<object>", "</object>"), "</delimiter_of_multi_objects/>"
        ),
        families=("kosmos-2", "kosmos-2.5"),
    ),
    Style(
        "deepseek",
        ("deepseek",),
        Grid(999),
        _LIST,
        None,
        _tags(("<|ref|>", "<|/ref|>"), ("<|det|>[", "]<|/det|>"), ", "),
        families=("deepseek_vl_v2", "deepseek_ocr2"),
    ),
    Style(
        "gemini",
        ("box_2d", "point"),
        _MILLE,
        "[{1}, {0}, {3}, {2}]",
        "[{1}, {0}]",
        _json("box_2d", "point"),
        families=("gemma3", "gemma3n", "gemma4"),
    ),
    Style(
        "molmo",
        ("molmo",),
        _MILLE,
        None,
        'x#="{0}" y#="{1}',
        _points,
        number=lambda tick: tick / 10,
        families=("molmo",),
    ),
    Style("molmo2", ("molmo2",), _MILLE, None, "# {0:03} {1:03}", _coords, families=("molmo2",)),
)
STYLES = {style.name: style for style in _ROWS}
"""Every style by its name; the first is the default of templates."""
