"""One sequence after truncation: which tokens stay, and where the characters of a message went.

Visual tokens and the special tokens around them always stay; text is cut from the end.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.example import (
    GroundedExample,
    Phrase,
    Region,
    is_trained,
    message_text,
)
from groundkern.hf.data.spans import Chat, TokenSpans


@dataclass
class Layout:
    """One sequence after truncation. Positions count its tokens from 0, without padding.

    Args:
        example: the example it was made of.
        chat: its rendered text.
        spans: finds the tokens, before truncation, of characters of the rendered text.
        stays: the tokens that stay, as ascending positions before truncation.
        ids: their token ids.
        special: the ids of special tokens, and of those that the template closes turns with.
        visual: int64 [C] positions of the visual tokens.
        table: fp64 [C, 5] of `image_geometry`; videos count behind the images.
        times: fp64 [C, 2], the seconds of a video from which and up to which a visual token shows
            it; -1: of an image, or without a place.
    """

    example: GroundedExample
    chat: Chat
    spans: TokenSpans
    stays: list[int]
    ids: list[int]
    special: frozenset[int]
    visual: Tensor
    table: Tensor
    times: Tensor
    _position: dict[int, int] = field(init=False, repr=False)
    _known: dict[tuple[int, int, int], list[int | None]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self._position = {before: now for now, before in enumerate(self.stays)}

    def positions(self, start: int, stop: int) -> list[int | None]:
        """The tokens of characters of the rendered chat.

        Args:
            start, stop: the characters.

        Returns:
            Ascending positions; None for a token that was cut off.
        """
        return [self._position.get(token) for token in self.spans.tokens(start, stop)]

    def position(self, token: int) -> int | None:
        """Where a token is after truncation; None: cut off."""
        return self._position.get(token)

    def trains(self, span: Region | Phrase) -> bool:
        """Whether the answer that a region or phrase is of is learned from."""
        return is_trained(self.example.messages[span.turn])

    def teaches(self, span: Region | Phrase) -> bool:
        """Whether something is learned of a region or phrase: its answer, and its weight is not 0.

        Source: (W1).
        """
        return self.trains(span) and self.example.weight_of(span) != 0

    def text_positions(self, span: Region | Phrase, field: str) -> list[int | None]:
        """The tokens of a region's or phrase's text, without the white space at its ends.

        Args:
            span: characters `start:stop` of message `turn`.
            field: what error messages call it, for example `regions[0]`.

        Returns:
            Ascending positions; None for a token that was cut off.

        Raises:
            ValueError: the tokenizer drops the text, or has one token for characters in it and
                beside it; the message names the example and the field.
        """
        key = span.turn, span.start, span.stop
        if (known := self._known.get(key)) is not None:
            return known
        text = message_text(self.example.messages[span.turn])[span.start : span.stop]
        start = span.start + len(text) - len(text.lstrip())
        positions: list[int | None] = []
        for low, high in self.chat.turns[span.turn].find(start, start + len(text.strip())):
            tokens, before, behind = self.spans.words(low, high)
            if before or behind:
                lost = _lost(self.chat.text, low, high, before, behind)
                if lost is not None:
                    name = self.example.name or "example"
                    fail(f"{name}: {field}", "text with tokens of its own", lost)
            positions += [self._position.get(token) for token in tokens]
        self._known[key] = positions
        return positions

    def last_position(self, turn: int) -> int | None:
        """The last token of an answer's text; None if it was cut off.

        Args:
            turn: the index of an assistant message that has visible text.
        """
        message = self.chat.turns[turn]
        tokens = self.spans.tokens(message.pieces[0].at, message.tail[0])
        return self._position.get(tokens[-1])


def _lost(chat: str, start: int, stop: int, before: int, behind: int) -> str | None:
    """What is wrong with the text `start:stop` of a chat, whose ends its tokens do not cover."""
    text = repr(chat[start:stop])
    if before == stop - start:
        return f"{text}, of which the tokenizer keeps nothing"
    if before and _joins(chat[start - 1 : start], chat[start]):
        return f"{text}, which begins within a character"
    uncovered = range(stop - behind, stop)
    lost = [i for i in uncovered if not (_unseen(chat[i]) or _joins(chat[i - 1], chat[i]))]
    return f"{text}, whose {chat[lost[0]]!r} has none" if lost else None


def _unseen(character: str) -> bool:
    """Whether a character is white space, a control or a format character."""
    return unicodedata.category(character)[0] in "CZ"


def _joins(before: str, after: str) -> bool:
    """Whether a character belongs to the one before it: a combining mark, or what NFKC composes,
    such as halfwidth kana and their voicing marks."""
    if unicodedata.category(after)[0] == "M":
        return True
    apart = unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", after)
    return unicodedata.normalize("NFKC", before + after) != apart


def tokens_that_stay(
    ids: list[int],
    images: list[range],
    special: frozenset[int],
    max_length: int | None,
    name: str,
) -> list[int]:
    """Cut a sequence to `max_length`: images, videos and the special tokens beside them stay, and
    as much text as there is room for, from the start.

    Args:
        ids: the sequence's token ids.
        images: the tokens of each image or video, with those between its tiles or frames
            (`TokenSpans.images`).
        special: the ids of special tokens.
        max_length: tokens at most; None: no limit.
        name: the sample's name, for errors.

    Returns:
        Ascending positions in `ids`.

    Raises:
        ValueError: images and videos alone are longer than `max_length`.
    """
    if max_length is None or len(ids) <= max_length:
        return list(range(len(ids)))
    stays = {token for image in images for token in image}
    beside = {token for image in images for token in (image.start - 1, image.stop)}
    stays |= {token for token in beside if 0 <= token < len(ids) and ids[token] in special}
    room = max_length - len(stays)
    require(room >= 0, f"{name}: max_length", f"at least {len(stays)}, for its images", max_length)
    text = [token for token in range(len(ids)) if token not in stays]
    return sorted([*stays, *text[:room]])


def trained_positions(layout: Layout, counts: Counter[str]) -> list[int]:
    """The tokens to learn: every assistant text but those of context, and what closes its turn.

    What the template puts behind the text is learned up to its first special token, behind an empty
    text too. A template that closes a turn without one (the hub's LLaVA-1.5) does not teach the
    model to stop.

    Args:
        layout: the sequence.
        counts: adds to `answers`, `answers_empty`, `answers_truncated`, `answers_untrained`.

    Returns:
        Ascending positions. The first token of a sequence is none of them: no row predicts it; nor
        is one of an image within an answer.
    """
    trained: set[int] = set()
    for index, message in enumerate(layout.example.messages):
        if not is_trained(message):
            if message["role"] == "assistant":
                counts["answers_untrained"] += 1
            continue
        counts["answers"] += 1
        visible = message_text(message).strip() != ""
        counts["answers_empty"] += not visible
        turn = layout.chat.turns.get(index)
        if turn is None:  # empty, and a template that writes no empty answers
            continue
        body = layout.positions(turn.pieces[0].at, turn.tail[0]) if visible else []
        left = [p for p in body if p is not None]
        counts["answers_truncated"] += visible and not left
        trained.update(left)
        closing: list[int] = []
        for p in layout.positions(*turn.tail):
            if p is None:
                break
            closing.append(p)
            if layout.ids[p] in layout.special:
                trained.update(closing)
                break
    for image in layout.spans.images:
        if image and layout.position(image[0]) in trained:  # in the middle of an answer
            trained.difference_update(map(layout.position, image))
    return sorted(trained - {0})
