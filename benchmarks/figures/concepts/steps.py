"""Figures of a step: the rows that a loss counts, and what a step computes and does not store."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.figures.concepts.canvas import (
    ALLOWED,
    INK,
    MUTED,
    PALE,
    ROW,
    SHARED,
    Canvas,
)
from benchmarks.figures.concepts.example import LENGTH, WORDS, colour_of
from benchmarks.problems import MODELS

COUNTED = (6, 11, 15, 16, 17)  # two labelled visual tokens, and the rows that predict the answer
TOKENS = 4096
MODEL = MODELS["qwen2.5-vl-7b"]


def counted_rows() -> Canvas:
    """Of all hidden states a few go through the head."""
    canvas = Canvas(45, "Counted rows: logits only where a loss is taken")
    x, y, cell, wide = 9.0, 4.0, 1.62, 8.0
    top = y + LENGTH * cell
    for row in range(LENGTH):
        at, counted = top - (row + 1) * cell, row in COUNTED
        fill = colour_of(row) if counted else "#f1efe9"
        canvas.box(x, at, wide, cell, fill=fill, edge=INK if counted else PALE, line=0.7)
    for row in COUNTED:
        canvas.box(x, top - (row + 1) * cell, wide, cell, edge=ROW, line=1.6, z=5)
    for row, word in WORDS.items():
        canvas.text(x - 0.6, top - (row + 0.5) * cell, word, size=7, align="right")
    canvas.text(x - 0.6, top - 7 * cell, "the\nimage", size=7, align="right")
    canvas.text(x + wide / 2, top + 3.6, "hidden states", bold=True)
    canvas.text(x + wide / 2, top + 1.5, "[S, D]", size=8)

    left, at = 27.0, 16.8
    for place, row in enumerate(COUNTED):
        level = at + (len(COUNTED) - 1 - place) * cell
        canvas.box(left, level, wide, cell, fill=colour_of(row), edge=ROW, line=1.2)
        canvas.line(
            (x + wide + 0.2, top - (row + 0.5) * cell), (left - 0.2, level + cell / 2), colour=ROW
        )
    middle = at + len(COUNTED) * cell / 2
    canvas.text(left + wide / 2, middle + 8.0, "counted rows", bold=True, colour=ROW)
    canvas.text(left + wide / 2, middle + 5.8, "[N, D]", size=8)

    start = left + wide
    canvas.arrow((start + 0.5, middle), (41.3, middle))
    canvas.text(38.4, middle + 1.9, "head", size=8)
    canvas.box(41.6, middle - 3.3, 12.5, 6.6, fill="#ffffff", dash=True, line=1.0)
    canvas.text(47.9, middle, "logits of\na few rows", size=8)
    canvas.text(47.9, middle + 8.0, "[chunk, V]", size=8)
    canvas.text(47.9, middle + 5.4, "made, used, dropped", size=8, colour=MUTED)
    canvas.arrow((54.6, middle), (59.4, middle))
    for place in range(len(COUNTED)):
        canvas.box(59.8, at + place * cell, cell, cell, fill="#ffffff", edge=ROW, line=1.2)
    canvas.text(60.6, middle + 8.0, "losses", bold=True)
    canvas.text(60.6, middle + 5.8, "[N]", size=8)

    canvas.text(41.6, 39.4, "logits of all rows [S, V]: never made", align="left", size=8)
    canvas.box(41.6, 33.4, 27.0, 4.4, fill="#f1efe9", edge=PALE)
    canvas.cross(41.6, 33.4, 27.0, 4.4)
    says = (
        "Here: two visual tokens with a word (6 and 11), and the rows\nthat predict “a”, “cat”, “.”"
    )
    canvas.text(27.0, 8.3, says, align="left", size=8)
    canvas.text(27.0, 4.3, "All other rows cost nothing in the head.", align="left", size=8)
    return canvas


STAGES = (  # x, width, title, what it is
    (3.0, 13.4, "batch", "tokens, image,\nrows, key sets,\ntargets, labels"),
    (
        20.6,
        17.2,
        "the model’s body",
        "every layer once, for\nall tokens, with its\nown attention",
    ),
    (42.0, 13.4, "the head", "counted rows\nalone, a chunk\nat a time"),
    (59.6, 9.6, "the loss", "text + each\nterm, divided\nby its count"),
)
PARTS = (  # of every layer, for the supervised rows
    (11.4, "side attention", "into the side tokens\n(SMAM)"),
    (30.4, "maps and divergences", "KLAL, HIST, margins …"),
)


def step() -> Canvas:
    """The parts of a training step, and the two tensors that none of them stores."""
    canvas = Canvas(48, "A training step: what is computed, and what is never stored")
    y, height = 29.6, 10.4
    low, deep, wide = 18.2, 6.6, 17.0
    top, level = low + deep, low + deep / 2
    for x, width, title, says in STAGES:
        canvas.box(x, y, width, height, fill="#ffffff", line=1.1, round=0.6)
        canvas.text(x + width / 2, y + height - 1.9, title, bold=True, colour=SHARED)
        canvas.text(x + width / 2, y + height / 2 - 1.4, says, size=7.5)
    for (x, width, *_), (end, *_) in pairwise(STAGES):
        canvas.arrow((x + width + 0.3, y + height / 2), (end - 0.3, y + height / 2))
    for x, title, says in PARTS:
        canvas.box(x, low, wide, deep, fill="#ffffff", edge=ROW, line=1.3, round=0.6)
        canvas.text(x + wide / 2, low + deep - 1.6, title, bold=True, colour=ROW)
        canvas.text(x + wide / 2, low + 2.3, says, size=7.5)
    canvas.arrow((23.2, y - 0.2), (23.2, top + 0.2), colour=ROW)
    canvas.arrow((26.2, top + 0.2), (26.2, y - 0.2), colour=ROW)
    canvas.arrow((34.4, y - 0.2), (34.4, top + 0.2), colour=ROW)
    says = "in each layer: q of N rows,\nk, v, lse"
    canvas.text(22.4, (y + top) / 2, says, align="right", size=7.5)
    canvas.line((PARTS[1][0] + wide, level), (64.4, level), colour=ROW, width=1.1)
    canvas.arrow((64.4, level), (64.4, y - 0.2), colour=ROW)
    canvas.text(55.8, level + 1.4, "a number a row", size=8, colour=ROW)
    _not_stored(canvas)
    return canvas


def _not_stored(canvas: Canvas) -> None:
    """The sizes of both tensors, and what there is in their place."""
    maps = MODEL.heads * TOKENS**2 * 2
    logits = TOKENS * MODEL.vocabulary * 2
    canvas.line((3.0, 15.7), (69.0, 15.7), colour=PALE)
    says = f"eager attention and full logits of Qwen2.5-VL-7B, {TOKENS} tokens, bf16"
    canvas.text(3.0, 13.7, says, align="left", bold=True, size=8)
    canvas.text(51.0, 13.7, "here", align="left", bold=True, colour=ALLOWED, size=8)
    for at, shape, size, instead in (
        (10.6, "attention [heads, S, S]", f"{maps / 1e9:.2f} GB a layer", "N rows, in blocks"),
        (7.6, "logits    [S, V]", f"{logits / 1e9:.2f} GB", "counted rows, in chunks"),
    ):
        canvas.text(3.0, at, shape, align="left", mono=True, size=8.5)
        canvas.text(26.0, at, size, align="left", bold=True, colour=ROW)
        canvas.arrow((41.0, at), (48.6, at), colour=ALLOWED)
        canvas.text(51.0, at, instead, align="left")
    says = "The backward makes the pieces again, or keeps them within the logit budget."
    canvas.text(3.0, 3.7, says, align="left", size=8, colour=MUTED)


FIGURES = {"counted_rows": counted_rows, "step": step}
