"""Where answers are in a sequence that another program has tokenised, and maybe cut.

The tokens are decoded one after another, which says which characters each of them stands for; the
answers are looked for in that text.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

from tokenizers.decoders import DecodeStream

from groundkern.hf import GroundedExample
from groundkern.hf.data.example import message_text
from groundkern.hf.data.spans import Piece, Turn

FORMS: tuple[Literal["NFC", "NFKC"] | None, ...] = (None, "NFC", "NFKC")
"""In which a tokenizer may have kept a text."""

UNTRAINED = -100


class Found(NamedTuple):
    """An answer in a decoded sequence.

    Args:
        at: where its text begins.
        trained: whether its first token has a label.
    """

    at: int
    trained: bool


@dataclass(frozen=True)
class Decoded:
    """A sequence as text.

    Args:
        text: of all tokens but the visual ones.
        offsets: the characters of each token; the tokens of one character share them.
        labels: of each token.
    """

    text: str
    offsets: list[tuple[int, int]]
    labels: list[int]

    @cached_property
    def _ends(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens that have characters, and the first and last of these."""
        seen = [i for i, (low, high) in enumerate(self.offsets) if low < high]
        return seen, [self.offsets[i][0] for i in seen], [self.offsets[i][1] for i in seen]

    def occurrences(self, text: str, start: int, stop: int) -> list[Found]:
        """Where a text has tokens of its own, but for white space at its ends.

        Args:
            text: visible at both ends.
            start, stop: the characters among which it is looked for.
        """
        seen, lows, highs = self._ends
        found, at = [], self.text.find(text, start, stop)
        while at >= 0:
            end = at + len(text)
            first, last = bisect_right(lows, at) - 1, bisect_left(highs, end)
            beside = self.text[lows[first] : at] + self.text[end : highs[last]]
            if not beside.strip():
                found.append(Found(at, self.labels[seen[first]] != UNTRAINED))
            at = self.text.find(text, at + 1, stop)
        return found


def decoded(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], visual: set[int]) -> Decoded:
    """What each token of a sequence stands for.

    Args:
        tokenizer: a fast one.
        ids, labels: of the sequence.
        visual: ids of visual tokens, which have no text.
    """
    stream, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    text, offsets, waiting = "", [], 0
    for index in ids:
        shown = None if index in visual else stream.step(backend, index)
        if index in visual:
            offsets += [(len(text), len(text))] * (waiting + 1)
            waiting = 0
        elif shown is None:  # a part of a character, of which the rest is to come
            waiting += 1
        else:
            offsets += [(len(text), len(text) + len(shown))] * (waiting + 1)
            text, waiting = text + shown, 0
    offsets += [(len(text), len(text))] * waiting
    return Decoded(text, offsets, list(labels))


def located(
    example: GroundedExample, seen: Decoded, counts: Counter[str]
) -> tuple[GroundedExample, dict[int, Turn]]:
    """The answers of an example in a decoded sequence.

    Messages come in their order, each once. Of the places where an answer may be, before the next
    question, the first whose tokens have labels is taken, or else the first. Of a sequence that was
    cut, only answers are taken that no other message can have been.

    Args:
        example: with texts as the program rendered them.
        seen: its sequence.
        counts: adds to `answers_unfound`, `regions_unfound`.

    Returns:
        The example, its texts in the form in which the tokenizer kept them, answers without labels
        as context, and without regions and phrases of answers that were not found; and the turns.
    """
    for form in FORMS:
        normal = partial(unicodedata.normalize, form) if form else str
        search = _Search([normal(message_text(m)) for m in example.messages], example, seen)
        if len(search.turns) == sum(message["role"] == "assistant" for message in example.messages):
            return _changed(example, search.turns, search.trained, normal), search.turns
    search = _Search(list(map(message_text, example.messages)), example, seen)
    turns = {index: turn for index, turn in search.turns.items() if search.is_certain(index)}
    answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    counts["answers_unfound"] += len(answers) - len(turns)
    counts["regions_unfound"] += sum(region.turn not in turns for region in example.regions)
    kept: dict[str, Any] = {
        name: tuple(each for each in getattr(example, name) if each.turn in turns)
        for name in ("regions", "phrases")
    }
    return _changed(replace(example, **kept), turns, search.trained & turns.keys(), str), turns


class _Search:
    """Where each message of an example is: `turns` of answers by index, those that are `trained`.

    Args:
        texts: of the messages.
        example: whose roles count.
        seen: the sequence.
    """

    def __init__(self, texts: list[str], example: GroundedExample, seen: Decoded) -> None:
        self.seen, self.turns, self.trained = seen, dict[int, Turn](), set[int]()
        self._met: set[int] = set()
        roles = [message["role"] for message in example.messages]
        self._own = [  # a question's is behind placeholders of images
            (text if role == "assistant" else text.rpartition(">")[2]).strip()
            for role, text in zip(roles, texts, strict=True)
        ]
        at = 0
        for index, (role, own) in enumerate(zip(roles, self._own, strict=True)):
            if role != "assistant":
                places = seen.occurrences(own, at, len(seen.text)) if own else []
            elif not own:
                self.turns[index] = Turn((Piece(0, 0, at),), (at, at))
                continue
            else:
                places = self._places(index, at)
            if not places:
                continue
            self._met.add(index)
            at = places[0].at + len(own)
            if role == "assistant":
                lead = len(texts[index]) - len(texts[index].lstrip())
                piece = Piece(lead, lead + len(own), places[0].at)
                self.turns[index] = Turn((piece,), (at, at))
                if places[0].trained:
                    self.trained.add(index)

    def _places(self, index: int, at: int) -> list[Found]:
        """Places of an answer behind `at`, before the next question: the trained ones first."""
        seen, end = self.seen, len(self.seen.text)
        following = self._own[index + 1] if index + 1 < len(self._own) else ""
        bounds = seen.occurrences(following, at, end) if following else []
        for bound in [*(each.at for each in bounds), end]:
            if found := seen.occurrences(self._own[index], at, bound):
                return sorted(found, key=lambda each: not each.trained)
        return []

    def is_certain(self, index: int) -> bool:
        """Whether an answer stands between its neighbours, or no other message has its text.

        Where the messages around it are cut away, what was found may be a later answer of the same
        text.
        """
        own, last = self._own[index], len(self._own) - 1
        if index - 1 in self._met and (index == last or index + 1 in self._met):
            return True
        others = (text for i, text in enumerate(self._own) if i != index)
        once = len(self.seen.occurrences(own, 0, len(self.seen.text))) == 1 if own else True
        return once and not (own and any(own in text for text in others))


def _changed(
    example: GroundedExample,
    turns: dict[int, Turn],
    trained: set[int],
    normal: Callable[[str], str],
) -> GroundedExample:
    """The example with texts in another form, spans moved alike, and which answers are trained."""

    def moved(span: Any) -> Any:
        text = message_text(example.messages[span.turn])
        start, stop = (len(normal(text[:at])) for at in (span.start, span.stop))
        return replace(span, start=start, stop=stop)

    messages = [
        {
            "role": message["role"],
            "content": normal(message_text(message)),
            **({"train": index in trained} if message["role"] == "assistant" else {}),
        }
        for index, message in enumerate(example.messages)
    ]
    spans: dict[str, Any] = {
        n: tuple(map(moved, getattr(example, n))) for n in ("regions", "phrases")
    }
    return replace(example, messages=messages, **spans)
