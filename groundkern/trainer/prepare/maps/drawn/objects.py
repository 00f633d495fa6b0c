"""Coloured shapes in the cells of a grid: which are there, and where?"""

from __future__ import annotations

import random
from itertools import product

from PIL import Image, ImageDraw

from groundkern.trainer.prepare.maps.drawn.limits import limit
from groundkern.trainer.records import chat_sample

_COLOURS = {"red": (210, 40, 40), "blue": (40, 70, 210), "green": (40, 150, 70)}
_SHAPES = ("circle", "square", "triangle")


def plan_objects(rng: random.Random, size: int, *, objects: int, side: int) -> dict:
    """Objects in cells of a grid; half of the questions ask for a pair of which one is missing.

    The colours and the shapes of a missing pair are all there, so that colours alone or shapes
    alone do not answer.
    """
    limit("side", side, 2, size // 16)
    limit("objects", objects, 3, side * side)
    (a, b), (s, t) = rng.sample(sorted(_COLOURS), 2), rng.sample(_SHAPES, 2)
    there = rng.random() < 0.5
    shown = [(a, s), (b, t)] if there else [(a, s), (a, t), (b, s)]
    others = [pair for pair in product(sorted(_COLOURS), _SHAPES) if there or pair != (b, t)]
    shown += rng.choices(others, k=objects - len(shown))
    asked = [(a, s), (b, t)]
    rng.shuffle(asked)
    cells = rng.sample(range(side * side), objects)
    return {"size": size, "side": side, "asked": asked, "shown": shown, "cells": cells}


def draw_objects(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    image, boxes = _drawn(plan, rng)
    both, phrases = " and ".join(_named(plan["asked"])), _phrases(plan["asked"])
    spans = [phrase["char_span"] for phrase in phrases[1:]]
    answer = f"{both}: {'yes' if all(pair in boxes for pair in plan['asked']) else 'no'}"
    pairs = list(zip(plan["asked"], spans, strict=True))
    regions = [{"char_span": span, "box": box} for p, span in pairs for box in boxes.get(p, ())]
    return image, chat_sample(
        [], f"Is there {both}?", answer, task="two_objects", regions=regions, phrases=phrases
    )


def plan_pointing(rng: random.Random, size: int, *, objects: int, side: int, asked: int) -> dict:
    """Objects in cells of a grid; each kind that is asked for is there once."""
    limit("side", side, 2, size // 14)
    limit("asked", asked, 1, 2)
    limit("objects", objects, asked, side * side)
    kinds = list(product(sorted(_COLOURS), _SHAPES))
    pairs = rng.sample(kinds, asked)
    others = [kind for kind in kinds if kind not in pairs]
    shown = pairs + rng.choices(others, k=objects - asked)
    cells = rng.sample(range(side * side), objects)
    return {"size": size, "side": side, "asked": pairs, "shown": shown, "cells": cells}


def draw_pointing(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    """The answer names the objects and then the middles of their cells, in percent of the image."""
    image, boxes = _drawn(plan, rng)
    side, names = plan["side"], " and ".join(_named(plan["asked"]))
    answer, regions = f"{names}:", []
    for number, pair in enumerate(plan["asked"]):
        row, column = divmod(plan["cells"][number], side)
        answer += "," if number else ""
        for at in (column, row):
            percent = f" {round(100 * (at + 0.5) / side)}"
            span = [len(answer) + 1, len(answer) + len(percent)]
            regions.append({"char_span": span, "box": boxes[pair][0]})
            answer += percent
    return image, chat_sample(
        [], f"Point to {names}.", answer, task="pointing", regions=regions,
        phrases=_phrases(plan["asked"]),
    )  # fmt: skip


def _named(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"a {colour} {shape}" for colour, shape in pairs]


def _phrases(pairs: list[tuple[str, str]]) -> list[dict]:
    """The phrases of an answer that begins with its objects' names: all of them, and each."""
    names, start, phrases = _named(pairs), 0, []
    if len(pairs) > 1:
        phrases.append({"char_span": [0, len(" and ".join(names))]})
    for (_, shape), name in zip(pairs, names, strict=True):
        phrases.append({"char_span": [start, start + len(name)], "subject": shape})
        start += len(name) + len(" and ")
    return phrases


def _drawn(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    """The objects of a plan, and the boxes of each kind."""
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
    return image, boxes
