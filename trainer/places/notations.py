"""Boxes and points in a text, in every notation of the models that we know, and where they stand.

Most notations say themselves what their numbers count: `<loc0512>` is one of 1024, a `<box>` is in
thousandths. In lists (`[100, 100, 300, 300]`) and in JSON with `bbox_2d` nothing does, and the
caller has to know it. docs/boxes.md has a table with an example of each.

A notation is a pattern of the numbers and a pattern of the *item* that they belong to: the label
with its tags, the object of a JSON list. Every repetition in a pattern is bounded, and none of two
that follow each other can take the same character, so that no text takes long.
"""

from __future__ import annotations

import html
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

Numbers = tuple[float, ...]
Scale = tuple[float, float]
Span = tuple[int, int]

CELLS = 32  # of Kosmos-2, along each side
LONGEST = 300  # characters of a label

_N = r"\s{0,20}([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s{0,20}"
_BARE = _N.replace(r"\s{0,20}", "")
_FOUR = ",".join([_N] * 4)
_TWO = f"{_N},{_N}"
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?![\d.])")
_STRING = r'"(?:[^"\\\n]|\\.){0,1000}"|' + r"'(?:[^'\\\n]|\\.){0,1000}'"
_VALUE = rf"(?:{_STRING}|\[[^\[\]{{}}\"]{{0,400}}\]|[-+.\w]{{1,40}})"
_COLON = r"\s{0,20}:\s{0,20}"
_PAIR = re.compile(rf"[\"']([\w -]{{1,40}})[\"']{_COLON}({_VALUE})")
_SOME_PAIR = rf"[\"'][\w -]{{1,40}}[\"']{_COLON}{_VALUE}"
_OBJECT = re.compile(
    rf"\{{\s{{0,40}}{_SOME_PAIR}(?:\s{{0,40}},\s{{0,40}}{_SOME_PAIR}){{0,30}}\s{{0,40}},?\s{{0,40}}\}}"
)
LABELS = ("label", "text_content", "text", "name", "category")  # keys of an object's label


class Label(NamedTuple):
    """The words that a place belongs to: where they stand, and the text that they mean."""

    start: int
    stop: int
    text: str


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


class Item(NamedTuple):
    """What stands for a thing, or for several that share a label."""

    start: int
    stop: int
    label: Label | None
    extra: int = 0


Place = tuple[Numbers, Scale | None, Span]
Places = Callable[[str], Iterator[Place]]
Items = Callable[[str], Iterator[Item]]


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
        items = list(self.items(text)) if self.items is not None else []
        starts = [item.start for item in items]
        for numbers, whole, (start, stop) in self.places(text):
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


def _floats(groups: tuple[str | None, ...]) -> Numbers:
    return tuple(float(group) for group in groups if group is not None)


def _bins(pattern: str, count: int, offset: float = 0.0, *, flipped: bool = False) -> Places:
    """Four tokens of `count` bins; `offset`: where in its bin a number is."""
    compiled = re.compile(pattern * 4)

    def places(text: str) -> Iterator[Place]:
        for match in compiled.finditer(text):
            a, b, c, d = (value + offset for value in _floats(match.groups()))
            numbers = (b, a, d, c) if flipped else (a, b, c, d)
            yield numbers, (float(count), float(count)), match.span()

    return places


def _florence(text: str) -> Iterator[Place]:
    """Middles of 1000 bins. A run whose boxes are not all sound is corners of something else."""
    for run in re.finditer(r"(?:<loc_\d{1,4}>){4,4000}", text):
        found = [(m.span(), float(m[1]) + 0.5) for m in re.finditer(r"<loc_(\d+)>", run[0])]
        if len(found) % 4:
            continue
        boxes = [found[i : i + 4] for i in range(0, len(found), 4)]
        if all(box[0][1] < box[2][1] and box[1][1] < box[3][1] for box in boxes):
            for box in boxes:
                span = run.start() + box[0][0][0], run.start() + box[3][0][1]
                yield tuple(value for _, value in box), (1000.0, 1000.0), span


def _kosmos(text: str) -> Iterator[Place]:
    """From the middle of the first cell to that of the last; whole cells if they share a row."""
    for match in re.finditer(r"<patch_index_(\d{4})>" * 2, text):
        (y0, x0), (y1, x1) = (divmod(int(index), CELLS) for index in match.groups())
        ends = (0.0, 1.0) if x0 == x1 or y0 == y1 else (0.5, 0.5)
        numbers = (x0 + ends[0], y0 + ends[0], x1 + ends[1], y1 + ends[1])
        yield numbers, (float(CELLS), float(CELLS)), match.span()


def _tagged(opening: str, closing: str, whole: float, count: int) -> Places:
    """The numbers between two tags (or behind one that was never closed), `count` by `count`."""
    pattern = re.compile(f"{opening}([^<]{{0,1000}})(?:{closing}|$)")

    def places(text: str) -> Iterator[Place]:
        for match in pattern.finditer(text):
            found = [(m.span(), float(m[0])) for m in _NUMBER.finditer(match[1])]
            if len(found) % count:
                continue
            for i in range(0, len(found), count):
                part = found[i : i + count]
                span = match.start(1) + part[0][0][0], match.start(1) + part[-1][0][1]
                numbers = tuple(value for _, value in part)
                yield numbers, (whole, whole), _bracketed(text, span)

    return places


def _bracketed(text: str, span: Span) -> Span:
    """The span with the brackets directly around it."""
    start, stop = span
    around = text[max(0, start - 1) : start] in ("[", "(") and text[stop : stop + 1] in ("]", ")")
    return (start - 1, stop + 1) if around else span


def _listed(pattern: str, *, flipped: bool = False, whole: float | None = None) -> Places:
    """The groups of a pattern, four numbers or two; `flipped`: y before x."""
    compiled = re.compile(pattern)
    out_of = None if whole is None else (whole, whole)

    def places(text: str) -> Iterator[Place]:
        for match in compiled.finditer(text):
            given = [i for i in range(1, compiled.groups + 1) if match[i] is not None]
            values = [float(match[i]) for i in given]
            if flipped:
                values = [values[i ^ 1] for i in range(len(values))]
            span = match.start(given[0]), match.end(given[-1])
            yield tuple(values), out_of, _bracketed(text, span)

    return places


def _bare(count: int) -> Places:
    """Numbers that are the whole text, with commas or white space between."""
    pattern = re.compile(r"(?:\s{0,20},\s{0,20}|\s{1,20})".join([_BARE] * count))

    def places(text: str) -> Iterator[Place]:
        start = len(text) - len(text.lstrip())
        stripped = text.strip().removesuffix(".")
        if match := pattern.fullmatch(stripped):
            yield _floats(match.groups()), None, (start, start + len(stripped))

    return places


def _molmo(text: str) -> Iterator[Place]:
    """Percent in numbered attributes; a point's two may be anywhere in the tag."""
    for match in re.finditer(r"<points?\s([^<>]{0,20000})>", text):
        places: dict[str, dict[str, tuple[float, int, int]]] = {}
        for each in re.finditer(rf"\b([xy])(\d{{0,6}})\s{{0,9}}=\s{{0,9}}[\"']?{_BARE}", match[1]):
            axis, number, value = each.groups()
            places.setdefault(number, {})[axis] = (float(value), each.start(), each.end())
        for place in places.values():
            if len(place) == 2:
                (x, *_), (y, *_) = place["x"], place["y"]
                start = match.start(1) + min(place["x"][1], place["y"][1])
                stop = match.start(1) + max(place["x"][2], place["y"][2])
                yield (x, y), (100.0, 100.0), (start, stop)


def _molmo2(text: str) -> Iterator[Place]:
    """An image's number, then for each point its number, x and y; the image's goes in front."""
    for match in re.finditer(r"\bcoords\s{0,9}=\s{0,9}[\"']([^\"'<>]{0,20000})", text):
        for part in re.finditer(r"[^;:\t]+", match[1]):
            found = [(m.span(), float(m[0])) for m in _NUMBER.finditer(part[0])]
            if len(found) % 3 != 1:
                continue
            origin = match.start(1) + part.start()
            for i in range(1, len(found), 3):
                span = origin + found[i][0][0], origin + found[i + 2][0][1]
                numbers = (found[0][1], found[i + 1][1], found[i + 2][1])
                yield numbers, (1000.0, 1000.0), span


def _trimmed(text: str, start: int, stop: int) -> Span:
    """The span without white space at its ends."""
    inner = text[start:stop]
    return start + len(inner) - len(inner.lstrip()), stop - len(inner) + len(inner.rstrip())


def _matched(pattern: str, meaning: Callable[[str], str] = str) -> Items:
    """The group `item` of a pattern, and its group `label` if that has any words."""
    compiled = re.compile(pattern, re.DOTALL)

    def items(text: str) -> Iterator[Item]:
        for match in compiled.finditer(text):
            label = None
            if match["label"] is not None and match["label"].strip():
                start, stop = _trimmed(text, *match.span("label"))
                label = Label(start, stop, meaning(text[start:stop]))
            yield Item(*match.span("item"), label)

    return items


def _objects(text: str) -> Iterator[Item]:
    """The flat objects of a text in JSON, or nearly so."""
    for match in _OBJECT.finditer(text):
        pairs = {pair[1]: pair for pair in _PAIR.finditer(text, *match.span())}
        named = next((n for n in LABELS if n in pairs and pairs[n][2][0] in "\"'"), None)
        label = None
        if named is not None:
            start, stop = pairs[named].start(2) + 1, pairs[named].end(2) - 1
            if text[start:stop].strip():
                label = Label(start, stop, _meant(pairs[named][2]))
        yield Item(*match.span(), label, len(pairs) - 1 - (label is not None))


def _meant(quoted: str) -> str:
    """The text of a JSON string; of one that is none, what stands between its quotes."""
    try:
        return json.loads(quoted) if quoted[0] == '"' else quoted[1:-1]
    except ValueError:
        return quoted[1:-1]


def _key(*names: str) -> str:
    return rf"[\"'](?:{'|'.join(names)})[\"']\s{{0,20}}:\s{{0,20}}\[?"


def _between(opening: str, closing: str) -> str:
    """A label between tags that are not in it."""
    inner = rf"(?P<label>(?:(?!{opening}|{closing}).){{1,{LONGEST}}})"
    return f"(?:{opening}{inner}{closing}\\s{{0,9}})"


def _several(opening: str, closing: str) -> str:
    """Boxes between tags, one pair after another."""
    return rf"(?:{opening}[^<]{{0,1000}}(?:{closing}|$)\s{{0,2}}){{1,100}}(?<!\s)"


_BOX = (r"(?:<box>|<\|box_start\|>)", r"(?:</box>|<\|box_end\|>)")
_REF = (r"(?:<ref>|<\|object_ref_start\|>)", r"(?:</ref>|<\|object_ref_end\|>)")
_DET, _DET_REF = (r"<\|det\|>", r"<\|/det\|>"), (r"<\|ref\|>", r"<\|/ref\|>")
_TAGS = _matched(f"(?P<item>{_between(*_REF)}{_several(*_BOX)})")
_PATCHES = r"(?:<patch_index_\d{4}>){2}"
_KOSMOS = _matched(
    f"(?P<item>{_between('<phrase>', '</phrase>')}<object>{_PATCHES}"
    f"(?:</delimiter_of_multi_objects/>{_PATCHES}){{0,500}}</object>)"
)
_LOC = _matched(
    r"(?:\A|[;\n])[ \t]{0,9}(?P<item>(?:<loc\d{4}>){4}"
    rf"(?P<label>[^<;\n]{{1,{LONGEST}}}))(?=[<;\n]|\Z)"
)
_FLORENCE = _matched(
    rf"(?:(?<=[<>\n])|\A)(?P<item>(?P<label>[^<>\n]{{1,{LONGEST}}})(?:<loc_\d{{1,4}}>){{4,4000}})"
)
_MOLMO = _matched(
    rf"(?P<item><points?\s[^<>]{{0,20000}}>(?P<label>[^<]{{0,{LONGEST}}})</points?>)", html.unescape
)
_PIXELS = ("bbox_2d", "bbox", "box", "bounding_box")

BOXES = (
    Notation("paligemma", _bins(r"<loc(\d{4})>", 1024, flipped=True), _LOC),
    Notation("florence2", _florence, _FLORENCE),
    Notation("kosmos2", _kosmos, _KOSMOS),
    Notation(
        "deepseek",
        _tagged(*_DET, 999.0, 4),
        _matched(f"(?P<item>{_between(*_DET_REF)}{_several(*_DET)})"),
    ),
    Notation("box", _tagged(*_BOX, 1000.0, 4), _TAGS),
    Notation(
        "box_2d",
        _listed(rf"{_key('box_2d')}\[{_FOUR}\]", flipped=True, whole=1000.0),
        _objects,
        key="box_2d",
    ),
    Notation("bbox_2d", _listed(rf"{_key(*_PIXELS)}\[{_FOUR}\]"), _objects, key="bbox_2d"),
    Notation(
        "list",
        _listed(
            rf"(?<=[\[(;]){_FOUR}(?=[\]);])"
            rf"|\({_TWO}\)\s{{0,20}},?\s{{0,20}}\({_TWO}\)"
            rf"|\[{_TWO}\]\s{{0,20}},\s{{0,20}}\[{_TWO}\]"
        ),
    ),
    Notation("numbers", _bare(4), plain=True),
)
"""Notations of boxes: the first of which a text has a box is the text's."""

POINTS = (
    Notation("molmo2", _molmo2, _MOLMO),
    Notation("molmo", _molmo, _MOLMO),
    Notation("box", _tagged(*_BOX, 1000.0, 2), _TAGS),
    Notation(
        "point",
        _listed(rf"{_key('point')}\[{_TWO}\]", flipped=True, whole=1000.0),
        _objects,
        key="point",
    ),
    Notation("point_2d", _listed(rf"{_key('point_2d')}\[{_TWO}\]"), _objects, key="point_2d"),
    Notation("xy", _listed(rf"\bx\s{{0,20}}[=:]{_N},?\s{{0,20}}y\s{{0,20}}[=:]{_N}")),
    Notation("list", _listed(rf"[\[(]{_TWO}[\])]"), plain=True),
    Notation("numbers", _bare(2), plain=True),
)
"""Notations of points, likewise."""


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
