"""Writes the places of a text in another style, and moves the spans of what is tied to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from groundkern.trainer.places.notations import references
from groundkern.trainer.places.patterns import Span
from groundkern.trainer.places.units import Size
from groundkern.trainer.places.writing import Writer
from groundkern.trainer.prepare.boxes.finding import Found

TITLES = {
    "boxes_rewritten": "boxes and points written in the other style",
    "boxes_kept": "boxes and points left as they were written: the other style cannot say the same",
}
_BETWEEN = re.compile(r"[\s,;]{0,20}")
_OPENING = re.compile(r"(```(?:json)?\s{0,9})?(\[\s{0,40})?\Z")
_CLOSING = re.compile(r"(\s{0,40},?\s{0,40}\])?(\s{0,9}```)?")


class Edit(NamedTuple):
    """A part of a text, what stands there instead, and where its parts went.

    Args:
        start, stop: in the old text.
        text: the new one.
        moves: (span in the old text, span within `text`).
    """

    start: int
    stop: int
    text: str
    moves: tuple[tuple[Span, Span], ...]


@dataclass(frozen=True)
class Rewritten:
    """A text with its edits, in their order."""

    old: str
    edits: tuple[Edit, ...]

    @property
    def text(self) -> str:
        return self.between(0, len(self.old))

    def between(self, start: int, stop: int) -> str:
        """What became of a part of the old text; an edit belongs to where it starts."""
        made, at = "", start
        for edit in self.edits:
            if start <= edit.start < stop:
                made += self.old[at : edit.start] + edit.text
            if edit.start < stop:
                at = max(at, min(edit.stop, stop))
        return made + self.old[at:stop]

    def moved(self, start: int, stop: int) -> Span:
        """The span in the new text of a span in the old one.

        What is tied to a label or to numbers stays tied to these; what reaches into a part that
        was written anew without being one of them is tied to all of it.
        """
        first, last, delta = start, stop, 0
        for edit in self.edits:
            origin = edit.start + delta
            for (a, b), (c, d) in edit.moves:
                if a <= start and stop <= b:
                    same = b - a == d - c  # the same text, of which a part was tied
                    return (
                        (origin + c + start - a, origin + c + stop - a)
                        if same
                        else (origin + c, origin + d)
                    )
            grown = len(edit.text) - (edit.stop - edit.start)
            if edit.stop <= start:
                first += grown
            elif edit.start < start:
                first = origin
            if edit.stop <= stop:
                last += grown
            elif edit.start < stop:
                last = origin + len(edit.text)
            delta += grown
        return first, last


def rewrite(
    text: str, found: Sequence[Found], sizes: Sequence[Size], writer: Writer, counts: Counter
) -> Rewritten:
    """The text with its places in the writer's style; as it is, if one of them cannot be.

    References without a box, as in a question, get the style's tags too, or lose theirs.

    Args:
        text: of a message.
        found: its marks, in order.
        sizes: of the record's images.
        writer: of the style.
        counts: gets what `TITLES` names.
    """
    made = [_edits(text, group, sizes, writer) for group in _groups(text, found)]
    edits = sorted(edit for each in made for edit in each or ())
    nested = any(edit.stop > behind.start for edit, behind in pairwise(edits))
    if nested or any(each is None for each in made):
        counts["boxes_kept"] += len(found)
        return Rewritten(text, ())
    if found:
        counts["boxes_rewritten"] += len(found)
    edits += _references(text, edits, writer)
    changed = [edit for edit in edits if edit.text != text[edit.start : edit.stop]]
    return Rewritten(text, tuple(sorted(changed)))


def _references(text: str, edits: list[Edit], writer: Writer) -> list[Edit]:
    """What becomes of references that are in none of the edits."""
    made = []
    for item in references(text):
        if item.label is not None and all(
            item.stop <= edit.start or edit.stop <= item.start for edit in edits
        ):
            opening, closing = writer.rules.ref
            start, stop = item.label[:2]
            words = (len(opening), len(opening) + stop - start)
            new = f"{opening}{text[start:stop]}{closing}"
            made.append(Edit(item.start, item.stop, new, (((start, stop), words),)))
    return made


def _groups(text: str, found: Sequence[Found]) -> list[list[Found]]:
    """Marks that stand together, with nothing but commas and white space between their items."""
    groups: list[list[Found]] = []
    for each in sorted(found, key=lambda one: (one.mark.item, one.mark.span)):
        if groups:
            last = groups[-1][-1].mark
            between = text[last.item[1] : each.mark.item[0]]
            near = last.item == each.mark.item or _BETWEEN.fullmatch(between)
            if near and bool(last.key) == bool(each.mark.key):
                groups[-1].append(each)
                continue
        groups.append([each])
    return groups


def _edits(
    text: str, group: list[Found], sizes: Sequence[Size], writer: Writer
) -> list[Edit] | None:
    """What becomes of marks that stand together; None: the style cannot say the same."""
    if any(each.numbers is None or not writer.rules.can(each.place) for each in group):
        return None
    if len({each.image for each in group}) > 1:
        return None
    size = sizes[group[0].image]
    same = all(each.mark.key and each.mark.key in writer.rules.notations for each in group)
    if any(each.mark.extra for each in group) and not same:
        return None
    start, stop = _whole(text, group)
    try:
        if same:
            return [_numbers(each, size, writer) for each in group]
        made = writer.spoken([each.place for each in group], size)
    except ValueError:
        return None
    moves = []
    for each, part in zip(group, made.parts, strict=True):
        moves.append((each.mark.span, part.numbers))
        if each.mark.label is not None and part.label is not None:
            moves.append((each.mark.label[:2], part.label))
    return [Edit(start, stop, made.text, tuple(moves))]


def _numbers(each: Found, size: Size, writer: Writer) -> Edit:
    """An object of JSON keeps everything but its numbers."""
    new = writer.numbers(each.place, size)
    start, stop = each.mark.span
    return Edit(start, stop, new, (((start, stop), (0, len(new))),))


def _whole(text: str, group: list[Found]) -> Span:
    """The span of the items, with the list and the fence of JSON around them."""
    start, stop = group[0].mark.item[0], max(each.mark.item[1] for each in group)
    before = _OPENING.search(text[max(0, start - 80) : start])
    behind = _CLOSING.match(text[stop : stop + 100])
    listed = bool(before[2] and behind[1])
    if listed:
        start, stop = start - len(before[2]), stop + len(behind[1])
    if before[1] and behind[2] and (listed or not (before[2] or behind[1])):
        start, stop = start - len(before[1]), stop + len(behind[2])
    return start, stop
