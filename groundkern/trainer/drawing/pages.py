"""Text set on the grid of visual tokens: every word ends at the right edge of a cell.

So the bottom-right corner of each word's box lies in a visual token of its own, which is the one
that DV-SFT labels (docs/methods/dv-sft.md, label-to-image).
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from groundkern.trainer.config import ConfigError

MARGIN = 3  # pixels between a word and the edge of its last cell

Box = tuple[float, float, float, float]
Color = tuple[int, int, int]


class Placed(NamedTuple):
    """A word of a line, or (`whole` False) a piece of one that is longer than a line.

    Args:
        text: what is drawn.
        stop: the column after its last cell.
        whole: a word and not a piece.
    """

    text: str
    stop: int
    whole: bool = True


@dataclass(frozen=True)
class Face:
    """A font on a grid of square cells.

    Args:
        font: from `load_font`.
        cell: pixels of a visual token.

    Raises:
        ConfigError: the font's lines are higher than a cell.
    """

    font: ImageFont.FreeTypeFont
    cell: int

    def __post_init__(self) -> None:
        if sum(self.font.getmetrics()) > self.cell:
            high = f"{sum(self.font.getmetrics())} pixels"
            raise ConfigError(
                f"`font-size`: expected lines that fit a visual token of {self.cell} pixels, "
                f"got {high} of {' '.join(self.font.getname())} at {self.font.size:g}"
            )

    def cells(self, text: str) -> int:
        """How many cells of a line the text needs."""
        return int(-(-(_length(self.font, text) + 2 * MARGIN) // self.cell))

    def draw(
        self, draw: ImageDraw.ImageDraw, text: str, right: float, top: float, *, fill: Color
    ) -> Box:
        """Draws so that the text ends at x = `right`, in a cell from y = `top`; its box."""
        ascent, descent = self.font.getmetrics()
        bottom = top + self.cell - (self.cell - ascent - descent) // 2 - descent
        x = right - _length(self.font, text)
        box = draw.textbbox((x, bottom), text, font=self.font, anchor="ls")
        draw.text((x, bottom), text, font=self.font, anchor="ls", fill=fill)
        return tuple(float(edge) for edge in box)


@lru_cache(maxsize=4096)
def _length(font: ImageFont.FreeTypeFont, text: str) -> float:
    """Pixels; a word is asked for four times on its way to the page, and words come again."""
    return font.getlength(text)


def set_lines(words: Iterable[str], face: Face, columns: int) -> Iterator[list[Placed]]:
    """Breaks words into lines of `columns` cells, each word in its own cells.

    A word longer than a line is broken into pieces, which begin lines of their own.
    """
    line: list[Placed] = []
    for word in words:
        for text, whole in _pieces(word, face, columns):
            start = line[-1].stop if line else 0
            cells = face.cells(text)
            if start + cells > columns:
                yield line
                line, start = [], 0
            line.append(Placed(text, start + cells, whole))
    if line:
        yield line


def draw_lines(
    image: Image.Image, lines: Iterable[list[Placed]], face: Face, ink: Color
) -> list[list[tuple[str, Box]]]:
    """Draws lines from the top of an image; (word, box in pixels) of the whole words of each."""
    draw, drawn = ImageDraw.Draw(image), []
    for row, line in enumerate(lines):
        drawn.append([])
        for placed in line:
            right, top = placed.stop * face.cell - MARGIN, row * face.cell
            box = face.draw(draw, placed.text, right, top, fill=ink)
            if placed.whole:
                drawn[-1].append((placed.text, box))
    return drawn


def dark_and_light(rng: random.Random) -> tuple[Color, Color]:
    """One random dark and one random light colour."""
    dark = tuple(rng.randrange(0, 90) for _ in range(3))
    light = tuple(rng.randrange(190, 256) for _ in range(3))
    return dark, light


@cache
def load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """A font by the name of its family, of those installed and those matplotlib ships (DejaVu).

    Args:
        name: for example "DejaVu Sans", or the path of a font file.
        size: pixels to the em.

    Raises:
        ConfigError: no such font.
    """
    try:
        path = name if Path(name).suffix else _find(name)
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except (OSError, ValueError):
        raise ConfigError(
            f"`font`: expected an installed font or a font file, got {name!r}"
        ) from None


def undrawable(word: str, font: ImageFont.FreeTypeFont) -> str | None:
    """Why a word cannot be drawn in this font, if it cannot."""
    for character in word:
        if unicodedata.bidirectional(character) in ("R", "AL"):
            return f"{character!r} of a script from right to left, which is not laid out"
        if not _has_glyph(font, character):
            return f"{character!r}, which {font.getname()[0]} has no glyph for"
    return None


def visible(text: str) -> list[str]:
    """The words of a text, without control and format characters."""
    words = (
        "".join(c for c in word if unicodedata.category(c) not in ("Cc", "Cf"))
        for word in text.split()
    )
    return [word for word in words if word]


def _find(name: str) -> str:
    from matplotlib import font_manager

    return font_manager.findfont(
        font_manager.FontProperties(family=name), fallback_to_default=False
    )


def _pieces(word: str, face: Face, columns: int) -> Iterator[tuple[str, bool]]:
    if face.cells(word) <= columns:
        yield word, True
        return
    piece = ""
    for character in word:
        if piece and face.cells(piece + character) > columns:
            yield piece, False
            piece = ""
        piece += character
    yield piece, False


@cache
def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    missing = font.getmask("\U0010ffff")
    mask = font.getmask(character)
    return (mask.size, bytes(mask)) != (missing.size, bytes(missing))
