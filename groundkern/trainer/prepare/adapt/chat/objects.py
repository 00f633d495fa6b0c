"""ms-swift's `objects`: what stands for `<ref-object>` and `<bbox>`, and the regions of both.

`ref` are texts and `bbox` boxes of two corners, or points, each for its own placeholders in their
order through all messages. `bbox_type` is `real` (pixels, of image `image_id`, by default the
first), `norm1` or `norm1000`. A box is written in thousandths or in the style asked for, and as
numbers alone where it is a value of JSON. Its numbers in an answer are tied to it; so is a
reference that stands directly before its boxes, or with one in an object of JSON.

Source: github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from groundkern.trainer.data.images import wrong
from groundkern.trainer.places.kinds import Kinds
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.writing import Writer
from groundkern.trainer.prepare.adapt.chat.turns import Turn
from groundkern.trainer.prepare.placing import Frame, Size
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.wording import short

_VALUE = re.compile(r'"\s*:\s*\Z')  # what stands before a value of JSON
_HOLDER = re.compile("<ref-object>|<bbox>")
_FIELD = r'\s*,\s*"\w+"\s*:\s*'  # between two values of one JSON object
_BOX_THEN_REF = re.compile(rf'{_FIELD}"')
_REF_THEN_BOX = re.compile(rf'"{_FIELD}')


@dataclass(frozen=True)
class Canvas:
    """What boxes are placed on and written with.

    Args:
        sizes: (width, height) of the record's images.
        overhang: see `Frame`.
        writer: of the style of boxes.
        where: what starts an error message.
    """

    sizes: Sequence[Size]
    overhang: float
    writer: Writer
    where: str


@dataclass(frozen=True)
class _Mark:
    """A placeholder's text in a message: its characters, those that are tied and, of a box, the
    place."""

    start: int
    stop: int
    tied: tuple[int, int]
    place: dict[str, Any] | None


@dataclass(frozen=True)
class _Box:
    """A box or point: the place of its region, in fractions of its image, that image's size."""

    place: dict[str, Any]
    fractions: tuple[float, ...]
    size: Size
    field: str


def objects_of(found: Any, where: str) -> dict[str, Any]:
    """A record's `objects`, which a column of a table may have as JSON.

    Raises:
        SampleError: something else.
    """
    try:
        objects = plain_json(found) if isinstance(found, str) else found
    except ValueError as error:
        raise wrong(where, "objects", "an object with ref and bbox", error) from None
    if not isinstance(objects, dict):
        raise wrong(where, "objects", "an object with ref and bbox", short(objects))
    return objects


def look(found: Any, sizes: Sequence[Size], where: str, kinds: Kinds) -> None:
    """Shows `kinds` the boxes of a record that could be used, if no `bbox_type` says what their
    numbers count."""
    objects = objects_of(found, where) if found else {}
    if objects.get("bbox_type") is None:
        images = objects.get("image_id")
        for i, box in enumerate(_listed(objects, "bbox", where)):
            kinds.add(box, sizes[images[i] if isinstance(images, list) else 0], where)


def placed(
    turns: Sequence[Turn], objects: dict[str, Any], canvas: Canvas
) -> tuple[list[Turn], list[dict[str, Any]], dict[str, int]]:
    """Turns with texts for the placeholders, the answers' regions, and counts.

    Args:
        turns: of a record, in the order of its messages.
        objects: see `objects_of`.
        canvas: its images, and how boxes are written.

    Raises:
        SampleError: other numbers of placeholders and objects, no such image, a bad box, one that
            the style cannot write.
    """
    where = canvas.where
    texts = [piece for turn in turns for piece in turn.pieces if isinstance(piece, str)]
    refs, boxes = (_listed(objects, name, where) for name in ("ref", "bbox"))
    for name, found, holder in (("ref", refs, "<ref-object>"), ("bbox", boxes, "<bbox>")):
        wanted = sum(text.count(holder) for text in texts)
        if len(found) != wanted:
            raise wrong(where, f"objects.{name}", f"{wanted}, one for each {holder}", len(found))
    if any(not isinstance(ref, str) for ref in refs):
        raise wrong(where, "objects.ref", "texts", short(refs))
    found = [_place(box, i, objects, canvas) for i, box in enumerate(boxes)]
    filling = _Filling(iter(refs), iter([box for box, _ in found]), canvas)
    made, regions = [], []
    for number, turn in enumerate(turns):
        turn, marks = filling.turn(turn)
        made.append(turn)
        if turn.role == "assistant":
            text = "".join(piece for piece in turn.pieces if isinstance(piece, str))
            regions += [{"turn": number, **region} for region in _regions(text, marks)]
    return made, regions, {"boxes_cut": sum(cut for _, cut in found)}


class _Filling:
    """Takes references and boxes one after another as placeholders come."""

    def __init__(self, refs: Iterator[str], boxes: Iterator[_Box], canvas: Canvas) -> None:
        self._refs, self._boxes, self._canvas = refs, boxes, canvas

    def turn(self, turn: Turn) -> tuple[Turn, list[_Mark]]:
        """The turn with texts for its placeholders, and where these are in its text."""
        pieces, marks, length = [], [], 0
        for piece in turn.pieces:
            if isinstance(piece, str):
                piece, found = self._text(piece, length)
                marks += found
                length += len(piece)
            pieces.append(piece)
        return replace(turn, pieces=tuple(pieces)), marks

    def _text(self, text: str, begin: int) -> tuple[str, list[_Mark]]:
        made, marks, at = "", [], 0
        for found in _HOLDER.finditer(text):
            made += text[at : found.start()]
            at = found.end()
            start = begin + len(made)
            if found[0] == "<ref-object>":
                written, place = next(self._refs), None
                low, high = 0, len(written)
            else:
                box = next(self._boxes)
                written, (low, high) = self._written(box, bare=bool(_VALUE.search(made)))
                place = box.place
            tied = start + low, start + high
            marks.append(_Mark(start, start + len(written), tied, place))
            made += written
        return made + text[at:], marks

    def _written(self, box: _Box, *, bare: bool) -> tuple[str, tuple[int, int]]:
        """(text, the span of the numbers in it) of a box, or of its numbers alone."""
        writer, place = self._canvas.writer, Place(box.fractions)
        try:
            if bare:
                text = writer.numbers(place, box.size)
                return text, (0, len(text))
            written = writer.write([place], box.size)
        except ValueError as error:
            wanted = f"what the style {writer.style} can write"
            raise wrong(self._canvas.where, box.field, wanted, error) from None
        return written.text, written.parts[0].numbers


def _regions(text: str, marks: list[_Mark]) -> list[dict[str, Any]]:
    """The regions of one answer."""
    regions = []
    for i, mark in enumerate(marks):
        places = [mark.place] if mark.place is not None else _of_reference(text, marks, i)
        if text[slice(*mark.tied)].strip():
            regions += [{"char_span": list(mark.tied), **place} for place in places]
    return regions


def _of_reference(text: str, marks: list[_Mark], i: int) -> list[dict[str, Any]]:
    """The boxes of reference `i`: directly behind it, or beside it in an object of JSON."""

    def between(j: int) -> str:
        return text[marks[j].stop : marks[j + 1].start]

    places, j = [], i
    while j + 1 < len(marks) and marks[j + 1].place is not None and not between(j).strip():
        places.append(marks[j + 1].place)
        j += 1
    if not places and i + 1 < len(marks) and _REF_THEN_BOX.fullmatch(between(i)):
        places = [marks[i + 1].place]
    if not places and i > 0 and _BOX_THEN_REF.fullmatch(between(i - 1)):
        places = [marks[i - 1].place]
    return [place for place in places if place is not None]


def _place(box: Any, i: int, objects: dict, canvas: Canvas) -> tuple[_Box, int]:
    """Box or point `i`, and how often it was cut at its image's edge."""
    kind, field = objects.get("bbox_type") or "real", f"objects.bbox[{i}]"
    image_id, sizes, where = objects.get("image_id"), canvas.sizes, canvas.where
    image = image_id[i] if isinstance(image_id, list) and i < len(image_id) else 0
    if type(image) is not int or not 0 <= image < len(sizes):
        wanted = f"an index of the record's {len(sizes)} images"
        raise wrong(where, f"objects.image_id[{i}]", wanted, short(image))
    known = {"real": sizes[image], "norm1": (1, 1), "norm1000": (1000, 1000)}
    if not isinstance(kind, str) or kind not in known:
        raise wrong(where, "objects.bbox_type", f"one of {', '.join(known)}", short(kind))
    frame = Frame(*known[kind], canvas.overhang, where)
    coord = {"real": {}, "norm1": {"coord": "unit"}, "norm1000": {"coord": "per_mille"}}[kind]
    if isinstance(box, list) and len(box) == 2:
        inside, cut = frame.point(box, field)
        place = {"points": [inside]}
    else:
        inside, counts = frame.box(box, field)
        place, cut = {"box": inside}, counts.get("boxes_cut", 0)
    fractions = tuple(v / known[kind][n % 2] for n, v in enumerate(inside))
    return _Box({"image": image, **coord, **place}, fractions, sizes[image], field), int(cut)


def _listed(objects: dict, name: str, where: str) -> list[Any]:
    found = objects.get(name)
    found = [] if found is None else found
    if not isinstance(found, list):
        raise wrong(where, f"objects.{name}", "a list", short(found))
    return found
