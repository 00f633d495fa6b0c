"""A red patch moves over noise, beside others: where is it at second 3, and when does it appear?

The patches step to a neighbouring cell once a second, corners included, and never stay; each is
alone in its cell. So an answer is right at one second only. Cells are named by letters, row by row,
so that an answer is one token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np
from PIL import Image

from groundkern.trainer.drawing.pages import Color
from groundkern.trainer.drawing.scenes import RED
from groundkern.trainer.prepare.maps.drawn.limits import limit

OTHERS: tuple[Color, ...] = ((40, 90, 200), (40, 150, 70), (230, 200, 60))
_GREY, _SPREAD = 128, 45  # of the background, levels around its middle at most
_TINT = 15  # of each of its pixels' colours, and of a patch's
_LARGEST_SIDE = 5  # cells have one letter each

Frames = tuple[Image.Image, ...]
"""A clip, one frame a second."""


def plan_moving(rng: random.Random, size: int, *, side: int, seconds: int, others: int) -> dict:
    """The asked cell and second are drawn first, so that no answer is likelier than another."""
    return _plan(rng, size, side, seconds, rng.randrange(seconds), [0] * (others + 1))


def draw_moving(plan: dict, rng: random.Random) -> tuple[Frames, dict]:
    asked = plan["asked"]
    question = f"In which cell is the red patch at second {asked}?"
    return _clip(plan, rng, question, ascii_uppercase[plan["paths"][0][asked]], "moving_patch")


def plan_appearing(rng: random.Random, size: int, *, side: int, seconds: int, others: int) -> dict:
    """Every patch appears at a second of its own; the red one after the first."""
    asked = rng.randrange(1, seconds)
    appear = [asked, *(rng.randrange(seconds) for _ in range(others))]
    return _plan(rng, size, side, seconds, asked, appear)


def draw_appearing(plan: dict, rng: random.Random) -> tuple[Frames, dict]:
    question = "When does the red patch appear?"
    return _clip(plan, rng, question, str(plan["asked"]), "appearing_patch")


def _plan(
    rng: random.Random, size: int, side: int, seconds: int, asked: int, appear: list[int]
) -> dict:
    """The cell of each patch at every second, the red one first, -1 before it appears."""
    limit("side", side, 2, _LARGEST_SIDE)
    limit("seconds", seconds, 2, 9)
    # with every cell taken, the last patch may find none free but its own
    limit("others", len(appear) - 1, 0, min(len(OTHERS), side**2 - 2))
    paths: list[list[int]] = []
    for start in appear:
        paths.append(_walk(rng, side, seconds, asked, paths))
        paths[-1][:start] = [-1] * start
    return {
        "cell": size // side,
        "side": side,
        "asked": asked,
        "paths": tuple(map(tuple, paths)),
        "colours": tuple(rng.sample(OTHERS, len(appear) - 1)),
    }


def _walk(
    rng: random.Random, side: int, seconds: int, asked: int, taken: Sequence[Sequence[int]]
) -> list[int]:
    """A free cell for each second, from any at second `asked` on, forwards and backwards."""
    taken = [set(cells) for cells in zip(*taken, strict=True)] or [set()] * seconds
    path = [0] * seconds
    while True:
        for second in (asked, *range(asked + 1, seconds), *range(asked - 1, -1, -1)):
            beside = path[second + (second < asked) - (second > asked)]
            near = range(side**2) if second == asked else _around(beside, side)
            free = [cell for cell in near if cell not in taken[second]]
            if not free:
                break
            path[second] = rng.choice(free)
        else:
            return path


def _around(number: int, side: int) -> list[int]:
    """The cells that touch one."""
    row, column = divmod(number, side)
    rows = range(max(0, row - 1), min(side, row + 2))
    columns = range(max(0, column - 1), min(side, column + 2))
    return [r * side + c for r in rows for c in columns if r * side + c != number]


def _clip(
    plan: dict, rng: random.Random, question: str, answer: str, task: str
) -> tuple[Frames, dict]:
    """The frames, and the record, whose region is the red patch at the second that is asked for."""
    red, *others = plan["paths"]
    cell, side, asked = plan["cell"], plan["side"], plan["asked"]
    noise, width = np.random.default_rng(rng.getrandbits(64)), cell * side
    shape = (len(red), width, width)
    grey = noise.integers(-_SPREAD, _SPREAD + 1, (*shape, 1))
    pixels = _GREY + grey + noise.integers(-_TINT, _TINT + 1, (*shape, 3))
    for path, colour in zip([*others, red], [*plan["colours"], RED], strict=True):
        shade = np.array(colour) + noise.integers(-_TINT, _TINT + 1, 3)
        for second, number in enumerate(path):
            if number >= 0:
                x0, y0, x1, y1 = _box(number, side, cell)
                pixels[second, y0:y1, x0:x1] = shade
    frames = tuple(map(Image.fromarray, pixels.clip(0, 255).astype(np.uint8)))
    box = _box(red[asked], side, cell)
    region = {"text": answer, "video": 0, "time": [asked, asked + 1], "box": box}
    asking = [{"type": "video"}, {"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": asking},
        {"role": "assistant", "content": answer},
    ]
    return frames, {"task": task, "images": [], "messages": messages, "regions": [region]}


def _box(number: int, side: int, cell: int) -> list[int]:
    """A patch in its cell, whose edge it leaves free."""
    row, column = divmod(number, side)
    edge = cell // 7
    x, y = column * cell, row * cell
    return [x + edge, y + edge, x + cell - edge, y + cell - edge]
