"""Where words of an answer are printed in an image: equal text after normalisation, longest first.

As in SMAM's paper, a phrase is grounded only if its exact text occurs in the image. Of several
places, cells and labels come before titles (`roles`), and what stands in the row or column of the
answer's other phrases before what does not (`deciding`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal

from groundkern.trainer.prepare.marks.deciding import Anchor, decide
from groundkern.trainer.prepare.marks.grouping import (
    Box,
    Line,
    PrintedWord,
    blocks_of,
    continued,
    lines_of,
    scale_numbers,
    union,
)
from groundkern.trainer.prepare.marks.normalise import Token, edges, tokens, unconfused
from groundkern.trainer.prepare.marks.roles import Role, roles_of

# Words that say nothing about a place: never a phrase alone, nor an end of a part of a label.
_EMPTY = """
a about above after all also am an and any are as at be because been before being below between
both but by can could did do does during each either every few for from had has have he her here
his how i if in into is it its just may me might more most must my neither no nor not of off on
one only or other our out over own per shall she should so some such than that the their them
then there these they this those through to too under until up us was we were what when where
which while who whose why will with would yes you your 's
"""
_EMPTY_WORDS = frozenset(_EMPTY.split())


@dataclass(frozen=True)
class Place:
    """A box in pixels of image `image`."""

    image: int
    box: Box


@dataclass(frozen=True)
class Match:
    """Characters `start:stop` of an answer are printed at `places`.

    `ambiguous`: the same text is printed in several places, each of them equally good.
    """

    start: int
    stop: int
    places: tuple[Place, ...]
    ambiguous: bool


@dataclass(frozen=True)
class _Printed:
    """A token of a block, and where in its line it is printed."""

    token: Token
    line: Line
    box: Box
    opens: bool  # the first token of a label
    closes: bool  # its last


@dataclass(frozen=True)
class _Found:
    """Tokens `start:stop` of a text, equal to `printed`; the lower its `rank`, the better."""

    start: int
    stop: int
    printed: tuple[_Printed, ...]
    role: Role
    rank: tuple


class PrintedText:
    """The words of a sample's images, ready for phrases to be looked up.

    Args:
        words: what OCR read, in pixels.
        gap: the widest space within a line, in letter heights.
        scales: whether ticks of an axis may be what an answer speaks of: "last" only if the text
            is printed nowhere else, "keep" like any other text, "drop" never.
    """

    def __init__(
        self,
        words: list[PrintedWord],
        *,
        gap: float = 0.8,
        scales: Literal["last", "keep", "drop"] = "last",
    ) -> None:
        self.lines = lines_of(words, gap)
        blocks = blocks_of(self.lines)
        ticks = set() if scales == "keep" else scale_numbers(self.lines)
        self._roles = roles_of(blocks, ticks)
        self._blocks = [_printed(block) for block in blocks]
        self._starts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for b, block in enumerate(self._blocks):
            for i, printed in enumerate(block):
                if scales != "drop" or self._roles[id(printed.line)] != Role.TICK:
                    key = printed.token.key
                    for each in {key, unconfused(key)} - {None}:
                        self._starts[each].append((b, i))

    def matches(
        self,
        answer: str,
        ambiguous: Literal["drop", "union"] = "drop",
        *,
        question: str = "",
        counts: Counter[str] | None = None,
    ) -> list[Match]:
        """The phrases of `answer` that are printed, in order and without overlap.

        Args:
            answer: the text; spans count its characters.
            ambiguous: what becomes of a text in several places, if no row or column decides: none
                of them, or all.
            question: names in it decide between equal places too.
            counts: `ambiguous_decided`, `ambiguous_dropped` and `general_dropped` go up: phrases
                in several places of which one was chosen, or none; phrases of one word that only
                a title, a note or the like holds.
        """
        counts = Counter() if counts is None else counts
        words = tokens(answer)
        chosen = self._chosen(answer)
        near = [each for found in chosen for each in self._anchors(found)]
        asked = [each for found in self._chosen(question) for each in self._anchors(found)]
        matches = []
        for found in chosen:
            spoken = words[found[0].start : found[0].stop]
            if _says_nothing(answer, spoken, found[0].role):
                counts["general_dropped"] += 1
                continue
            if len(found) > 1:
                places = [each.printed[0].line for each in found]
                best = decide(places, near)
                best = decide(places, near + asked) if best is None else best
                if best is not None:
                    counts["ambiguous_decided"] += 1
                    found = found[best : best + 1]
                elif ambiguous == "drop":
                    counts["ambiguous_dropped"] += 1
                    continue
            match = _match(answer, spoken, found)
            if matches and match.start < matches[-1].stop:  # the same punctuation touches both
                match = replace(match, start=matches[-1].stop)
            matches.append(match)
        return matches

    def holds(self, phrase: str) -> bool:
        """Whether the text of `phrase` is printed here, in one line or block, sign for sign."""
        keys = [token.key for token in tokens(phrase)]
        return bool(keys) and any(
            [printed.token.key for printed in self._blocks[b][i : i + len(keys)]] == keys
            for b, i in self._starts.get(keys[0], ())
        )

    def _chosen(self, text: str) -> list[list[_Found]]:
        """Phrases of a text, in order and without overlap, each with its equally good places."""
        words = tokens(text)
        by_span: dict[tuple[int, int], list[_Found]] = defaultdict(list)
        for start in range(len(words)):
            for found in self._at(text, words, start):
                by_span[found.start, found.stop].append(found)
        best = {span: min(found.rank for found in each) for span, each in by_span.items()}
        named = {span for span, each in by_span.items() if self._names(text, words, each)}
        free = [True] * len(words)
        chosen = []
        for start, stop in sorted(by_span, key=lambda s: (s not in named, s[0] - s[1], s[0])):
            if not all(free[start:stop]):
                continue
            first, last = start, stop
            while first and words[first - 1].stop > words[start].start:  # "㍿" is four tokens
                first -= 1
            while last < len(words) and words[last].start < words[stop - 1].stop:
                last += 1
            free[first:last] = [False] * (last - first)
            equal = by_span[start, stop]
            chosen.append([found for found in equal if found.rank == best[start, stop]])
        return sorted(chosen, key=lambda found: found[0].start)

    def _names(self, text: str, words: list[Token], places: list[_Found]) -> bool:
        """Whether a span is a whole label, and no part of a longer name.

        Such a span is taken before a longer one, which only a title or a sentence can hold. The
        "Korea" of "South Korea" is part of a name, and so is "Corruption" before "Perception".
        """
        start, stop = places[0].start, places[0].stop
        if not any(found.role <= Role.LEGEND and _whole(found.printed) for found in places):
            return False
        if sum(word.key not in _EMPTY_WORDS for word in words[start:stop]) > 1:
            return True
        before, after = words[max(0, start - 1) : start], words[stop : stop + 1]
        modified = before and before[0].key not in _EMPTY_WORDS and not before[0].number
        modified = modified and text[before[0].outer[1] : words[start].outer[0]].isspace()
        compound = after and after[0].surface[:1].isupper() and words[stop - 1].surface[0].isupper()
        return not modified and not compound

    def _anchors(self, found: list[_Found]) -> list[Anchor]:
        """The label that a phrase names, if it names just one that can head a row or a column."""
        (first, *others) = found
        number = len(first.printed) == 1 and first.printed[0].token.number
        year = number and re.fullmatch(r"(?:19|20)\d\d", first.printed[0].token.key)
        if others or first.role > Role.LEGEND or (number and not year):
            return []
        lines = {id(printed.line): printed.line for printed in first.printed}
        return [Anchor(tuple(lines.values()), header=first.role == Role.LEGEND)]

    def _at(self, answer: str, words: list[Token], start: int) -> list[_Found]:
        """Printed runs equal to the answer's tokens from `start` on, in every place and length."""
        found = []
        for b, i in self._starts.get(words[start].key, ()):  # "q1" is listed for "ql" too
            block = self._blocks[b]
            after_number = start and i and words[start - 1].number and block[i - 1].token.number
            if after_number and not words[start].number:
                continue  # the unit of another amount
            for length in range(1, min(len(block) - i, len(words) - start) + 1):
                spoken, printed = words[start + length - 1], block[i + length - 1]
                if not _same(spoken, printed.token):
                    break
                run = tuple(block[i : i + length])
                if _worth_it(answer, words[start : start + length], run):
                    role = max(self._roles[id(printed.line)] for printed in run)
                    rank = (role, *_rank(answer, words[start : start + length], run))
                    found.append(_Found(start, start + length, run, role, rank))
        return found


def _rank(answer: str, spoken: list[Token], run: tuple[_Printed, ...]) -> tuple:
    pairs = [(word, printed.token) for word, printed in zip(spoken, run)]
    return (
        sum(a.key != b.key for a, b in pairs),
        not _whole(run),
        sum(a.sign != b.sign for a, b in pairs),
        sum(
            a != b for a, b in zip(edges(answer, spoken[0], spoken[-1], sentence=True), _edges(run))
        ),
        sum(a.surface.islower() != b.surface.islower() for a, b in pairs if len(a.key) <= 3),
    )


def _edges(run: tuple[_Printed, ...]) -> tuple[str, str]:
    first, last = run[0], run[-1]
    lead, _ = edges(first.line.text, first.token, first.token, sentence=False)
    _, trail = edges(last.line.text, last.token, last.token, sentence=False)
    return lead, trail


def _says_nothing(answer: str, spoken: list[Token], role: Role) -> bool:
    """Whether a phrase tells no place: one word that only a line about the whole holds.

    A number of a title may be its year; a small one ("the 11 countries"), or one of a note, is not.
    """
    if not role.general:
        return False
    if len(spoken) == 1 and spoken[0].number:
        return role == Role.NOTE or len(spoken[0].key) < 3
    text = answer[spoken[0].start : spoken[-1].stop]
    return sum(any(w.key not in _EMPTY_WORDS for w in tokens(each)) for each in text.split()) < 2


def _printed(block: list[Line]) -> list[_Printed]:
    found = []
    goes_on = continued(block)
    for n, line in enumerate(block):
        inside = line.tokens()
        for i, (token, first, last) in enumerate(inside):
            x0, y0, x1, y1 = union([word.box for word in line.words[first:last]])
            if y1 - y0 < x1 - x0:  # a word that holds other tokens too is cut
                left, right = line.across(token.outer[0]), line.across(token.outer[1])
                if i and inside[i - 1][2] > first and left < x1:
                    x0 = max(x0, left)
                if i + 1 < len(inside) and inside[i + 1][1] < last and right > x0:
                    x1 = min(x1, right)
            opens = i == 0 and n not in goes_on
            closes = i == len(inside) - 1 and n + 1 not in goes_on
            found.append(_Printed(token, line, (x0, y0, x1, y1), opens, closes))
    return found


def _same(spoken: Token, printed: Token) -> bool:
    if spoken.key != printed.key:
        confused = any(c.isdigit() for c in spoken.key) and not printed.number
        return confused and spoken.key == unconfused(printed.key)
    return spoken.sign == printed.sign or not spoken.sign or not printed.sign


def _whole(run: tuple[_Printed, ...]) -> bool:
    return run[0].opens and run[-1].closes


def _worth_it(answer: str, spoken: list[Token], run: tuple[_Printed, ...]) -> bool:
    """Whether the text tells the place: "of" does not, nor the "a" of "a dog" for a bar A."""
    if len(spoken) > 1:
        ends = spoken[:1] + spoken[-1:]
        inside = not _whole(run) and any(token.key in _EMPTY_WORDS for token in ends)
        return not inside and any(token.key not in _EMPTY_WORDS for token in spoken)
    word, printed = spoken[0], run[0].token
    if word.key not in _EMPTY_WORDS and (
        len(word.key) > 1 or not word.key.isascii() or word.number
    ):
        return True
    before = answer[: word.start].rstrip()
    opens_sentence = (
        len(word.key) == 1 and word.key in _EMPTY_WORDS and (not before or before[-1] in ".!?:")
    )
    exact = word.surface == printed.surface and (
        word.surface.isupper() or not word.surface.islower()
    )
    return exact and _whole(run) and not opens_sentence


def _match(answer: str, spoken: list[Token], found: list[_Found]) -> Match:
    """One match for the equally good places; what touches its ends in both texts belongs to it."""
    first, last, printed = spoken[0], spoken[-1], found[0].printed
    start = first.outer[0] if printed[0].token.sign == first.sign else first.start
    stop = last.outer[1] if printed[-1].token.sign == last.sign else last.stop
    (lead, trail), (left, right) = edges(answer, first, last, sentence=True), _edges(printed)
    if start == first.outer[0]:
        start -= len(_shared(lead[::-1], left[::-1]))
    if stop == last.outer[1]:
        stop += len(_shared(trail, right).rstrip(",;:"))
    places = {place: None for each in found for place in _places(each.printed)}
    return Match(start, stop, tuple(places), len(found) > 1)


def _shared(a: str, b: str) -> str:
    """What both texts begin with."""
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def _places(run: tuple[_Printed, ...]) -> list[Place]:
    """One box for each line the text runs over."""
    by_line: dict[int, list[_Printed]] = defaultdict(list)
    for printed in run:
        by_line[id(printed.line)].append(printed)
    return [
        Place(each[0].line.image, union([printed.box for printed in each]))
        for each in by_line.values()
    ]
