"""Figures of attention: query rows, key sets, side tokens, what is shared with the main pass."""

from __future__ import annotations

import math

from benchmarks.figures.concepts.canvas import (
    ALLOWED,
    ANSWER_TOKEN,
    INK,
    MUTED,
    NONE,
    PALE,
    ROW,
    SHARED,
    Canvas,
)
from benchmarks.figures.concepts.example import (
    CAT,
    LANGUAGE,
    LENGTH,
    PREDICTS_CAT,
    WORDS,
    colour_of,
    grid,
    numbers,
    picture,
    region,
    strip,
    words_above,
)

VISIBLE = range(PREDICTS_CAT + 1)
ALLOWED_KEYS = tuple(sorted({*LANGUAGE, *CAT} & set(VISIBLE)))


def rows() -> Canvas:
    """The map of a sequence, of which two rows are computed."""
    canvas = Canvas(47, "A query row: what one token looks at")
    x, y, size = 11.0, 2.8, 1.52
    top = y + LENGTH * size
    for row in range(LENGTH):
        chosen = row in (16, 17)
        for key in range(row + 1):
            at = (x + key * size, top - (row + 1) * size)
            canvas.box(*at, size, size, fill=colour_of(key) if chosen else "#f1efe9", edge=PALE)
    for row in (16, 17):
        at = top - (row + 1) * size
        canvas.box(x, at, (row + 1) * size, size, edge=ROW, line=1.8, z=5)
    strip(canvas, x, top + 0.5, size)
    words_above(canvas, x, top + 0.5 + size, size)
    canvas.text(x + LENGTH * size / 2, top + 8.4, "keys: all tokens", bold=True)
    for row, word in WORDS.items():
        canvas.text(x - 0.6, top - (row + 0.5) * size, word, size=7, align="right")
    canvas.text(x - 0.6, top - 6.9 * size, "the\nimage", size=7, align="right")
    canvas.text(2.6, top - LENGTH * size / 2, "queries: all tokens", bold=True, rotate=90)
    canvas.text(x + 20.5, top - 5.0 * size, "later tokens:\nnot visible", size=7.5, colour=MUTED)

    left, small = 45.5, 1.28
    canvas.text(left, 36.5, "The whole map is [heads, S, S]", align="left", bold=True)
    canvas.text(left, 34.1, "in every layer. It is never stored.", align="left")
    canvas.text(left, 28.6, "A loss on attention reads N rows", align="left", bold=True, colour=ROW)
    canvas.text(left, 26.2, "of it, here those of “a” and “cat”:", align="left")
    for place, row in enumerate((16, 17)):
        at = 22.2 - place * 2.2
        strip(canvas, left, at, small, shown=tuple(range(row + 1)))
        canvas.box(left, at, (row + 1) * small, small, edge=ROW, line=1.8, z=5)
    canvas.text(left, 17.3, "N queries, and the keys as they are.", align="left")
    canvas.text(left, 11.8, "Which row for the token “cat”?", align="left", bold=True)
    says = "Its predicting row, “a”: before it is read.\nIts own row, “cat”: once it is read."
    canvas.text(left, 8.2, says, align="left")
    start = (x + 17 * size + 0.5, top - 16.5 * size)
    canvas.arrow(start, (left - 0.6, 22.8), colour=ROW, bend=-0.2)
    return canvas


def keys() -> Canvas:
    """The keys of one row: visible, and in the key set of a region."""
    canvas = Canvas(34.5, "Keys: which tokens a row may read")
    size, x = 2.3, 25.5
    box = (3.0, 15.0, 18.0, 13.5)
    picture(canvas, *box)
    grid(canvas, *box, colour="#8fa7b5")
    numbers(canvas, *box)
    region(canvas, *box)
    canvas.text(12.0, 12.9, "the region of “cat”", colour=ALLOWED, bold=True)
    canvas.text(12.0, 10.6, "is on tokens 6, 7, 10, 11", size=8)

    words_above(canvas, x, 23.6, size)
    strip(canvas, x, 21.3, size, used=VISIBLE, numbers=True)
    says = "visible to row 16: every key up to itself"
    canvas.text(x, 19.6, says, align="left")
    strip(canvas, x, 13.2, size, used=ALLOWED_KEYS, marked=CAT, numbers=True)
    for place in range(LENGTH):
        there = place in ALLOWED_KEYS
        middle = x + (place + 0.5) * size
        canvas.text(middle, 11.8, str(int(there)), mono=True, bold=there, size=8)
    says = "in its key set: the language and the region; a set is one bit for each key"
    canvas.text(x, 9.7, says, align="left")
    canvas.arrow((21.3, 16.8), (x - 0.5, 14.5), colour=ALLOWED)
    canvas.line((3.0, 7.7), (69.0, 7.7), colour=PALE)
    says = "gk.KeySets.regions(visual, region, sequence, of_row)"
    canvas.text(3.0, 5.6, says, align="left", mono=True, size=8)
    says = "of_row[n] is the set that row n reads; −1: row n reads every visible key."
    canvas.text(3.0, 3.1, says, align="left", size=8)
    return canvas


def shared() -> Canvas:
    """Exponentials of one row's scores, and three numbers that follow from their sums."""
    canvas = Canvas(35, "Shared with the main pass: one number for each row and head")
    x, y, size = 3.5, 7.6, 2.2
    heights = [4.6 + 4.0 * math.sin(1.7 * i + 0.6) for i in VISIBLE]
    for position in CAT:
        heights[position] += 6.5
    for position, height in enumerate(heights):
        allowed = position in ALLOWED_KEYS
        edge = ALLOWED if position in CAT else INK
        left = x + position * size + 0.2
        fill = colour_of(position) if allowed else NONE
        style = {"line": 1.8 if position in CAT else 0.8, "dash": not allowed}
        canvas.box(left, y, size - 0.4, height, fill=fill, edge=edge, **style)
    strip(canvas, x, y - size - 0.3, size, shown=tuple(VISIBLE))
    end = x + len(VISIBLE) * size
    canvas.line((x, y), (end, y))
    canvas.text(x, 27.6, "exp(score) of row 16 on each key, in one head", align="left", bold=True)
    says = "filled: keys in its key set; dashed: the others"
    canvas.text(x, 25.2, says, align="left", size=8, colour=MUTED)
    canvas.text((x + end) / 2, 3.2, "keys 0 … 16", size=8)

    inside = sum(heights[p] for p in ALLOWED_KEYS) / sum(heights)
    left = 44.5
    says = [
        ("All bars together are exp(lse).", SHARED, 27.6),
        ("The main pass’s kernel knows lse,", INK, 25.4),
        ("and the ops take it from there.", INK, 23.4),
        ("The filled ones are exp(lse_allowed).", ALLOWED, 19.6),
        ("It is what side attention returns.", INK, 17.4),
        (f"Their share is the region mass, {inside:.2f}:", ROW, 13.6),
        ("exp(lse_allowed − lse).", INK, 11.4),
        ("Attention on one key is exp(s − lse):", SHARED, 7.6),
        ("its bar over all, without the others.", INK, 5.4),
    ]
    for text, colour, at in says:
        canvas.text(left, at, text, align="left", colour=colour, bold=colour != INK, size=8.2)
    canvas.line((left - 1.7, 3.4), (left - 1.7, 29.0), colour=PALE)
    return canvas


def _block(canvas: Canvas, x: float, y: float, colour: str) -> None:
    canvas.box(x, y - 2.3, 9.4, 4.6, fill="#ffffff", edge=colour, line=1.2, round=0.6)
    canvas.text(x + 4.7, y, "output, norms,\nFFN", size=7.5)


def side_tokens() -> Canvas:
    """A side token: one more token, whose attention is row 16's over the key set."""
    canvas = Canvas(46, "A side token: the same row once more, with the region alone")
    size, x = 2.05, 3.6
    row, end = x + (PREDICTS_CAT + 0.5) * size, x + LENGTH * size
    block, out = 46.6, 61.6
    side = block + 4.7
    low, high = 14.2, 38.6
    canvas.box(2.0, low, 57.4, high - low, edge=MUTED, fill="#f5f3ec", round=0.8, dash=True, z=1)
    canvas.text(x, high - 1.8, "in each decoder layer", align="left", bold=True, colour=MUTED)
    for at, used, marked, colour, says in (
        (31.0, VISIBLE, (), INK, "row 16 reads every visible key"),
        (20.4, ALLOWED_KEYS, CAT, ROW, "the side token reads the keys of its set"),
    ):
        strip(canvas, x, at, size, used=used, marked=marked)
        canvas.text(x, at - 1.5, says, align="left", colour=colour, bold=colour == ROW)
        middle = at + size / 2
        canvas.arrow((end + 0.4, middle), (block - 0.2, middle), colour=colour)
        _block(canvas, block, middle, colour)
        canvas.arrow((block + 9.5, middle), (out - 0.3, middle), colour=colour)
    canvas.arrow((row, 30.7), (row, 20.6 + size), colour=SHARED)
    canvas.text(
        row - 0.9, 26.0, "the same query, keys, values", colour=SHARED, align="right", size=8
    )
    canvas.text(side, 26.9, "the same weights", colour=SHARED, size=8)
    canvas.text(out, 33.4, "π(cat)", align="left", bold=True, size=9.5)
    canvas.text(out, 30.4, "from all\nthat is there", align="left", size=7.5)
    canvas.text(out, 22.8, "π⁺(cat)", align="left", bold=True, colour=ROW, size=9.5)
    canvas.text(out, 19.0, "from language\nand region", align="left", size=7.5)

    bottom = 8.6
    strip(canvas, x, bottom, size)
    canvas.box(side - size / 2, bottom, size, size, fill=ANSWER_TOKEN, edge=ROW, line=1.8, z=5)
    canvas.arrow((side, bottom + size + 0.2), (side, 20.4 + size / 2 - 2.5), colour=ROW)
    canvas.text(row, bottom - 1.4, "“a”", size=8)
    canvas.text(side, bottom - 1.4, "“a”", size=8, colour=ROW, bold=True)
    canvas.arrow((row + 0.9, bottom - 2.4), (side - 0.9, bottom - 2.4), colour=ROW, bend=0.16)
    canvas.text((row + side) / 2 - 0.6, 3.0, "a copy of the input token", size=8, colour=ROW)
    canvas.text(x, bottom - 1.4, "the sequence", align="left", size=8)
    canvas.text(
        side + 1.8, bottom + size / 2, "the side token", align="left", colour=ROW, bold=True
    )
    return canvas


FIGURES = {"rows": rows, "keys": keys, "shared": shared, "side_tokens": side_tokens}
