"""Phrases as records: their subjects, and composites "p1 and p2" of phrases side by side.

(H3): the map of a composite should be the sum of the maps of its parts.
"""

from __future__ import annotations

import re
from typing import Any

from groundkern.trainer.prepare.phrases.rules import NounPhrase
from groundkern.trainer.records import span_of

_JOINT = re.compile(r"\s*(,|,?\s*(?:and|&))\s*", re.IGNORECASE)
_LAST = re.compile(r"and|&", re.IGNORECASE)
_ONE = re.compile(r"['\u2019]s(?!\w)|\s+(?:is|was|has|does)(?!\w)", re.IGNORECASE)


def composites(text: str, phrases: list[NounPhrase]) -> list[tuple[int, int]]:
    """Spans of `text` in which phrases are joined by commas and a last "and", and by nothing else.

    Two phrases with ", and" between them make no composite: they are two clauses more often than a
    pair. Nor do those before the verb of a single thing ("a sunny day and the dog is barking").
    """
    found: list[tuple[int, int]] = []
    first = 0
    while first < len(phrases):
        last, joints = first, []
        while last + 1 < len(phrases):
            joint = _JOINT.fullmatch(text[phrases[last].stop : phrases[last + 1].start])
            if joint is None:
                break
            joints.append(joint[1].strip())
            last += 1
            if _LAST.search(joints[-1]):
                break
        clauses = (len(joints) == 1 and "," in joints[0]) or _ONE.match(text, phrases[last].stop)
        if joints and _LAST.search(joints[-1]) and not clauses:
            found.append((phrases[first].start, phrases[last].stop))
        first = last + 1
    return found


def records(text: str, phrases: list[NounPhrase], turn: int | None = None) -> list[dict[str, Any]]:
    """Canonical `phrases` of an answer (docs/data/data-format.md).

    A composite comes before its parts and has no subject: it is the phrase that contains others.

    Args:
        text: the answer.
        phrases: in order.
        turn: index of the answer's message; None leaves it out.
    """
    spans = [(phrase.start, phrase.stop, phrase.head) for phrase in phrases]
    spans += [(start, stop, None) for start, stop in composites(text, phrases)]
    made = []
    for start, stop, head in sorted(spans, key=lambda span: (span[0], -span[1])):
        record = span_of(text, start, stop)
        if turn is not None:
            record["turn"] = turn
        if head is not None:
            record["subject"] = _subject(text, start, head)
        made.append(record)
    return made


def _subject(text: str, start: int, head: tuple[int, int]) -> str:
    """The head noun; with the words before it if it could be mistaken for a part of one of them."""
    begin = head[0]
    while text.find(text[begin : head[1]], start) != begin:
        begin = max(start, text.rfind(" ", start, begin - 1) + 1)
    return text[begin : head[1]]
