"""A sheet of pictures with a title and captions: each text has its own room, pixels stay as are."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from groundkern.trainer.drawing.pages import load_font

GAP = 12  # pixels between what stands on a sheet
NARROWEST = 320  # pixels of a column, whatever the picture's: a caption needs them
TITLE, CAPTION = 20, 14  # pixels to the em
LINES = 3  # of a title at most
READ = 2000  # characters of a title that are looked at


class Sheet:
    """Rows of pictures of one size, drawn one after another.

    Args:
        size: width and height of each picture.
        columns, rows: how many there are.
        title: above all; of more than `LINES` lines the rest is left out.
        lines: that a caption may have.

    Attributes:
        image: what is drawn so far.
        texts: the room that each line of text takes: x0, y0, x1, y1.
    """

    def __init__(
        self, size: tuple[int, int], columns: int, rows: int, *, title: str, lines: int
    ) -> None:
        self._fonts = {each: load_font("DejaVu Sans", each) for each in (TITLE, CAPTION)}
        self.size, self._lines = size, lines
        self._column = max(size[0], NARROWEST)
        width = columns * (self._column + GAP) + GAP
        said = fitted(title[:READ], self._fonts[TITLE], width - 2 * GAP, LINES)
        self._top = GAP + len(said) * _line(TITLE)
        self._row = GAP + lines * _line(CAPTION) + size[1]
        self.image = Image.new("RGB", (width, self._top + rows * self._row + GAP), "white")
        self.texts: list[tuple[float, float, float, float]] = []
        self._write(said, TITLE, width / 2, GAP)

    def add(self, picture: Image.Image, caption: Sequence[str], row: int, column: int) -> None:
        """Puts a picture in its place, its caption above it; a line too long is cut."""
        left = GAP + column * (self._column + GAP)
        top = self._top + row * self._row + GAP
        font = self._fonts[CAPTION]
        lines = [part for line in caption for part in fitted(line, font, self._column, 1)]
        self._write(lines[: self._lines], CAPTION, left + self._column / 2, top)
        top += self._lines * _line(CAPTION)
        self.image.paste(picture, (left + (self._column - self.size[0]) // 2, top))

    def _write(self, lines: Sequence[str], size: int, middle: float, top: float) -> None:
        draw = ImageDraw.Draw(self.image)
        for number, line in enumerate(lines):
            y, half = top + number * _line(size), self._fonts[size].getlength(line) / 2
            draw.text((middle - half, y), line, font=self._fonts[size], fill="black")
            self.texts.append((middle - half, y, middle + half, y + _line(size)))


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """The lines of a text, none wider than `width`; what is beyond `most` lines is an ellipsis."""
    lines, left = [], " ".join(text.split())
    while left and len(lines) < most:
        count = _fits(left, font, width)
        if count < len(left) and " " in left[: count + 1]:  # between words, where there are any
            count = left.rindex(" ", 0, count + 1)
        lines.append(left[:count])
        left = left[count:].lstrip()
    if left:
        room = width - font.getlength("…")
        lines[-1] = f"{lines[-1][: _fits(lines[-1], font, room)].rstrip()}…"
    return lines


def _fits(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many of a text's first characters are no wider than `width`; 1 at least."""
    wider = bisect(range(len(text) + 1), width, key=lambda n: font.getlength(text[:n]))
    return max(1, wider - 1)


def _line(size: int) -> int:
    return round(1.35 * size)
