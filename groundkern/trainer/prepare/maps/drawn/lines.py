"""How many times do two lines cross, and where does a line lead?"""

from __future__ import annotations

import random
from itertools import pairwise

from PIL import Image, ImageDraw

from groundkern.trainer.drawing.scenes import font
from groundkern.trainer.prepare.maps.drawn.limits import limit
from groundkern.trainer.records import chat_sample

SCALE = 4  # lines are drawn this many times larger and averaged down
_RED, _BLUE, _INK = (210, 40, 40), (40, 70, 210), (40, 40, 40)

Pair = tuple[float, float]


def plan_intersection(rng: random.Random, size: int, *, segments: int) -> dict:
    """Two lines over the same knots; they change sides in as many segments as they cross."""
    limit("segments", segments, 1, size // 24)
    margin, gap = size // 16, size // 10
    knots = [margin + round(i * (size - 2 * margin) / segments) for i in range(segments + 1)]
    changes = set(rng.sample(range(1, segments + 1), rng.randint(0, segments)))
    above, red, blue = rng.random() < 0.5, [], []
    for i in range(segments + 1):
        above ^= i in changes
        distance = rng.randint(gap, size // 2)
        upper = rng.randint(margin, size - margin - distance)
        pair = (upper, upper + distance)
        red.append(pair[not above])
        blue.append(pair[above])
    return {"size": size, "knots": knots, "red": red, "blue": blue}


def draw_intersection(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    pen = _Pen(plan["size"])
    lines = {c: list(zip(plan["knots"], plan[c], strict=True)) for c in ("red", "blue")}
    order = [("red", _RED), ("blue", _BLUE)]
    rng.shuffle(order)  # which line lies over the other
    for name, colour in order:
        pen.line(lines[name], colour)
    points = crossings(lines["red"], lines["blue"])
    answer = str(len(points))
    regions = [{"char_span": [0, len(answer)], "points": points}] if points else []
    question = "How many times do the red line and the blue line cross?"
    sample = chat_sample([], question, answer, task="line_intersection", regions=regions)
    return pen.image(), sample


def crossings(first: list[Pair], second: list[Pair]) -> list[list[float]]:
    """The points where two lines over the same knots (x ascending) cross; no knot is shared."""
    found = []
    knots = list(zip(first, second, strict=True))
    for ((x0, a0), (_, b0)), ((x1, a1), (_, b1)) in pairwise(knots):
        before, after = a0 - b0, a1 - b1
        if before * after < 0:
            t = before / (before - after)
            found.append([x0 + t * (x1 - x0), a0 + t * (a1 - a0)])
    return found


def plan_tracing(rng: random.Random, size: int, *, lines: int, steps: int) -> dict:
    """Parallel tracks; in each step one pair of neighbours or more change places."""
    left = size // 8
    room = size - 2 * left
    limit("lines", lines, 2, min(9, room // 12))
    limit("steps", steps, 1, room // 12)
    order = list(range(lines))
    orders = [order]
    for _ in range(steps):
        order = list(order)
        places = [i for i in range(rng.randrange(2), lines - 1, 2) if rng.random() < 0.7]
        for i in places or [rng.randrange(lines - 1)]:
            order[i], order[i + 1] = order[i + 1], order[i]
        orders.append(order)
    jitter = room // (8 * lines)
    tracks = [
        left + round((i + 0.5) * room / lines) + rng.randint(-jitter, jitter) for i in range(lines)
    ]
    asked, numbers = rng.randrange(lines), rng.sample(range(1, lines + 1), lines)
    plan = {"size": size, "tracks": tracks, "orders": orders, "asked": asked}
    return {**plan, "numbers": numbers}


def draw_tracing(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    size, tracks, orders, asked = (plan[key] for key in ("size", "tracks", "orders", "asked"))
    left = size // 8
    step = (size - 2 * left) / (len(orders) - 1)
    places = [[order.index(line) for order in orders] for line in range(len(tracks))]
    paths = [_path([tracks[i] for i in at], left, step) for at in places]
    pen = _Pen(size)
    for path in paths:
        pen.line(path, _INK)
    image = pen.image()
    draw, typeface, words = ImageDraw.Draw(image), font(max(10, size // 18)), []
    ends = [str(plan["numbers"][at[-1]]) for at in places]
    for line, at in enumerate(places):
        start = (left // 2, tracks[at[0]])
        for text, place in (
            (_letter(line), start),
            (ends[line], (size - start[0], tracks[at[-1]])),
        ):
            draw.text(place, text, font=typeface, anchor="mm", fill=_INK)
            box = draw.textbbox(place, text, font=typeface, anchor="mm")
            words.append({"text": text, "box": list(box)})
    regions = [{"char_span": [0, len(ends[asked])], "polyline": paths[asked]}]
    question = f"Which number does the line from {_letter(asked)} lead to?"
    return image, chat_sample(
        [], question, ends[asked], task="line_tracing", regions=regions, words=words
    )


def _letter(line: int) -> str:
    return "ABCDEFGHI"[line]


def _path(heights: list[int], left: int, step: float, *, parts: int = 12) -> list[list[float]]:
    """Straight while the height stays the same, a smooth step of `parts` segments if it changes."""
    path = [[float(left), float(heights[0])]]
    for i, (here, there) in enumerate(pairwise(heights)):
        for part in range(1, parts + 1) if here != there else (parts,):
            t = part / parts
            point = (left + (i + t) * step, here + t * t * (3 - 2 * t) * (there - here))
            path.append([round(value * SCALE) / SCALE for value in point])
    return path


class _Pen:
    """Lines at `SCALE` times the size, averaged down; coordinates are pixel edges."""

    def __init__(self, size: int) -> None:
        self._sheet = Image.new("RGB", (size * SCALE, size * SCALE), "white")
        self._draw = ImageDraw.Draw(self._sheet)
        self._width = max(SCALE, round(size * SCALE / 120))

    def line(self, path: list, colour: tuple[int, int, int]) -> None:
        places = [(x * SCALE - 0.5, y * SCALE - 0.5) for x, y in path]
        self._draw.line(places, fill=colour, width=self._width, joint="curve")

    def image(self) -> Image.Image:
        return self._sheet.reduce(SCALE)
