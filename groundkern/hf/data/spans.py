"""From characters of a message to tokens of the sequence.

Chat templates decide what surrounds a message, processors replace an image placeholder by many
tokens, and tokenizers put the space before a word into its token. So each text is rendered between
two marker characters, which show where it went; offsets are shifted past the expanded placeholders;
and a token belongs to a span if the two *overlap*.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, islice, takewhile
from typing import Any, NamedTuple

from groundkern.checks import fail
from groundkern.hf.data.calling import rendered
from groundkern.hf.data.example import message_text

_BEGIN, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: never part of a text

_Insides = dict[int, list[tuple[int, str]]]  # (where it begins, text) of each message's texts


@dataclass(frozen=True)
class Piece:
    """A stretch of a message's text that stands in the rendered chat as it is.

    Args:
        start, stop: its characters in the message.
        at: where it begins in the rendered chat.
    """

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Turn:
    """An assistant message in the rendered chat.

    Args:
        pieces: where its text went.
        tail: (start, stop) of what the template puts behind its text.
    """

    pieces: tuple[Piece, ...]
    tail: tuple[int, int]

    def find(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Find characters of the message in the rendered chat.

        Args:
            start, stop: characters of the message.

        Returns:
            (start, stop) in the rendered chat, one pair for each piece they touch.
        """
        spans = ((p, max(start, p.start), min(stop, p.stop)) for p in self.pieces)
        return [
            (p.at + low - p.start, p.at + high - p.start) for p, low, high in spans if low < high
        ]


@dataclass(frozen=True)
class Chat:
    """A rendered chat.

    Args:
        text: all of it, one placeholder per image and per video.
        turns: its assistant messages by the message's index; one without visible text has a piece
            without characters, if the template renders it like any other.
    """

    text: str
    turns: dict[int, Turn]


def _marked(message: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """The message with markers around each text, and (where it begins, text) without the markers.

    White space at the ends of a text stays outside: a template that strips texts then strips the
    marked one alike. A message without visible text has its markers behind its last text.
    """
    parts, insides, at = [], [], 0
    for part in message["content"]:
        if part["type"] == "text" and part["text"].strip():
            text = part["text"]
            core = text.strip()
            lead = len(text) - len(text.lstrip())
            marked = text[:lead] + _BEGIN + core + _END + text[lead + len(core) :]
            insides.append((at + lead, core))
            parts.append({"type": "text", "text": marked})
        else:
            parts.append(part)
        at += len(part.get("text", ""))
    if not insides:
        texts = [i for i, part in enumerate(parts) if part["type"] == "text"]
        last = texts[-1] if texts else len(parts)
        before = parts[last]["text"] if texts else ""
        parts[last : last + 1] = [{"type": "text", "text": before + _BEGIN + _END}]
        insides.append((at, ""))
    return {**message, "content": parts}, insides


def render_chat(
    processor: Any,
    messages: list[dict[str, Any]],
    name: str,
    tools: Sequence[dict[str, Any]] = (),
) -> Chat:
    """Render a chat and find the assistant texts in the result.

    Args:
        processor: has the chat template.
        messages: of `GroundedExample.chat`.
        name: the sample's name for error messages.
        tools: JSON schemas of functions that the template is to name.

    Returns:
        The chat as the template renders it, without markers.

    Raises:
        ValueError: the template drops or rewrites an assistant text, so that its characters cannot
            be followed, or it drops what a tool said or the tools.
    """

    def render(chat: list[dict[str, Any]]) -> str:
        return rendered(processor, chat, tools)

    insides: _Insides = {}
    marked = list(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            marked[index], insides[index] = _marked(message)
    plain = render(messages)
    _check_tools(processor, messages, tools, plain, name)
    pieces = re.split(f"[{_BEGIN}{_END}]", render(marked))  # every second piece was marked
    if not _as_they_are(pieces, insides, plain):
        for index in [i for i, inside in insides.items() if not inside[0][1]]:
            marked[index] = messages[index]  # a template that treats empty answers otherwise
            del insides[index]
        pieces = re.split(f"[{_BEGIN}{_END}]", render(marked))
        if not _as_they_are(pieces, insides, plain):
            wanted = "a chat template that renders assistant texts as they are"
            fail(f"{name}: messages", wanted, repr("".join(pieces)))
    return Chat(plain, _turns(pieces, insides, marked, render))


def _check_tools(
    processor: Any,
    messages: list[dict[str, Any]],
    tools: Sequence[dict[str, Any]],
    plain: str,
    name: str,
) -> None:
    """Refuse a template that leaves out what it does not know: tools, or what one of them said."""
    if tools and rendered(processor, messages) == plain:
        fail(f"{name}: tools", "a chat template that names tools", "one that leaves them out")
    for index, message in enumerate(messages):
        if message["role"] == "tool" and message_text(message).strip() not in plain:
            wanted = "a chat template that takes messages of a tool as they are"
            fail(f"{name}: messages[{index}]", wanted, "one that does not")


def _as_they_are(pieces: list[str], insides: _Insides, plain: str) -> bool:
    """Whether the marked texts came out whole, in order, and left the rest as it is without."""
    cores = [core for inside in insides.values() for _, core in inside]
    return pieces[1::2] == cores and "".join(pieces) == plain


def _turns(
    rendered: list[str],
    insides: _Insides,
    marked: list[dict[str, Any]],
    render: Callable[[list[dict[str, Any]]], str],
) -> dict[int, Turn]:
    """Where the assistant texts are in the rendered chat, whose every second piece is one."""
    text = "".join(rendered)
    begins = islice(accumulate(map(len, rendered), initial=0), 1, None, 2)
    turns = {}
    for index, inside in insides.items():
        pieces = [Piece(start, start + len(core), next(begins)) for start, core in inside]
        end = pieces[-1].at + len(inside[-1][1])
        rest = text[end:]
        if index + 1 < len(marked):  # only what this message itself puts behind its text
            own = render(marked[: index + 1]).rpartition(_END)[2]
            shared = takewhile(lambda pair: pair[0] == pair[1], zip(own, rest))
            rest = rest[: len(list(shared))]
        turns[index] = Turn(tuple(pieces), (end, end + len(rest)))
    return turns


class Expansion(NamedTuple):
    """A placeholder of an image or a video, and the characters that took its place.

    Args:
        stop: the placeholder's end in the rendered chat, with what the processor put into it.
        new_start, new_stop: the characters in the text with expanded placeholders.
        kind: "image" or "video".
    """

    stop: int
    new_start: int
    new_stop: int
    kind: str = "image"


def find_expansions(
    text: str,
    placeholders: Mapping[str, str],
    tokens: Mapping[str, Sequence[int]],
    replaced: list[dict[str, Any]] | None,
) -> list[Expansion]:
    """Find what each placeholder of a rendered chat became.

    Args:
        text: the rendered chat, one placeholder per image and per video.
        placeholders: their texts by kind, "image" and perhaps "video".
        tokens: by kind, how many visual tokens each has.
        replaced: the processor's own `text_replacement_offsets`; None, for a transformers without
            them: each placeholder was repeated once per visual token.

    Returns:
        One for each placeholder, in their order.
    """
    if replaced is not None:
        kinds = ("video" if r.get("type") == "video" else "image" for r in replaced)
        spans = ((r["span"][1], *r["new_span"]) for r in replaced)
        return [Expansion(stop, a, b, kind) for (stop, a, b), kind in zip(spans, kinds)]
    found, gained = [], 0
    counts = {kind: iter(each) for kind, each in tokens.items()}
    either = "|".join(f"(?P<{kind}>{re.escape(text)})" for kind, text in placeholders.items())
    for match in re.finditer(either, text):
        kind = match.lastgroup or ""
        count = next(counts[kind])
        start, length = match.start() + gained, count * len(match[0])
        found.append(Expansion(match.end(), start, start + length, kind))
        gained += length - len(match[0])
    return found


class Insertion(NamedTuple):
    """Characters that a processor puts into a rendered chat.

    Args:
        at: where, in the rendered chat.
        length: how many.
    """

    at: int
    length: int


def find_insertions(text: str, laid: str, name: str) -> list[Insertion]:
    """Find what a processor put into a rendered chat before it replaced the placeholders.

    Args:
        text: the rendered chat.
        laid: the same with what was put in.
        name: the sample's name for error messages.

    Returns:
        In their order.

    Raises:
        ValueError: more was changed than put in.
    """
    if text == laid:
        return []
    found = []
    for what, start, stop, low, high in SequenceMatcher(None, text, laid, False).get_opcodes():
        if what == "insert":
            found.append(Insertion(start, high - low))
        elif what != "equal":
            wanted = "a processor that leaves the rendered chat whole"
            fail(f"{name}: messages", wanted, f"{laid[low:high]!r} for {text[start:stop]!r}")
    return found


class Words(NamedTuple):
    """The tokens of visible text, and how far they cover it.

    A tokenizer that normalises text drops characters, or gives several as one token with the
    offsets of the first ("e" and a combining accent) or of the last ("..." as an ellipsis).

    Args:
        tokens: positions before truncation.
        before, behind: how many characters at the text's start and end no token's offsets cover;
            all of them twice without any token.
    """

    tokens: range
    before: int
    behind: int


class TokenSpans:
    """The tokens of one sequence by characters of the rendered chat.

    Args:
        offsets: the tokenizer's (start, stop) per token in the text with expanded placeholders.
        expansions: of `find_expansions`.
        blank: whether the token at a position is white space alone; None: nobody knows.
        insertions: of `find_insertions`.

    Attributes:
        images: the tokens that each image or video became, with those between its tiles or frames.
        kinds: of each, "image" or "video".
    """

    def __init__(
        self,
        offsets: list[tuple[int, int]],
        expansions: list[Expansion],
        blank: Callable[[int], bool] | None = None,
        insertions: Sequence[Insertion] = (),
    ) -> None:
        self._blank = blank
        self._inserted = [insertion.at for insertion in insertions]
        self._lengths = [0, *accumulate(insertion.length for insertion in insertions)]
        self._places = [e.stop for e in expansions]
        self._gained = [0, *(e.new_stop - e.stop for e in expansions)]
        self._starts: list[int] = []
        self._stops: list[int] = []
        last = 0
        for start, stop in offsets:  # added tokens have (0, 0); both lists must ascend
            start, stop = (start, stop) if stop > start else (last, last)
            last = max(last, stop)
            self._starts.append(start)
            self._stops.append(last)
        self.kinds = [e.kind for e in expansions]
        self.images = [self._overlapping(e.new_start, e.new_stop) for e in expansions]

    def tokens(self, start: int, stop: int) -> range:
        """Find the tokens that overlap a stretch of the rendered chat.

        Args:
            start, stop: its characters.
        """
        return self._overlapping(*self._expanded(start, stop))

    def words(self, start: int, stop: int) -> Words:
        """Find the tokens of visible text, without the spaces that a tokenizer puts around it.

        Llama's in front of the first word, and BERT's around every Chinese character, have the
        offsets of a visible one.

        Args:
            start, stop: characters of the rendered chat, visible at both ends.
        """
        starts, stops = self._starts, self._stops
        start, stop = self._expanded(start, stop)
        found = self._overlapping(start, stop)
        if not found:
            return Words(found, stop - start, stop - start)
        low, high = found.start, found.stop
        before, behind = max(0, starts[low] - start), max(0, stop - stops[high - 1])
        if self._blank is not None:
            while low + 1 < high and starts[low] == starts[low + 1] and self._blank(low):
                low += 1
            while low + 1 < high and stops[high - 1] == stops[high - 2] and self._blank(high - 1):
                high -= 1
        return Words(range(low, high), before, behind)

    def _expanded(self, start: int, stop: int) -> tuple[int, int]:
        """A stretch of the rendered chat in the text with expanded placeholders; what was put in
        at its ends is not part of it."""
        start += self._lengths[bisect_right(self._inserted, start)]
        stop += self._lengths[bisect_left(self._inserted, stop)]
        places, gained = self._places, self._gained
        return start + gained[bisect_right(places, start)], stop + gained[
            bisect_right(places, stop)
        ]

    def _overlapping(self, start: int, stop: int) -> range:
        low = bisect_right(self._stops, start)
        return range(low, max(low, bisect_left(self._starts, stop)))
