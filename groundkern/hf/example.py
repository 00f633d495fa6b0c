"""What `GroundingCollator` eats: images, chat messages, and what is known about where things are.

Every coordinate is a fraction of the EXIF-rotated original image: x to the right, y down, measured at pixel edges
(the whole image is `(0, 0, 1, 1)`). Character spans index the text of one assistant message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Polygon = tuple[Point, ...]


@dataclass(frozen=True)
class Region:
    """Characters `start:stop` of message `turn` speak of these places of image `image` (their union)."""

    turn: int
    start: int
    stop: int
    image: int
    boxes: tuple[Box, ...] = ()
    points: tuple[Point, ...] = ()
    polygons: tuple[Polygon, ...] = ()


@dataclass(frozen=True)
class Word:
    """A word that stands in `box` of image `image`."""

    text: str
    box: Box
    image: int


@dataclass(frozen=True)
class Phrase:
    """Characters `start:stop` of message `turn` are a phrase; `subject` is the span of its head noun."""

    turn: int
    start: int
    stop: int
    subject: tuple[int, int] | None = None


@dataclass(frozen=True)
class GroundedExample:
    """One training sample.

    Args:
        images: PIL images, already rotated as their EXIF data asks, in the order of their placeholders.
        messages: Hugging Face chat messages; `content` is a string or a list of
            `{"type": "image"}` and `{"type": "text", "text": ...}` parts. The text of a message is the
            concatenation of its text parts. Images without a placeholder precede the first user message.
        regions: text spans and the places they speak of (SMAM, KLAL).
        words: words and their boxes (DV-SFT).
        phrases: phrases and their subjects (HIST).
        name: what error messages call this sample, for example `train.jsonl:17`.
    """

    images: tuple[Image.Image, ...]
    messages: list[dict[str, Any]]
    regions: tuple[Region, ...] = ()
    words: tuple[Word, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    name: str = ""
