"""Where words of an answer are printed in an image: equal text after normalisation, longest first.

As in SMAM's paper: a phrase is grounded only if its exact text occurs in the image, and several
regions of one phrase count as their union.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from trainer.prepare.marks.grouping import (
    Box,
    Line,
    PrintedWord,
    blocks_of,
    lines_of,
    scale_numbers,
    union,
)
from trainer.prepare.marks.normalise import Token, tokens, unconfused

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
    """A token of a block, in words `first:last` of its line."""

    token: Token
    line: Line
    first: int
    last: int
    opens: bool  # the line's first token
    closes: bool  # its last


@dataclass(frozen=True)
class _Found:
    """Tokens `start:stop` of the answer, equal to `printed`; the lower its `rank`, the better."""

    start: int
    stop: int
    printed: tuple[_Printed, ...]
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
        ticks = set() if scales == "keep" else scale_numbers(self.lines)
        self._ticks = {id(line) for line in ticks}
        self._drop = scales == "drop"
        self._blocks = [_printed(block) for block in blocks_of(self.lines)]
        self._starts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for b, block in enumerate(self._blocks):
            for i, printed in enumerate(block):
                if not (self._drop and id(printed.line) in self._ticks):
                    key = printed.token.key
                    for each in {key, unconfused(key)} - {None}:
                        self._starts[each].append((b, i))

    def matches(self, answer: str, ambiguous: Literal["union", "drop"] = "union") -> list[Match]:
        """The phrases of `answer` that are printed, in order and without overlap.

        Args:
            answer: the text; spans count its characters.
            ambiguous: what becomes of a text in several places: all of them, or none.
        """
        words = tokens(answer)
        by_span: dict[tuple[int, int], list[_Found]] = defaultdict(list)
        for start in range(len(words)):
            for found in self._at(answer, words, start):
                by_span[found.start, found.stop].append(found)
        free = [True] * len(words)
        chosen = []
        for start, stop in sorted(by_span, key=lambda span: (span[0] - span[1], span[0])):
            if not all(free[start:stop]):
                continue
            first, last = start, stop
            while first and words[first - 1].stop > words[start].start:  # "㍿" is four tokens
                first -= 1
            while last < len(words) and words[last].start < words[stop - 1].stop:
                last += 1
            free[first:last] = [False] * (last - first)
            best = min(found.rank for found in by_span[start, stop])
            equal = [found for found in by_span[start, stop] if found.rank == best]
            if len(equal) > 1 and ambiguous == "drop":
                continue
            chosen.append(_match(words[start:stop], equal))
        return sorted(chosen, key=lambda match: match.start)

    def holds(self, phrase: str) -> bool:
        """Whether the text of `phrase` is printed here, in one line or block, sign for sign."""
        keys = [token.key for token in tokens(phrase)]
        return bool(keys) and any(
            [printed.token.key for printed in self._blocks[b][i : i + len(keys)]] == keys
            for b, i in self._starts.get(keys[0], ())
        )

    def _at(self, answer: str, words: list[Token], start: int) -> list[_Found]:
        """Printed runs equal to the answer's tokens from `start` on, in every place and length."""
        found = []
        for b, i in self._starts.get(words[start].key, ()):  # "q1" is listed for "ql" too
            block = self._blocks[b]
            for length in range(1, min(len(block) - i, len(words) - start) + 1):
                spoken, printed = words[start + length - 1], block[i + length - 1]
                if not _same(spoken, printed.token):
                    break
                run = tuple(block[i : i + length])
                if _worth_it(answer, words[start : start + length], run):
                    rank = self._rank(words[start : start + length], run)
                    found.append(_Found(start, start + length, run, rank))
        return found

    def _rank(self, spoken: list[Token], run: tuple[_Printed, ...]) -> tuple:
        pairs = [(word, printed.token) for word, printed in zip(spoken, run)]
        return (
            any(id(printed.line) in self._ticks for printed in run),
            sum(a.key != b.key for a, b in pairs),
            not _whole(run),
            sum(a.sign != b.sign for a, b in pairs),
            sum(a.surface.islower() != b.surface.islower() for a, b in pairs if len(a.key) <= 3),
        )


def _printed(block: list[Line]) -> list[_Printed]:
    found = []
    for line in block:
        inside = line.tokens()
        for i, (token, first, last) in enumerate(inside):
            found.append(_Printed(token, line, first, last, i == 0, i == len(inside) - 1))
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


def _match(spoken: list[Token], found: list[_Found]) -> Match:
    """One match for the equally good places; signs belong to it where they are printed too."""
    first, last = spoken[0], spoken[-1]
    start = first.outer[0] if found[0].printed[0].token.sign == first.sign else first.start
    stop = last.outer[1] if found[0].printed[-1].token.sign == last.sign else last.stop
    places = {place: None for each in found for place in _places(each.printed)}
    return Match(start, stop, tuple(places), len(found) > 1)


def _places(run: tuple[_Printed, ...]) -> list[Place]:
    """One box for each line the text runs over."""
    by_line: dict[int, list[_Printed]] = defaultdict(list)
    for printed in run:
        by_line[id(printed.line)].append(printed)
    return [
        Place(
            each[0].line.image,
            union([word.box for p in each for word in p.line.words[p.first : p.last]]),
        )
        for each in by_line.values()
    ]
