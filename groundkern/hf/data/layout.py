"""One sequence after truncation: which tokens stay, and where the characters of a message went.

Visual tokens and the special tokens around them always stay; text is cut from the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.example import GroundedExample, Phrase, Region, message_text
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
        special: the ids of special tokens.
        visual: int64 [C] positions of the visual tokens.
        table: fp64 [C, 5] of `image_geometry`.
    """

    example: GroundedExample
    chat: Chat
    spans: TokenSpans
    stays: list[int]
    ids: list[int]
    special: frozenset[int]
    visual: Tensor
    table: Tensor
    _position: dict[int, int] = field(init=False, repr=False)

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

    def text_positions(self, span: Region | Phrase) -> list[int | None]:
        """The tokens of a region's or phrase's text, without the white space at its ends.

        Args:
            span: characters `start:stop` of message `turn`.

        Returns:
            Ascending positions; None for a token that was cut off.
        """
        text = message_text(self.example.messages[span.turn])[span.start : span.stop]
        start = span.start + len(text) - len(text.lstrip())
        found = self.chat.turns[span.turn].find(start, start + len(text.strip()))
        return [p for characters in found for p in self.positions(*characters)]


def tokens_that_stay(
    ids: list[int],
    images: list[range],
    special: frozenset[int],
    max_length: int | None,
    name: str,
) -> list[int]:
    """Cut a sequence to `max_length`: images and the special tokens beside them stay, and as much
    text as there is room for, from the start.

    Args:
        ids: the sequence's token ids.
        images: the tokens of each image, with those between its tiles (`TokenSpans.images`).
        special: the ids of special tokens.
        max_length: tokens at most; None: no limit.
        name: the sample's name, for errors.

    Returns:
        Ascending positions in `ids`.

    Raises:
        ValueError: the images alone are longer than `max_length`.
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


def trained_positions(layout: Layout) -> list[int]:
    """The tokens to learn: every assistant text, and what closes its turn.

    What the template puts behind the text is learned up to its first special token. A template that
    closes a turn without one (the hub's LLaVA-1.5) does not teach the model to stop.

    Args:
        layout: the sequence.

    Returns:
        Ascending positions. The first token of a sequence is none of them: no row predicts it.
    """
    trained: set[int] = set()
    for turn in layout.chat.turns.values():
        body = layout.positions(turn.pieces[0].at, turn.tail[0])
        trained.update(p for p in body if p is not None)
        closing: list[int] = []
        for p in layout.positions(*turn.tail):
            if p is None:
                break
            closing.append(p)
            if layout.ids[p] in layout.special:
                trained.update(closing)
                break
    return sorted(trained - {0})
