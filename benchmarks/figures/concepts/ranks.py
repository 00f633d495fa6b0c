"""A figure of one sequence on two ranks: rows travel, keys stay."""

from __future__ import annotations

from benchmarks.figures.concepts.canvas import INK, MUTED, ROW, SHARED, Canvas
from benchmarks.figures.concepts.example import LENGTH, PREDICTS_CAT, strip

HALF = 10
HELD = (tuple(range(HALF)), tuple(range(HALF, LENGTH)))


def ranks() -> Canvas:
    """A row's query goes to both ranks; two partial results are merged into one."""
    canvas = Canvas(37, "One sequence on two ranks: rows travel, keys stay")
    size, wide = 2.3, 26.5
    lefts = (3.0, 42.5)
    for rank, (left, held) in enumerate(zip(lefts, HELD, strict=True)):
        canvas.box(left, 12.2, wide, 18.2, edge=MUTED, fill="#f5f3ec", round=0.8, dash=True, z=1)
        canvas.text(left + 1.4, 28.4, f"rank {rank}", align="left", bold=True, colour=MUTED)
        strip(canvas, left + 1.6, 22.0, size, shown=held, numbers=True)
        canvas.text(left + 1.6, 20.4, "its keys and values stay here", align="left", size=8)
        canvas.text(left + wide / 2, 14.6, f"out{'₀₁'[rank]}, lse{'₀₁'[rank]}", bold=True)
        canvas.text(left + wide / 2, 17.2, "row 16 over these keys alone", size=8, colour=ROW)
    right = lefts[1] + 1.6
    at = right + (PREDICTS_CAT - HALF) * size
    canvas.box(at, 22.0, size, size, edge=ROW, line=1.8, z=5)
    bend, end = 26.4, lefts[0] + wide / 2
    canvas.line((at + size / 2, 24.3), (at + size / 2, bend), (end, bend), colour=ROW)
    canvas.arrow((end, bend), (end, 24.5), colour=ROW)
    canvas.text(36.0, 28.9, "the query of\nrow 16", size=8, colour=ROW)
    for left in lefts:
        middle = left + wide / 2
        end = 29.0 if left == lefts[0] else 43.0
        canvas.arrow((middle, 13.2), (end, 8.6), colour=SHARED)
    canvas.box(22.0, 3.2, 28.0, 5.2, fill="#ffffff", edge=SHARED, line=1.3, round=0.6)
    canvas.text(36.0, 6.9, "merged: the row over all keys", bold=True, colour=SHARED)
    canvas.text(36.0, 4.6, "lse = log(exp lse₀ + exp lse₁)", size=8, colour=INK)
    canvas.text(52.0, 5.8, "What is sent grows\nwith the rows alone.", align="left", size=8)
    return canvas


FIGURES = {"ranks": ranks}
