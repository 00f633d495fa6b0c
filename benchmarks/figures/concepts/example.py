"""What all figures show: a picture of a cat, the sequence it becomes, where the cat is in it."""

from __future__ import annotations

from benchmarks.figures.concepts.canvas import (
    ALLOWED,
    ANSWER_TOKEN,
    INK,
    NONE,
    TEXT_TOKEN,
    VISUAL_TOKEN,
    Canvas,
)

COLUMNS, ROWS = 4, 3  # visual tokens
VISUAL = range(1, 1 + COLUMNS * ROWS)
WORDS = {0: "user:", 13: "what", 14: "is", 15: "it?", 16: "a", 17: "cat", 18: "."}
ANSWER = (16, 17, 18)
LENGTH = 19
CAT = (6, 7, 10, 11)  # the visual tokens on the cat
PREDICTS_CAT = 16  # the token before it
LANGUAGE = tuple(WORDS)


def colour_of(position: int) -> str:
    """The fill of a token."""
    if position in VISUAL:
        return VISUAL_TOKEN
    return ANSWER_TOKEN if position in ANSWER else TEXT_TOKEN


def picture(canvas: Canvas, x: float, y: float, width: float, height: float) -> None:
    """The picture, in the rectangle from its lower left corner; the cat is on the tokens `CAT`."""
    canvas.box(x, y, width, height, fill="#e8f1f5", edge=NONE, z=1)
    canvas.box(x, y, width, 0.28 * height, fill="#dfe6cf", edge=NONE, z=1.5)

    def at(u: float, v: float) -> tuple[float, float]:
        return x + u * width, y + v * height

    fur, eye = "#7b746a", "#f4f1e6"
    canvas.polygon([at(0.66, 0.10), at(0.73, 0.30), at(0.71, 0.36), at(0.62, 0.2)], fill=fur)
    canvas.ellipse(*at(0.535, 0.2), 0.29 * width, 0.3 * height, fill=fur)
    canvas.ellipse(*at(0.40, 0.42), 0.19 * width, 0.24 * height, fill=fur)
    for left in (0.315, 0.41):
        ear = [at(left, 0.47), at(left + 0.02, 0.615), at(left + 0.078, 0.52)]
        canvas.polygon(ear, fill=fur)
    for u in (0.367, 0.433):
        canvas.ellipse(*at(u, 0.44), 0.02 * width, 0.038 * height, fill=eye)


def grid(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    columns: int = COLUMNS,
    rows: int = ROWS,
    colour: str = INK,
    line: float = 0.6,
) -> None:
    """The lines of a grid."""
    for i in range(columns + 1):
        at = x + width * i / columns
        canvas.line((at, y), (at, y + height), colour=colour, width=line)
    for i in range(rows + 1):
        at = y + height * i / rows
        canvas.line((x, at), (x + width, at), colour=colour, width=line)


def numbers(canvas: Canvas, x: float, y: float, width: float, height: float) -> None:
    """The position of each visual token, in its cell's upper left corner."""
    for position in VISUAL:
        left, bottom = cell(position, x, y, width, height)
        at = (left + 1.4, bottom + height / ROWS - 1.35)
        canvas.text(*at, str(position), size=6, plate=True)


def cell(position: int, x: float, y: float, width: float, height: float) -> tuple[float, float]:
    """The lower left corner of a visual token's cell in a picture."""
    row, column = divmod(position - VISUAL.start, COLUMNS)
    return x + column * width / COLUMNS, y + (ROWS - 1 - row) * height / ROWS


def region(canvas: Canvas, x: float, y: float, width: float, height: float) -> None:
    """A box around the cat, on a picture."""
    left, bottom = cell(CAT[2], x, y, width, height)
    inset = 0.35
    canvas.box(
        left + inset,
        bottom + inset,
        width / 2 - 2 * inset,
        height * 2 / ROWS - 2 * inset,
        edge=ALLOWED,
        line=2,
        z=5,
    )


def strip(
    canvas: Canvas,
    x: float,
    y: float,
    size: float,
    *,
    shown: range | tuple[int, ...] = tuple(range(LENGTH)),
    used: tuple[int, ...] | range | None = None,
    marked: tuple[int, ...] = (),
    numbers: bool = False,
) -> None:
    """The sequence as cells; those not `used` are empty, `marked` ones have a thick edge."""
    for place, position in enumerate(shown):
        there = used is None or position in used
        fill = colour_of(position) if there else NONE
        edge = INK if there else "#b9b4a8"
        canvas.box(x + place * size, y, size, size, fill=fill, edge=edge, line=0.6, z=3)
        if numbers:
            canvas.text(x + (place + 0.5) * size, y + size / 2, str(position), size=6.5)
    for place, position in enumerate(shown):
        if position in marked:
            canvas.box(x + place * size, y, size, size, edge=ALLOWED, line=1.8, z=5)


def words_above(canvas: Canvas, x: float, y: float, size: float, *, length: int = LENGTH) -> None:
    """The texts of tokens, upright, above a strip whose top is at y, and a brace over the image."""
    for position, word in WORDS.items():
        if position < length:
            middle = x + (position + 0.5) * size
            canvas.text(middle, y + 0.6 + 0.42 * len(word), word, size=7, rotate=90)
    left, right = x + VISUAL.start * size + 0.2, x + VISUAL.stop * size - 0.2
    canvas.line((left, y + 0.5), (left, y + 1.0), (right, y + 1.0), (right, y + 0.5), width=0.8)
    canvas.text((left + right) / 2, y + 2.0, "the image: 12 visual tokens", size=7.5)
