"""When a link that `marks` found is right, and what is counted: shared by drawn and real charts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from groundkern.trainer.prepare.marks.grouping import Box
from groundkern.trainer.prepare.marks.matching import Match

_EDGE = re.compile(r"[^\w]*|[^\w]*(?:per\s?cent)?[^\w]*")  # what may differ at a phrase's ends


class Link(NamedTuple):
    """Characters `start:stop` of the answer are printed in `box` (one of its lines)."""

    start: int
    stop: int
    box: Box


@dataclass
class Score:
    """What came out of some answers.

    Attributes:
        links: how many were "found", of these "false"; how many are "true", of these "missing".
        wrong: a sentence for each false and each missing link.
    """

    links: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return 1 - self.links["false"] / max(1, self.links["found"])

    @property
    def recall(self) -> float:
        return 1 - self.links["missing"] / max(1, self.links["true"])

    def add(
        self,
        answer: str,
        true: Sequence[Link],
        matches: Sequence[Match],
        where: str,
        allowed: Sequence[Link] = (),
    ) -> None:
        """Counts the links of one answer.

        Args:
            answer: the text whose characters the links count.
            true: the links there are.
            matches: what was found.
            where: begins each sentence of `wrong`.
            allowed: links that are neither right nor false; of these the phrase may be a part.
        """
        found = [Link(m.start, m.stop, place.box) for m in matches for place in m.places]
        found = [
            link
            for link in found
            if any(agree(answer, each, link) for each in true)
            or not any(_part(each, link) for each in allowed)
        ]
        missing = [each for each in true if not any(agree(answer, each, link) for link in found)]
        false = [link for link in found if not any(agree(answer, each, link) for each in true)]
        self.links.update(found=len(found), true=len(true), false=len(false), missing=len(missing))
        for kind, links in (("missing", missing), ("false", false)):
            for link in links:
                box = tuple(round(edge) for edge in link.box)
                self.wrong.append(f"{where}: {kind} {answer[link.start : link.stop]!r} {box}")

    def __str__(self) -> str:
        links = self.links
        return (
            f"precision {self.precision:.1%}, recall {self.recall:.1%} ({links['false']} of "
            f"{links['found']} links false, {links['missing']} of {links['true']} missing)"
        )


def agree(answer: str, true: Link, found: Link) -> bool:
    """Whether two links have the same words and the same place.

    The same words: what only one of the two spans holds are signs, punctuation, white space or
    "percent". The same place: each box holds the middle of the other.
    """
    if min(true.stop, found.stop) <= max(true.start, found.start):
        return False
    starts, stops = sorted((true.start, found.start)), sorted((true.stop, found.stop))
    outside = answer[slice(*starts)], answer[slice(*stops)]
    return all(_EDGE.fullmatch(text) for text in outside) and same_place(true.box, found.box)


def same_place(a: Box, b: Box) -> bool:
    """Whether each of two boxes holds the other's middle."""
    return _holds_middle(a, b) and _holds_middle(b, a)


def _part(whole: Link, found: Link) -> bool:
    inside = whole.start <= found.start and found.stop <= whole.stop
    return inside and _holds_middle(whole.box, found.box)


def _holds_middle(a: Box, b: Box) -> bool:
    return a[0] <= (b[0] + b[2]) / 2 <= a[2] and a[1] <= (b[1] + b[3]) / 2 <= a[3]
