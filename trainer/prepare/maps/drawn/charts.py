"""Read a bar chart: the value of a bar by its name, or which of two bars is longer."""

from __future__ import annotations

import random

from PIL import Image

from trainer.drawing.scenes import CELL, bar_chart
from trainer.prepare.maps.drawn.limits import limit
from trainer.prepare.maps.drawn.pages import ALL_WORDS, vocabulary_of
from trainer.records import chat_sample

_NAME = 3  # cells of a bar's name
_FEWEST = 6  # cells of a row: name, bar and value


def plan_chart(
    rng: random.Random, size: int, *, bars: int, names: int, largest: int, asked: int
) -> dict:
    """Bars of distinct names and values, which are from 1 to `largest`."""
    limit("asked", asked, 1, 2)
    limit("bars", bars, asked, size // 10)
    limit("names", names, bars, ALL_WORDS)
    limit("largest", largest, bars, 99)
    cell = min(CELL, size // max(_FEWEST, bars))
    known = vocabulary_of(cell, _NAME, names)
    shown = list(zip(rng.sample(known, bars), rng.sample(range(1, largest + 1), bars), strict=True))
    return {
        "cell": cell,
        "columns": size // cell,
        "shown": shown,
        "asked": rng.sample(range(bars), asked),
    }


def draw_chart(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    """The answer to a question of two bars says both values before it compares them."""
    rows = [(name, str(value)) for name, value in plan["shown"]]
    picture = bar_chart(rows, rng, columns=plan["columns"], cell=plan["cell"])
    asked = [plan["shown"][bar] for bar in plan["asked"]]
    if len(asked) == 1:
        ((name, value),) = asked
        question, answer = f"What is the value of {name}?", str(value)
        named = [(answer, 0, plan["asked"][0])]
    else:
        (first, a), (second, b) = asked
        question = f"Which is longer, {first} or {second}?"
        answer = f"{first} {a}, {second} {b}: {first if a > b else second}"
        named = [
            (str(a), len(first) + 1, plan["asked"][0]),
            (str(b), answer.index(":") - len(str(b)), plan["asked"][1]),
        ]
    regions = []
    for text, start, bar in named:
        box = picture.words[2 * bar + 1][1]  # of the printed value
        regions.append({"char_span": [start, start + len(text)], "box": list(box)})
    words = [{"text": text, "box": list(box)} for text, box in picture.words]
    return picture.image, chat_sample(
        [], question, answer, task="bar_chart", regions=regions, words=words
    )
