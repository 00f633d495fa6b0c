"""ms-swift's `objects`: what stands for `<ref-object>` and `<bbox>`, and the regions of both.

`ref` are texts and `bbox` boxes of two corners, or points, each for its own placeholders in their
order through all messages. `bbox_type` is `real` (pixels, of image `image_id`, by default the
first), `norm1` or `norm1000`. A box is written in thousandths. Its text in an answer is tied to it;
so is a reference that stands directly before its boxes, or with one in an object of JSON.

Source: github.com/modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.data.images import wrong
from trainer.prepare.adapt.chat.turns import Turn
from trainer.prepare.placing import Frame, Size, per_mille
from trainer.wording import short

_HOLDER = re.compile("<ref-object>|<bbox>")
_FIELD = r'\s*,\s*"\w+"\s*:\s*'  # between two values of one JSON object
_BOX_THEN_REF = re.compile(rf'{_FIELD}"')
_REF_THEN_BOX = re.compile(rf'"{_FIELD}')


@dataclass
class _Mark:
    """A placeholder's text in a message: its characters and, of a box, the place."""

    start: int
    stop: int
    place: dict[str, Any] | None


def placed(
    turns: Sequence[Turn], objects: Any, sizes: Sequence[Size], overhang: float, where: str
) -> tuple[list[Turn], list[dict[str, Any]], dict[str, float]]:
    """Turns with texts for the placeholders, the answers' regions, and counts.

    Args:
        turns: of a record, in the order of its messages.
        objects: of the record.
        sizes: of its images.
        overhang: see `Frame`.
        where: what starts an error message.

    Raises:
        SampleError: other numbers of placeholders and objects, no such image, a bad box.
    """
    if not isinstance(objects, dict):
        raise wrong(where, "objects", "an object with ref and bbox", short(objects))
    texts = [piece for turn in turns for piece in turn.pieces if isinstance(piece, str)]
    refs, boxes = (_listed(objects, name, where) for name in ("ref", "bbox"))
    for name, found, holder in (("ref", refs, "<ref-object>"), ("bbox", boxes, "<bbox>")):
        wanted = sum(text.count(holder) for text in texts)
        if len(found) != wanted:
            raise wrong(where, f"objects.{name}", f"{wanted}, one for each {holder}", len(found))
    if any(not isinstance(ref, str) for ref in refs):
        raise wrong(where, "objects.ref", "texts", short(refs))
    places, written, counts = [], [], {"boxes_cut": 0}
    for i, box in enumerate(boxes):
        place, text, cut = _place(box, i, objects, sizes, overhang, where)
        places.append(place)
        written.append(text)
        counts["boxes_cut"] += cut
    filling = _Filling(iter(refs), iter(zip(written, places, strict=True)))
    made, regions = [], []
    for number, turn in enumerate(turns):
        turn, marks = filling.turn(turn)
        made.append(turn)
        if turn.role == "assistant":
            text = "".join(piece for piece in turn.pieces if isinstance(piece, str))
            regions += [{"turn": number, **region} for region in _regions(text, marks)]
    return made, regions, {name: n for name, n in counts.items() if n}


class _Filling:
    """Takes references and boxes one after another as placeholders come."""

    def __init__(self, refs: Any, boxes: Any) -> None:
        self._refs, self._boxes = refs, boxes

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
            ref = found[0] == "<ref-object>"
            written, place = (next(self._refs), None) if ref else next(self._boxes)
            marks.append(_Mark(begin + len(made), begin + len(made) + len(written), place))
            made += written
        return made + text[at:], marks


def _regions(text: str, marks: list[_Mark]) -> list[dict[str, Any]]:
    """The regions of one answer."""
    regions = []
    for i, mark in enumerate(marks):
        places = [mark.place] if mark.place is not None else _of_reference(text, marks, i)
        if text[mark.start : mark.stop].strip():
            regions += [{"char_span": [mark.start, mark.stop], **place} for place in places]
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


def _place(
    box: Any, i: int, objects: dict, sizes: Sequence[Size], overhang: float, where: str
) -> tuple[dict[str, Any], str, int]:
    """(place of a region, text in thousandths, whether it was cut) of box or point `i`."""
    kind, field = objects.get("bbox_type") or "real", f"objects.bbox[{i}]"
    image_id = objects.get("image_id")
    image = image_id[i] if isinstance(image_id, list) and i < len(image_id) else 0
    if type(image) is not int or not 0 <= image < len(sizes):
        wanted = f"an index of the record's {len(sizes)} images"
        raise wrong(where, f"objects.image_id[{i}]", wanted, short(image))
    known = {"real": sizes[image], "norm1": (1, 1), "norm1000": (1000, 1000)}
    if not isinstance(kind, str) or kind not in known:
        raise wrong(where, "objects.bbox_type", f"one of {', '.join(known)}", short(kind))
    frame = Frame(*known[kind], overhang, where)
    coord = {"real": {}, "norm1": {"coord": "unit"}, "norm1000": {"coord": "per_mille"}}[kind]
    which = {"image": image, **coord}
    if isinstance(box, list) and len(box) == 2:
        point, cut = frame.point(box, field)
        text = str([round(v * 1000 / side) for v, side in zip(point, known[kind], strict=True)])
        return {**which, "points": [point]}, text, int(cut)
    inside, counts = frame.box(box, field)
    return {**which, "box": inside}, per_mille(inside, known[kind]), counts.get("boxes_cut", 0)


def _listed(objects: dict, name: str, where: str) -> list[Any]:
    found = objects.get(name)
    found = [] if found is None else found
    if not isinstance(found, list):
        raise wrong(where, f"objects.{name}", "a list", short(found))
    return found
