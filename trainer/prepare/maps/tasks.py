"""KLAL's synthetic tasks, pages of words without context (DV-SFT), and HIST's two objects.

A drawing is planned first and drawn afterwards. The plan holds everything that an answer or a
target depends on; its hash decides whether it belongs to the training, validation or test split,
so that no plan is ever in two of them, whatever the seeds. Targets are what was drawn: the same
numbers go to the pen and into the regions.

Source: KLAL, arXiv 2511.12738 (which leaves the details of the drawings open), and DV-SFT,
arXiv 2605.26656.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

from PIL import Image, ImageDraw

from trainer.drawing.scenes import face, font, patch_grid
from trainer.drawing.scenes import word_page as draw_word_page
from trainer.drawing.texts import texts
from trainer.records import chat_sample

SPLITS = {"train": range(80), "val": range(80, 90), "test": range(90, 100)}  # percent of plans
DIFFICULTIES = ("easy", "medium", "hard")
SCALE = 4  # lines are drawn this many times larger and averaged down
SMALLEST, LARGEST = 64, 4096  # pixels of an image's side
_TRIES = 10_000  # plans drawn in search of one of a rare split
_ALL = 10**6  # words: more than there are
_RED, _BLUE, _INK = (210, 40, 40), (40, 70, 210), (40, 40, 40)

Pair = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """A kind of drawing, called with a seed: `image, sample = TASKS["grid_patch"](7)`.

    Args:
        name: as in `TASKS`, and the `task` of its records.
        plan: a random generator, the image's side and the task's own settings to a plan, plain
            values of which everything that matters is drawn.
        draw: a plan and a random generator (for what does not matter, such as the colour of the
            paper) to the image and its record of docs/data-format.md, `images` still empty.
        settings: the task's own settings at each difficulty.
    """

    name: str
    plan: Callable[..., dict]
    draw: Callable[[dict, random.Random], tuple[Image.Image, dict]]
    settings: dict[str, dict[str, int]]

    def __call__(
        self,
        seed: int | str,
        *,
        split: str = "train",
        size: int = 448,
        difficulty: str = "medium",
        **own: int,
    ) -> tuple[Image.Image, dict]:
        """One drawing.

        Args:
            seed: the same seed and settings draw the same pixels and answer.
            split: "train", "val" or "test"; their plans are disjoint.
            size: pixels of the image's side (a grid or page may be smaller by what does not fill a
                cell).
            difficulty: "easy", "medium" or "hard", see `settings`.
            **own: the task's own settings, over those of the difficulty.

        Returns:
            An RGB image and its record, coordinates in pixel edges, `images` empty.

        Raises:
            ValueError: an unknown split, difficulty or setting, or one that cannot be drawn.
        """
        one_of("split", split, SPLITS)
        one_of("difficulty", difficulty, DIFFICULTIES)
        for name in own:
            one_of("setting", name, self.settings["easy"])
        settings = {**self.settings[difficulty], **own}
        for name, value in {"size": size, **settings}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}`: expected a positive whole number, got {value!r}")
        _limit("size", size, SMALLEST, LARGEST)
        rng = random.Random(f"{self.name} {seed}")
        for _ in range(_TRIES):
            plan = self.plan(rng, size, **settings)
            if _bucket(plan) in SPLITS[split]:
                return self.draw(plan, rng)
        raise ValueError(f"`split`: expected {self.name} drawings for {split}, got none")


def stream(
    name: str, *, count: int, seed: int = 0, split: str = "train", start: int = 0, **settings
) -> Iterator[tuple[Image.Image, dict]]:
    """`count` drawings of a task from number `start` on, each with its own seed."""
    one_of("task", name, TASKS)
    for i in range(start, start + count):
        yield TASKS[name](f"{seed} {split} {i}", split=split, **settings)


def one_of(name: str, value: object, known: object) -> None:
    """Raise the `ValueError` that names what there is, unless `value` is among the `known`."""
    if value not in known:
        raise ValueError(f"`{name}`: expected one of {', '.join(known)}, got {value!r}")


def _bucket(plan: dict) -> int:
    digest = hashlib.sha256(repr(sorted(plan.items())).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def _limit(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"`{name}`: expected {low} to {high}, got {value}")


# How many times do two lines cross?


def _plan_intersection(rng: random.Random, size: int, *, segments: int) -> dict:
    """Two lines over the same knots; they change sides in as many segments as they cross."""
    _limit("segments", segments, 1, size // 24)
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


def _draw_intersection(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
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


# Where does a line lead?


def _plan_tracing(rng: random.Random, size: int, *, lines: int, steps: int) -> dict:
    """Parallel tracks; in each step one pair of neighbours or more change places."""
    left = size // 8
    room = size - 2 * left
    _limit("lines", lines, 2, min(9, room // 12))
    _limit("steps", steps, 1, room // 12)
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


def _draw_tracing(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
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


# Where is the odd patch?


def _plan_grid(rng: random.Random, size: int, *, side: int) -> dict:
    _limit("side", side, 2, size // 4)
    row, column = rng.randint(1, side), rng.randint(1, side)
    colours = rng.getrandbits(64)
    return {"cell": size // side, "side": side, "row": row, "column": column, "colours": colours}


def _draw_grid(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    row, column, colours = plan["row"], plan["column"], random.Random(plan["colours"])
    picture = patch_grid(row, column, colours, side=plan["side"], cell=plan["cell"])
    answer = f"row {row} column {column}"
    box = list(picture.boxes[0][1])
    spans = [[4, 4 + len(str(row))], [len(answer) - len(str(column)), len(answer)]]
    regions = [{"char_span": span, "box": box} for span in spans]
    question = "Where is the red patch?"
    return picture.image, chat_sample([], question, answer, task="grid_patch", regions=regions)


# Read a line of words that say nothing


@cache
def _vocabulary(cell: int, columns: int) -> tuple[str, ...]:
    """The distinct words of the demo's texts, without their punctuation, that fit a line."""
    words = {word.strip(".,;:!?\"'()-") for passage in texts() for word in passage}
    pen = face(cell)
    return tuple(sorted(w for w in words if w.isalpha() and pen.cells(w) <= columns))


def _plan_page(rng: random.Random, size: int, *, cell: int, vocabulary: int = _ALL) -> dict:
    """Words drawn at random, so that none can be guessed from the others."""
    _limit("cell", cell, 14, size // 2)
    columns = size // cell
    known = _vocabulary(cell, columns)
    known = known[:: max(1, len(known) // vocabulary)][:vocabulary]
    shown = rng.choices(known, k=columns * columns)
    return {"cell": cell, "columns": columns, "words": shown, "line": rng.randrange(columns)}


def _draw_page(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    return _read_line(plan, rng, "word_page", "Read the highlighted line.", marked=plan["line"])


def _draw_asked(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    return _read_line(plan, rng, "asked_line", f"Read line {plan['line'] + 1}.", marked=None)


def _read_line(
    plan: dict, rng: random.Random, task: str, question: str, *, marked: int | None
) -> tuple[Image.Image, dict]:
    columns = plan["columns"]
    picture = draw_word_page(
        plan["words"], rng, columns=columns, rows=columns, marked=marked, cell=plan["cell"]
    )
    answer, box = picture.boxes[plan["line"]]
    regions = [{"text": answer, "box": list(box)}]
    words = [{"text": text, "box": list(box)} for text, box in picture.words]
    return picture.image, chat_sample([], question, answer, task=task, regions=regions, words=words)


# Is there a red circle and a blue square?


_COLOURS = {"red": _RED, "blue": _BLUE, "green": (40, 150, 70)}
_SHAPES = ("circle", "square", "triangle")


def _plan_objects(rng: random.Random, size: int, *, objects: int, side: int) -> dict:
    """Objects in cells of a grid; half of the questions ask for a pair of which one is missing.

    The colours and the shapes of a missing pair are all there, so that colours alone or shapes
    alone do not answer.
    """
    _limit("side", side, 2, size // 16)
    _limit("objects", objects, 3, side * side)
    (a, b), (s, t) = rng.sample(sorted(_COLOURS), 2), rng.sample(_SHAPES, 2)
    there = rng.random() < 0.5
    shown = [(a, s), (b, t)] if there else [(a, s), (a, t), (b, s)]
    others = [pair for pair in product(sorted(_COLOURS), _SHAPES) if there or pair != (b, t)]
    shown += rng.choices(others, k=objects - len(shown))
    asked = [(a, s), (b, t)]
    rng.shuffle(asked)
    cells = rng.sample(range(side * side), objects)
    return {"size": size, "side": side, "asked": asked, "shown": shown, "cells": cells}


def _draw_objects(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    cell = plan["size"] // plan["side"]
    image = Image.new("RGB", (cell * plan["side"],) * 2, "white")
    draw, boxes = ImageDraw.Draw(image), {}
    for (colour, shape), place in zip(plan["shown"], plan["cells"], strict=True):
        row, column = divmod(place, plan["side"])
        side = rng.randint(cell // 2, cell - 4)
        x, y = (at * cell + rng.randint(2, cell - 2 - side) for at in (column, row))
        box, fill = [x, y, x + side, y + side], _COLOURS[colour]
        match shape:
            case "circle":
                draw.ellipse(box, fill)
            case "square":
                draw.rectangle(box, fill)
            case "triangle":
                draw.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill)
        boxes.setdefault((colour, shape), []).append(box)
    names = [f"a {colour} {shape}" for colour, shape in plan["asked"]]
    both = " and ".join(names)
    spans = [[0, len(names[0])], [len(both) - len(names[1]), len(both)]]
    answer = f"{both}: {'yes' if all(pair in boxes for pair in plan['asked']) else 'no'}"
    pairs = list(zip(plan["asked"], spans, strict=True))
    regions = [{"char_span": span, "box": box} for p, span in pairs for box in boxes.get(p, ())]
    phrases = [{"char_span": [0, len(both)]}]
    phrases += [{"char_span": span, "subject": shape} for (_, shape), span in pairs]
    return image, chat_sample(
        [], f"Is there {both}?", answer, task="two_objects", regions=regions, phrases=phrases
    )


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


def _by_difficulty(name: str, *values: int) -> dict[str, dict[str, int]]:
    return {which: {name: value} for which, value in zip(DIFFICULTIES, values, strict=True)}


_TRACING = {
    "easy": {"lines": 3, "steps": 2},
    "medium": {"lines": 4, "steps": 4},
    "hard": {"lines": 6, "steps": 8},
}
_OBJECTS = {
    "easy": {"objects": 3, "side": 2},
    "medium": {"objects": 5, "side": 3},
    "hard": {"objects": 8, "side": 4},
}
_PAGES = {  # at most so many different words: all of them
    difficulty: {**cell, "vocabulary": _ALL}
    for difficulty, cell in _by_difficulty("cell", 56, 28, 20).items()
}
TASKS: dict[str, Task] = {
    "line_intersection": Task(
        "line_intersection",
        _plan_intersection,
        _draw_intersection,
        _by_difficulty("segments", 2, 4, 6),
    ),
    "line_tracing": Task("line_tracing", _plan_tracing, _draw_tracing, _TRACING),
    "grid_patch": Task("grid_patch", _plan_grid, _draw_grid, _by_difficulty("side", 4, 8, 16)),
    "word_page": Task("word_page", _plan_page, _draw_page, _PAGES),
    "asked_line": Task("asked_line", _plan_page, _draw_asked, _PAGES),
    "two_objects": Task("two_objects", _plan_objects, _draw_objects, _OBJECTS),
}
