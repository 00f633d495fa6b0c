"""Figures of images: from pixels to visual tokens, target maps, and words as labels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.figures.concepts.canvas import (
    ALLOWED,
    INK,
    MUTED,
    NONE,
    ROW,
    SHARED,
    VISUAL_TOKEN,
    Canvas,
)
from benchmarks.figures.concepts.example import (
    CAT,
    COLUMNS,
    ROWS,
    cell,
    grid,
    numbers,
    picture,
    region,
    strip,
    words_above,
)
from groundkern.maps import patch_grid, target_map

Rectangle = tuple[float, float, float, float]

FINE = (8, 6)  # columns and rows of the grid of target maps
WORDS_OF_PAGE = {  # (x0, y0, x1, y1) in tokens from the lower left
    "Invoice": (0.2, 3.14, 1.88, 3.86),
    "Total": (0.2, 1.14, 1.5, 1.86),
    "41.80": (4.3, 1.14, 5.7, 1.86),
}
LABELS = {"Invoice": [" Invoice"], "Total": [" Total"], "41.80": ["4", "1", "8", "0"]}
BOX = (0.27, 0.38, 0.74, 0.96)  # of the cat, in fractions of the image, y downwards


def visual_tokens() -> Canvas:
    """An image in patches, in visual tokens, and in the sequence."""
    canvas = Canvas(43, "From pixels to visual tokens")
    first, second = (3.0, 22.0, 20.0, 15.0), (39.0, 22.0, 20.0, 15.0)
    picture(canvas, *first)
    grid(canvas, *first, columns=2 * COLUMNS, rows=2 * ROWS, colour="#8fa7b5", line=0.5)
    region(canvas, *first)
    canvas.text(13.0, 20.3, "patches of 14 × 14 pixels", size=8)
    picture(canvas, *second)
    grid(canvas, *second, colour="#5d7d90", line=0.9)
    numbers(canvas, *second)
    for position in CAT:
        left, bottom = cell(position, *second)
        canvas.box(left, bottom, 5.0, 5.0, edge=ALLOWED, line=1.8, z=5)
    canvas.arrow((24.2, 29.5), (37.8, 29.5))
    canvas.text(31.0, 32.6, "vision tower\nand projector", size=8)
    canvas.text(31.0, 26.4, "2 × 2 patches\nmake one token\n(Qwen2.5-VL)", size=7.5, colour=MUTED)
    canvas.text(49.0, 20.3, "12 visual tokens, each a rectangle", size=8)
    canvas.text(60.5, 32.4, "green: tokens\nthat the box of\nthe cat is on", size=8, align="left")

    size, x, y = 3.3, 4.6, 6.2
    words_above(canvas, x, y + size, size)
    strip(canvas, x, y, size, marked=CAT, numbers=True)
    canvas.arrow((49.0, 19.0), (x + 8.4 * size, y + size + 3.2), bend=-0.12)
    says = "Row by row they stand in the sequence, as keys and as rows like every other token."
    canvas.text(x, 4.0, says, align="left", size=8)
    return canvas


def _heat(canvas: Canvas, place: Rectangle, values: Tensor, colour: str) -> None:
    """A map over the fine grid; the darkest token has the most of it."""
    x, y, width, height = place
    columns, rows = FINE
    top = float(values.max())
    for i, value in enumerate(values.tolist()):
        row, column = divmod(i, columns)
        at = (x + column * width / columns, y + (rows - 1 - row) * height / rows)
        fill = _mixed(colour, (value / top) ** 0.7)
        canvas.box(*at, width / columns, height / rows, fill=fill, edge="#cfcabd", line=0.4)
    canvas.box(x, y, width, height, line=0.8, z=3)


def _mixed(colour: str, share: float) -> str:
    """`share` of a colour, the rest white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in parts)


def _looked(rects: Tensor) -> Tensor:
    """A map of attention that looks beside the target, at the upper right."""
    middle = (rects[:, :2] + rects[:, 2:]) / 2
    far = ((middle - torch.tensor([0.72, 0.30], dtype=torch.float64)) ** 2).sum(-1)
    wave = 0.35 * torch.sin(7 * torch.arange(len(rects), dtype=torch.float64))
    return torch.softmax(-9 * far + wave, 0)


def target_maps() -> Canvas:
    """The target of KLAL from a box, the map of a row, and other kinds of targets."""
    canvas = Canvas(49, "A target map: where a row should look")
    rects = patch_grid(FINE[1], FINE[0])
    target = target_map(rects, boxes=[BOX])
    looked = _looked(rects)
    loss = float((target.double() * (target.double() / looked).log()).sum())
    width, height, y = 17.2, 12.9, 27.5
    x, between = 3.0, 7.2
    places = [(x + i * (width + between), y, width, height) for i in range(3)]
    picture(canvas, *places[0])
    grid(canvas, *places[0], columns=FINE[0], rows=FINE[1], colour="#8fa7b5", line=0.5)
    _outline(canvas, places[0])
    _heat(canvas, places[1], target, ALLOWED)
    _heat(canvas, places[2], looked, ROW)
    middle = y + height / 2
    start = x + width
    canvas.arrow((start + 0.7, middle), (start + between - 0.7, middle))
    canvas.text(start + width + 1.5 * between, middle, "vs.", bold=True, size=9.5)
    heads = ("a box in the image", "target map P", "the row’s attention Q")
    for place, says, colour in zip(places, heads, (INK, ALLOWED, ROW), strict=True):
        canvas.text(place[0] + width / 2, y + height + 1.7, says, bold=True, colour=colour)
    says = (
        "8 × 6 visual tokens",
        "1 on the box, 0.5 beside it,\n0.001 elsewhere, divided by the sum",
    )
    canvas.text(places[0][0] + width / 2, y - 1.7, says[0], size=8)
    canvas.text(places[1][0] + width / 2, y - 2.6, says[1], size=8)
    canvas.text(places[2][0] + width / 2, y - 1.7, "mean of the heads, over the image", size=8)
    says = f"loss of this row in this layer: KL(P ‖ Q) = Σ P log (P / Q) = {loss:.2f}"
    canvas.text(36.0, 20.6, says, bold=True, size=9)

    canvas.text(3.0, 17.2, "other targets of the same box (map_kind):", align="left", size=8)
    small, tall, gap = 12.6, 9.45, 4.7
    for i, kind in enumerate(("uniform", "overlap", "gaussian", "evidence")):
        place = (4.0 + i * (small + gap), 5.4, small, tall)
        _heat(canvas, place, target_map(rects, kind=kind, boxes=[BOX]), ALLOWED)
        canvas.text(place[0] + small / 2, 3.5, kind, mono=True, size=8)
    return canvas


def _outline(canvas: Canvas, place: Rectangle) -> None:
    """`BOX` on a picture."""
    x, y, width, height = place
    left, top, right, bottom = BOX
    size = ((right - left) * width, (bottom - top) * height)
    canvas.box(x + left * width, y + (1 - bottom) * height, *size, edge=ALLOWED, line=2, z=5)


def word_labels() -> Canvas:
    """A page whose words are labels of the visual tokens under their lower right corners."""
    canvas = Canvas(31.5, "Words of a page as labels of visual tokens")
    x, y, size = 3.4, 6.4, 4.4
    canvas.box(x, y, 7 * size, 4 * size, fill="#ffffff", edge=NONE, z=1)
    for box in WORDS_OF_PAGE.values():
        column, row = int(box[2]), int(box[1])
        canvas.box(x + column * size, y + row * size, size, size, fill=VISUAL_TOKEN, edge=NONE)
    grid(canvas, x, y, 7 * size, 4 * size, columns=7, rows=4, colour="#b9c7cf", line=0.5)
    for text, (x0, y0, x1, y1) in WORDS_OF_PAGE.items():
        left, bottom = x + x0 * size, y + y0 * size
        canvas.box(left, bottom, (x1 - x0) * size, (y1 - y0) * size, edge=ALLOWED, line=1.4, z=5)
        middle = (x + (x0 + x1) / 2 * size, y + (y0 + y1) / 2 * size)
        canvas.text(*middle, text, size=11)
        corner = (x + int(x1) * size, y + int(y0) * size)
        canvas.box(*corner, size, size, edge=SHARED, line=1.8, z=4.5)
    says = "Cells are visual tokens. A word labels the one\nunder its lower right corner."
    canvas.text(x, 3.7, says, align="left", size=8)

    left = 38.5
    canvas.text(
        left, 25.6, "What that token should predict", align="left", bold=True, colour=SHARED
    )
    canvas.text(left, 23.2, "at its own row, through the model’s own head", align="left", size=8)
    for place, (text, labels) in enumerate(LABELS.items()):
        at, label = 19.2 - 3.0 * place, "  ".join(f"“{label}”" for label in labels)
        canvas.text(left, at, text, align="left")
        canvas.arrow((left + 7.0, at), (left + 11.5, at))
        canvas.text(left + 12.6, at, label, align="left", mono=True, size=8.5)
    says = "The first token of a word; of a number all that\nshow digits. Here by Qwen’s tokenizer."
    canvas.text(left, 8.6, says, align="left", size=8)
    canvas.text(left, 4.6, "Visual tokens without a word are not counted.", align="left", size=8)
    return canvas


def composition() -> Canvas:
    """The map of a phrase against the sum of the maps of its two parts."""
    canvas = Canvas(26, "Composition: the map of a whole phrase is that of its parts together")
    rects = patch_grid(FINE[1], FINE[0])
    dogs = target_map(
        rects, kind="evidence", boxes=[(0.02, 0.3, 0.3, 0.8), (0.3, 0.35, 0.55, 0.85)]
    )
    cat = target_map(rects, kind="evidence", boxes=[(0.68, 0.45, 0.98, 0.95)])
    parts = ("“two dogs”", dogs), ("“a cat”", cat), ("“two dogs and a cat”", dogs + cat)
    width, height, between, y = 16.4, 12.3, 7.6, 6.2
    for i, (says, values) in enumerate(parts):
        x = 4.0 + i * (width + between)
        whole = i == 2
        _heat(canvas, (x, y, width, height), values, ROW if whole else SHARED)
        colour = ROW if whole else INK
        canvas.text(x + width / 2, y + height + 1.7, says, bold=True, colour=colour)
        if not whole:
            canvas.text(x + width + between / 2, y + height / 2, "+="[i], bold=True, size=14)
    says = "HIST pulls both sides together. It needs no boxes for that."
    canvas.text(4.0, 3.4, says, align="left", size=8)
    return canvas


FIGURES = {
    "visual_tokens": visual_tokens,
    "target_maps": target_maps,
    "word_labels": word_labels,
    "composition": composition,
}
