"""From characters of a message to tokens of the sequence.

Chat templates decide what surrounds a message, processors replace an image placeholder by many tokens, tokenizers
glue the leading space to a word. So the texts are rendered between two marker characters, which tell where each one
went, offsets are shifted past the expanded placeholders, and a token belongs to a span when they *overlap*.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from groundkern.checks import fail, require

_BEGIN, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: never part of a text


@dataclass(frozen=True)
class Piece:
    """Characters `start:stop` of a message stand at `at` in the rendered chat."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Turn:
    """An assistant message: where its text went, and what the template puts behind it."""

    pieces: tuple[Piece, ...]
    tail: tuple[int, int]  # characters of the rendered chat

    def find(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Character spans of the rendered chat for characters `start:stop` of the message."""
        spans = ((p, max(start, p.start), min(stop, p.stop)) for p in self.pieces)
        return [(p.at + low - p.start, p.at + high - p.start) for p, low, high in spans if low < high]


@dataclass(frozen=True)
class Chat:
    """A rendered chat and its assistant turns by message index."""

    text: str
    turns: dict[int, Turn]


def _marked(message: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The message with markers around each text's inside, and the character span of each inside."""
    parts, spans, at = [], [], 0
    for part in message["content"]:
        if part["type"] == "text" and part["text"].strip():
            text = part["text"]
            core = text.strip()
            lead = len(text) - len(text.lstrip())
            # white space stays outside: a template that strips a text then does the same to the marked one
            marked = text[:lead] + _BEGIN + core + _END + text[lead + len(core) :]
            spans.append((at + lead, at + lead + len(core)))
            parts.append({"type": "text", "text": marked})
        else:
            parts.append(part)
        at += len(part.get("text", ""))
    return {**message, "content": parts}, spans


def render_chat(processor: Any, messages: list[dict[str, Any]], name: str) -> Chat:
    """Render messages (their content a list of parts) and find the assistant texts in the result.

    Args:
        processor: its chat template is used.
        messages: chat messages, from `GroundedExample.chat`.
        name: the sample's name for error messages.

    Raises:
        ValueError: the template drops or rewrites an assistant text, so that its characters cannot be followed.
    """

    def render(chat: list[dict[str, Any]]) -> str:
        return processor.apply_chat_template(chat, tokenize=False)

    spans: dict[int, list[tuple[int, int]]] = {}
    marked = list(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            marked[index], spans[index] = _marked(message)
    pieces_of_text = re.split(f"[{_BEGIN}{_END}]", render(marked))
    text = "".join(pieces_of_text)
    found = len(pieces_of_text) // 2
    wanted = sum(map(len, spans.values()))
    if found != wanted or text != render(messages):
        fail(f"{name}: messages", "a chat template that keeps assistant texts as they are", f"{text!r}")
    ends = [0]
    for piece in pieces_of_text:
        ends.append(ends[-1] + len(piece))
    turns, next_piece = {}, 0
    for index, inside in spans.items():
        pieces = []
        for start, stop in inside:
            pieces.append(Piece(start, stop, ends[2 * next_piece + 1]))
            next_piece += 1
        if not pieces:
            continue
        end = pieces[-1].at + pieces[-1].stop - pieces[-1].start
        rest = text[end:]
        if index + 1 < len(messages):  # only what this message itself puts behind its text
            own = re.split(_END, render(marked[: index + 1]))[-1]
            rest = os.path.commonprefix([own, rest])
        turns[index] = Turn(tuple(pieces), (end, end + len(rest)))
    return Chat(text, turns)


class TokenSpans:
    """The tokens of one sequence by characters of the rendered chat.

    Args:
        offsets: the tokenizer's (start, stop) per token in the text with expanded placeholders.
        text: the rendered chat, one placeholder per image.
        placeholder: the image token's text.
        expanded: how many image tokens each placeholder became.
        name: the sample's name for error messages.
    """

    def __init__(
        self,
        offsets: list[tuple[int, int]],
        text: str,
        placeholder: str,
        expanded: list[int],
        name: str,
    ) -> None:
        places = [match.end() for match in re.finditer(re.escape(placeholder), text)]
        require(
            len(places) == len(expanded),
            f"{name}: messages",
            f"{len(expanded)} image placeholders {placeholder!r}, one per image",
            str(len(places)),
        )
        self._places, self._gained = places, [0]
        for count in expanded:
            self._gained.append(self._gained[-1] + (count - 1) * len(placeholder))
        self._starts: list[int] = []
        self._stops: list[int] = []
        last = 0
        for start, stop in offsets:  # added tokens come as (0, 0): keep both lists ascending
            start, stop = (start, stop) if stop > start else (last, last)
            last = max(last, stop)
            self._starts.append(start)
            self._stops.append(last)

    def tokens(self, start: int, stop: int) -> range:
        """Tokens that overlap characters `start:stop` of the rendered chat (no placeholder within)."""
        gained = self._gained[bisect_right(self._places, start)]
        low = bisect_right(self._stops, start + gained)
        high = bisect_left(self._starts, stop + gained)
        return range(low, max(low, high))
