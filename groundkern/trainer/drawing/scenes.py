"""Pictures whose boxes are known, because this file draws them: word pages, charts, patch grids."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from groundkern.trainer.drawing.pages import (
    MARGIN,
    Box,
    Color,
    Face,
    dark_and_light,
    draw_lines,
    load_font,
    set_lines,
)

CELL = 28  # pixels of one visual token of the demo's model (patch 14, merged 2 x 2)
TEXT = 13  # pixels to the em in such a cell

RED: Color = (220, 30, 30)
MARKER: Color = (255, 190, 40)  # of a highlighter pen
QUIET: tuple[Color, ...] = ((40, 90, 200), (40, 150, 70), (230, 200, 60), (150, 150, 150))


@dataclass(frozen=True)
class Picture:
    """An image, the words drawn on it, and named boxes; all in pixel edges (x0, y0, x1, y1)."""

    image: Image.Image
    words: tuple[tuple[str, Box], ...] = ()
    boxes: tuple[tuple[str, Box], ...] = ()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped inside matplotlib, so the same pixels come out everywhere."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return load_font(str(path), size)


def face(cell: int = CELL) -> Face:
    """What the demo writes in; it grows with the cell."""
    return Face(font(round(TEXT * cell / CELL)), cell)


def word_page(
    words: list[str],
    rng: random.Random,
    *,
    columns: int,
    rows: int,
    marked: int | None = None,
    cell: int = CELL,
) -> Picture:
    """Draw the words in reading order, each ending at the right edge of a cell.

    One random dark and one random light colour, as in DV-SFT; line `marked`, from 0, is
    highlighted. `boxes` holds one entry a line: its text and the box around it. Stops at the last
    line; words that do not fit are left. Cells are `cell` pixels.
    """
    ink, paper = dark_and_light(rng)
    image = Image.new("RGB", (columns * cell, rows * cell), paper)
    _highlight(ImageDraw.Draw(image), marked, image.width, cell)
    pen = face(cell)
    lines = draw_lines(image, islice(set_lines(words, pen, columns), rows), pen, ink)
    drawn = [word for line in lines for word in line]
    boxes = tuple((" ".join(word for word, _ in line), _around(line)) for line in lines)
    return Picture(image, tuple(drawn), boxes)


def bar_chart(
    rows: list[tuple[str, str]],
    rng: random.Random,
    *,
    columns: int = 8,
    marked: int | None = None,
    cell: int = CELL,
    hues: list[Color] | None = None,
) -> Picture:
    """Horizontal bars, one cell of `cell` pixels high: the category's name, its bar, its value.

    `rows` are (category, value as printed in the table); row `marked`, from 0, is highlighted.
    `boxes` holds one entry a category: the box around its name, bar and value. With a colour for
    each bar (`hues`) they have no names, and no room for them.
    """
    hue = tuple(rng.randrange(60, 190) for _ in range(3)) if hues is None else None
    image = Image.new("RGB", (columns * cell, len(rows) * cell), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _highlight(draw, marked, image.width, cell)
    pen = face(cell)
    words: list[tuple[str, Box]] = []
    boxes: list[tuple[str, Box]] = []
    gap = cell * 3 // 14  # above and below a bar
    axis = 3 * cell if hues is None else 0
    longest = (columns - 2) * cell - axis
    top = max(float(value) for _, value in rows)
    for i, (category, value) in enumerate(rows):
        end = axis + max(2, longest * float(value) / top)
        bar = (axis, i * cell + gap, end, (i + 1) * cell - gap)
        draw.rectangle((bar[0], bar[1], bar[2] - 1, bar[3] - 1), fill=hue or hues[i])
        room = draw.textlength(value, font=pen.font) + 2 * MARGIN
        end = -(-(bar[2] + room) // cell) * cell - MARGIN
        label = pen.draw(draw, value, end, i * cell, fill=(0, 0, 0))
        drawn = [("", bar), (value, label)]
        if hues is None:
            name = pen.draw(draw, category, axis - MARGIN, i * cell, fill=(0, 0, 0))
            drawn.insert(0, (category, name))
        words += [word for word in drawn if word[0]]
        boxes += [(category, _around(drawn))]
    return Picture(image, tuple(words), tuple(boxes))


def patch_grid(
    row: int, column: int, rng: random.Random, *, side: int = 5, cell: int = CELL
) -> Picture:
    """A side x side grid of quiet colours in which the cell (row, column), from 1, is red."""
    image = Image.new("RGB", (side * cell, side * cell))
    draw = ImageDraw.Draw(image)
    for r in range(side):
        for c in range(side):
            base = RED if (r + 1, c + 1) == (row, column) else rng.choice(QUIET)
            color = tuple(min(255, max(0, part + rng.randrange(-20, 21))) for part in base)
            draw.rectangle((c * cell, r * cell, (c + 1) * cell - 1, (r + 1) * cell - 1), fill=color)
    x, y = (column - 1) * cell, (row - 1) * cell
    return Picture(image, boxes=(("red", (x, y, x + cell, y + cell)),))


def _highlight(draw: ImageDraw.ImageDraw, row: int | None, width: int, cell: int = CELL) -> None:
    if row is not None:
        draw.rectangle((0, row * cell, width - 1, (row + 1) * cell - 1), fill=MARKER)


def _around(items: list[tuple[str, Box]]) -> Box:
    left, top, right, bottom = zip(*(box for _, box in items), strict=True)
    return (min(left), min(top), max(right), max(bottom))
