"""The patterns that notations are made of: where the numbers of places are, and their items.

Every repetition is bounded, and none of two that follow each other can take the same character, so
that no text takes long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

Numbers = tuple[float, ...]
Scale = tuple[float, float]
Span = tuple[int, int]

CELLS = 32  # of Kosmos-2, along each side
LONGEST = 300  # characters of a label

ONE = r"\s{0,20}([-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s{0,20}"
_BARE = ONE.replace(r"\s{0,20}", "")
FOUR = ",".join([ONE] * 4)
TWO = f"{ONE},{ONE}"
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20})(?![\d.])")
_STRING = r'"(?:[^"\\\n]|\\.){0,1000}"|' + r"'(?:[^'\\\n]|\\.){0,1000}'"
_VALUE = rf"(?:{_STRING}|\[[^\[\]{{}}]{{0,400}}\]|[-+.\w]{{1,40}})"
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


class Item(NamedTuple):
    """What stands for a thing, or for several that share a label."""

    start: int
    stop: int
    label: Label | None
    extra: int = 0


Found = tuple[Numbers, Scale | None, Span]
Places = Callable[[str], Iterator[Found]]
Items = Callable[[str], Iterator[Item]]


def _floats(groups: tuple[str | None, ...]) -> Numbers:
    return tuple(float(group) for group in groups if group is not None)


def bins(pattern: str, count: int, offset: float = 0.0, *, flipped: bool = False) -> Places:
    """Four tokens of `count` bins; `offset`: where in its bin a number is."""
    compiled = re.compile(pattern * 4)

    def places(text: str) -> Iterator[Found]:
        for match in compiled.finditer(text):
            a, b, c, d = (value + offset for value in _floats(match.groups()))
            numbers = (b, a, d, c) if flipped else (a, b, c, d)
            yield numbers, (float(count), float(count)), match.span()

    return places


def florence(text: str) -> Iterator[Found]:
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


def kosmos(text: str) -> Iterator[Found]:
    """From the middle of the first cell to that of the last; whole cells if they share a row."""
    for match in re.finditer(r"<patch_index_(\d{4})>" * 2, text):
        (y0, x0), (y1, x1) = (divmod(int(index), CELLS) for index in match.groups())
        ends = (0.0, 1.0) if x0 == x1 or y0 == y1 else (0.5, 0.5)
        numbers = (x0 + ends[0], y0 + ends[0], x1 + ends[1], y1 + ends[1])
        yield numbers, (float(CELLS), float(CELLS)), match.span()


def tagged(opening: str, closing: str, whole: float, count: int) -> Places:
    """The numbers between two tags (or behind one that was never closed), `count` by `count`."""
    pattern = re.compile(f"{opening}([^<]{{0,1000}})(?:{closing}|$)")

    def places(text: str) -> Iterator[Found]:
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


def listed(pattern: str, *, flipped: bool = False, whole: float | None = None) -> Places:
    """The groups of a pattern, four numbers or two; `flipped`: y before x."""
    compiled = re.compile(pattern)
    out_of = None if whole is None else (whole, whole)

    def places(text: str) -> Iterator[Found]:
        for match in compiled.finditer(text):
            given = [i for i in range(1, compiled.groups + 1) if match[i] is not None]
            values = [float(match[i]) for i in given]
            if flipped:
                values = [values[i ^ 1] for i in range(len(values))]
            span = match.start(given[0]), match.end(given[-1])
            yield tuple(values), out_of, _bracketed(text, span)

    return places


def bare(count: int) -> Places:
    """Numbers that are the whole text, with commas or white space between."""
    pattern = re.compile(r"(?:\s{0,20},\s{0,20}|\s{1,20})".join([_BARE] * count))

    def places(text: str) -> Iterator[Found]:
        start = len(text) - len(text.lstrip())
        stripped = text.strip().removesuffix(".")
        if match := pattern.fullmatch(stripped):
            yield _floats(match.groups()), None, (start, start + len(stripped))

    return places


def molmo(text: str) -> Iterator[Found]:
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


def molmo2(text: str) -> Iterator[Found]:
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


def matched(pattern: str, meaning: Callable[[str], str] = str) -> Items:
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


def objects(text: str) -> Iterator[Item]:
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


def key(*names: str) -> str:
    return rf"[\"'](?:{'|'.join(names)})[\"']\s{{0,20}}:\s{{0,20}}\[?"


def between(opening: str, closing: str) -> str:
    """A label between tags that are not in it, or none."""
    inner = rf"(?P<label>(?:(?!{opening}|{closing}).){{1,{LONGEST}}})"
    return f"(?:{opening}{inner}{closing}\\s{{0,9}})?"


def several(opening: str, closing: str) -> str:
    """Boxes between tags, one pair after another."""
    return rf"(?:{opening}[^<]{{0,1000}}{closing}\s{{0,2}}){{1,100}}(?<!\s)"
