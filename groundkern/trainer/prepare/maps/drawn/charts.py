"""Read a bar chart: the values of bars by their names, or of one by its colour."""

from __future__ import annotations

import random

from PIL import Image

from groundkern.trainer.drawing.pages import Color
from groundkern.trainer.drawing.scenes import CELL, bar_chart
from groundkern.trainer.prepare.maps.drawn.limits import limit
from groundkern.trainer.prepare.maps.drawn.pages import ALL_WORDS, vocabulary_of
from groundkern.trainer.records import chat_sample

_HUES: dict[str, Color] = {
    "red": (210, 40, 40),
    "blue": (40, 70, 210),
    "green": (40, 150, 70),
    "orange": (240, 140, 30),
    "purple": (140, 60, 170),
    "grey": (130, 130, 130),
}
_NAME = 3  # cells of a bar's name
_FEWEST = 6  # cells of a row: name, bar and value


def plan_chart(
    rng: random.Random, size: int, *, bars: int, names: int, largest: int, asked: int
) -> dict:
    """Bars of distinct names and values, which are from 1 to `largest`."""
    limit("bars", bars, 1, size // 10)
    limit("asked", asked, 1, bars)
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
    """The answer is the value of the bar; if several are asked for, with their names."""
    rows = [(name, str(value)) for name, value in plan["shown"]]
    picture = bar_chart(rows, rng, columns=plan["columns"], cell=plan["cell"])
    answer, regions, several = "", [], len(plan["asked"]) > 1
    for bar in plan["asked"]:
        name, value = rows[bar]
        answer += (", " if answer else "") + (f"{name} " if several else "")
        box = picture.words[2 * bar + 1][1]  # of the printed value
        span = [len(answer), len(answer) + len(value)]
        regions.append({"char_span": span, "box": list(box)})
        answer += value
    *others, last = (rows[bar][0] for bar in plan["asked"])
    asked = f"s of {', '.join(others)} and {last}" if several else f" of {last}"
    words = [{"text": text, "box": list(box)} for text, box in picture.words]
    question = f"What {'are' if several else 'is'} the value{asked}?"
    return picture.image, chat_sample(
        [], question, answer, task="bar_chart", regions=regions, words=words
    )


def plan_colours(rng: random.Random, size: int, *, bars: int, largest: int) -> dict:
    """Bars of distinct colours and values, which are from 1 to `largest`."""
    limit("bars", bars, 1, min(len(_HUES), size // 14))
    limit("largest", largest, bars, 99)
    cell = min(CELL, size // max(3, bars))
    values = rng.sample(range(1, largest + 1), bars)
    shown = list(zip(rng.sample(sorted(_HUES), bars), values, strict=True))
    return {"cell": cell, "columns": size // cell, "shown": shown, "asked": rng.randrange(bars)}


def draw_colours(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    rows, asked = [(colour, str(value)) for colour, value in plan["shown"]], plan["asked"]
    hues = [_HUES[colour] for colour, _ in rows]
    picture = bar_chart(rows, rng, columns=plan["columns"], cell=plan["cell"], hues=hues)
    colour, answer = rows[asked]
    regions = [{"char_span": [0, len(answer)], "box": list(picture.words[asked][1])}]
    words = [{"text": text, "box": list(box)} for text, box in picture.words]
    question = f"What is the value of the {colour} bar?"
    return picture.image, chat_sample(
        [], question, answer, task="coloured_bars", regions=regions, words=words
    )
