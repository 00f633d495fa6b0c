"""What a style writes around the numbers of places: labels, tags, lists, objects.

A layout takes the numbers of each place as text, and says where in what it wrote they and their
label stand.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from groundkern.trainer.places.patterns import Numbers, Span


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


class _Draft:
    """A text that grows, and knows where its parts are."""

    def __init__(self) -> None:
        self.text = ""

    def add(self, text: str) -> Span:
        start, self.text = len(self.text), self.text + text
        return start, len(self.text)


def tags(
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


def label_behind(places: Texts) -> Written:
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


def json_list(box: str, point: str) -> Layout:
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


def points(places: Texts) -> Written:
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


def coords(places: Texts) -> Written:
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


def lists(places: Texts) -> Written:
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
