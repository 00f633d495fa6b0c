"""Boxes and points in a text, in every notation of the models that we know, and where they stand.

Most notations say themselves what their numbers count: `<loc0512>` is one of 1024, a `<box>` is in
thousandths. In lists (`[100, 100, 300, 300]`) and in JSON with `bbox_2d` nothing does, and the
caller has to know it. docs/data/boxes.md has a table with an example of each.

A notation is a pattern of the numbers and a pattern of the *item* that they belong to: the label
with its tags, the object of a JSON list.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from groundkern.trainer.places.patterns import (
    FOUR,
    LONGEST,
    ONE,
    TWO,
    Item,
    Items,
    Label,
    Numbers,
    Places,
    Scale,
    Span,
    bare,
    between,
    bins,
    florence,
    key,
    kosmos,
    listed,
    matched,
    molmo,
    molmo2,
    objects,
    several,
    tagged,
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A box or a point that a text writes.

    Args:
        numbers: x0, y0, x1, y1 of a box, x, y of a point.
        whole: what the numbers are out of, across and down; None: the notation does not say.
        span: of the numbers in the text, with brackets directly around them.
        item: of the whole that stands for the thing: numbers, tags, label.
        label: the words that it belongs to, where the notation has any.
        key: of the numbers, where they are a value of a JSON object; else "".
        extra: how many values the object has besides the numbers and the label.
        image: the image that the text names, from 0; None: it names none.
    """

    numbers: Numbers
    whole: Scale | None
    span: Span
    item: Span
    label: Label | None = None
    key: str = ""
    extra: int = 0
    image: int | None = None

    @property
    def is_box(self) -> bool:
        return len(self.numbers) == 4

    def fractions(self, whole: Scale) -> Numbers:
        """The numbers in fractions of the image, of which they are out of `whole`."""
        return tuple(number / whole[i % 2] for i, number in enumerate(self.numbers))


@dataclass(frozen=True)
class Notation:
    """How some models write boxes, or points.

    Args:
        name: of the family that has it, or what it looks like.
        places: the numbers of a text, their whole and their span.
        items: what the places may belong to, in the order of the text; None: to nothing.
        key: as of `Mark`.
        plain: nothing but numbers tells it, so that it may also be something else.
    """

    name: str
    places: Places
    items: Items | None = None
    key: str = ""
    plain: bool = False

    def find(self, text: str) -> Iterator[Mark]:
        """The marks of a text in their order, also those whose corners are swapped."""
        places = list(self.places(text))
        items = list(self.items(text)) if places and self.items is not None else []
        starts = [item.start for item in items]
        for numbers, whole, (start, stop) in places:
            at = bisect_right(starts, start) - 1
            item = items[at] if at >= 0 and stop <= items[at].stop else Item(start, stop, None)
            image = None
            if self.name == "molmo2":  # an image's number, then the point's, x and y
                image, numbers = int(numbers[0]) - 1, numbers[1:]
            yield Mark(
                numbers,
                whole,
                (start, stop),
                (item.start, item.stop),
                item.label,
                self.key,
                item.extra,
                image,
            )


_BOX = (r"(?:<box>|<\|box_start\|>)", r"(?:</box>|<\|box_end\|>)")
_REF = (r"(?:<ref>|<\|object_ref_start\|>)", r"(?:</ref>|<\|object_ref_end\|>)")
_DET, _DET_REF = (r"<\|det\|>", r"<\|/det\|>"), (r"<\|ref\|>", r"<\|/ref\|>")
_TAGS = matched(f"(?P<item>{between(*_REF)}{several(*_BOX)})")
references = matched(
    rf"(?P<item>(?:<ref>|<\|object_ref_start\|>|<\|ref\|>|<phrase>)(?P<label>[^<]{{1,{LONGEST}}})"
    r"(?:</ref>|<\|object_ref_end\|>|<\|/ref\|>|</phrase>))"
)
"""Labels in the tags of any family, with a box or without."""
_PATCHES = r"(?:<patch_index_\d{4}>){2}"
_KOSMOS = matched(
    f"(?P<item>{between('<phrase>', '</phrase>')}<object>{_PATCHES}"
    f"(?:</delimiter_of_multi_objects/>{_PATCHES}){{0,500}}</object>)"
)
_LOC = matched(
    r"(?:\A|[;\n])[ \t]{0,9}(?P<item>(?:<loc\d{4}>){4}"
    rf"(?P<label>[^<;\n]{{1,{LONGEST}}}))(?=[<;\n]|\Z)"
)
_FLORENCE = matched(
    rf"(?:(?<=[<>\n])|\A)(?P<item>(?P<label>[^<>\n]{{1,{LONGEST}}})(?:<loc_\d{{1,4}}>){{4,4000}})"
)
_MOLMO = matched(
    rf"(?P<item><points?\s[^<>]{{0,20000}}>(?P<label>[^<]{{0,{LONGEST}}})</points?>)", html.unescape
)
_FIRST, _LAST = (
    r"(?<![\])],)(?<![\])], )",
    r"(?!\s{0,9},\s{0,9}[\[(])",
)  # two of two: a third is no box
_PIXELS = ("bbox_2d", "bbox", "box", "bounding_box")

BOXES = (
    Notation("paligemma", bins(r"<loc(\d{4})>", 1024, flipped=True), _LOC),
    Notation("florence2", florence, _FLORENCE),
    Notation("kosmos2", kosmos, _KOSMOS),
    Notation(
        "deepseek",
        tagged(*_DET, 999.0, 4),
        matched(f"(?P<item>{between(*_DET_REF)}{several(*_DET)})"),
    ),
    Notation("box", tagged(*_BOX, 1000.0, 4), _TAGS),
    Notation(
        "box_2d",
        listed(rf"{key('box_2d')}\[{FOUR}\]", flipped=True, whole=1000.0),
        objects,
        key="box_2d",
    ),
    Notation("bbox_2d", listed(rf"{key(*_PIXELS)}\[{FOUR}\]"), objects, key="bbox_2d"),
    Notation(
        "list",
        listed(
            rf"(?<=[\[(;]){FOUR}(?=[\]);])"
            rf"|{_FIRST}\({TWO}\)\s{{0,20}},?\s{{0,20}}\({TWO}\){_LAST}"
            rf"|{_FIRST}\[{TWO}\]\s{{0,20}},\s{{0,20}}\[{TWO}\]{_LAST}"
        ),
    ),
    Notation("numbers", bare(4), plain=True),
)
"""Notations of boxes: the first of which a text has a box is the text's."""

POINTS = (
    Notation("molmo2", molmo2, _MOLMO),
    Notation("molmo", molmo, _MOLMO),
    Notation("box", tagged(*_BOX, 1000.0, 2), _TAGS),
    Notation(
        "point",
        listed(rf"{key('point')}\[{TWO}\]", flipped=True, whole=1000.0),
        objects,
        key="point",
    ),
    Notation("point_2d", listed(rf"{key('point_2d')}\[{TWO}\]"), objects, key="point_2d"),
    Notation("xy", listed(rf"\bx\s{{0,20}}[=:]{ONE},?\s{{0,20}}y\s{{0,20}}[=:]{ONE}")),
    Notation("list", listed(rf"[\[(]{TWO}[\])]"), plain=True),
    Notation("numbers", bare(2), plain=True),
)
"""Notations of points, likewise."""


_DIGIT = re.compile(r"\d")


def sound(mark: Mark) -> bool:
    """Whether a mark is a point, or a box with its corners in order and an area."""
    if not mark.is_box:
        return True
    x0, y0, x1, y1 = mark.numbers
    return x0 < x1 and y0 < y1


def marks_in(text: str, *, only: Collection[str] = ()) -> list[Mark]:
    """The boxes of a text, and its points that are no part of them, in the order of the text.

    Args:
        text: anything.
        only: the names of notations; none: of those that nothing else looks like.

    Returns:
        Of the first notation that the text has a box of, and of the first that it has a point of;
        swapped corners and boxes without an area too.
    """
    if not _DIGIT.search(text):  # most turns of a chat
        return []
    boxes = _first(BOXES, text, only)
    starts = [mark.span[0] for mark in boxes]

    def free(mark: Mark) -> bool:
        at = bisect_right(starts, mark.span[1] - 1) - 1
        return at < 0 or boxes[at].span[1] <= mark.span[0]

    points = [mark for mark in _first(POINTS, text, only) if free(mark)]
    return sorted([*boxes, *points], key=lambda mark: mark.span)


def _first(notations: tuple[Notation, ...], text: str, only: Collection[str]) -> list[Mark]:
    """The marks of the first notation with a sound one; without any, the first unsound ones."""
    unsound: list[Mark] = []
    for notation in notations:
        if notation.name in only or not (only or notation.plain):
            marks = list(notation.find(text))
            if any(map(sound, marks)):
                return marks
            unsound = unsound or marks
    return unsound
