"""Read a line of words that say nothing of each other: the marked one, or one by its number."""

from __future__ import annotations

import random
from functools import cache

from PIL import Image

from groundkern.trainer.drawing.scenes import face, word_page
from groundkern.trainer.drawing.texts import texts
from groundkern.trainer.prepare.maps.drawn.limits import limit
from groundkern.trainer.records import chat_sample

ALL_WORDS = 10**6  # more than there are


@cache
def _vocabulary(cell: int, columns: int) -> tuple[str, ...]:
    """The distinct words of the demo's texts, without their punctuation, that fit a line."""
    words = {word.strip(".,;:!?\"'()-") for passage in texts() for word in passage}
    pen = face(cell)
    return tuple(sorted(w for w in words if w.isalpha() and pen.cells(w) <= columns))


def vocabulary_of(cell: int, columns: int, count: int) -> tuple[str, ...]:
    """`count` of the words that fit `columns` cells, evenly spaced in the alphabet, or all."""
    known = _vocabulary(cell, columns)
    return known[:: max(1, len(known) // count)][:count]


def plan_page(rng: random.Random, size: int, *, cell: int, vocabulary: int = ALL_WORDS) -> dict:
    """Words drawn at random, so that none can be guessed from the others."""
    limit("cell", cell, 14, size // 2)
    columns = size // cell
    known = vocabulary_of(cell, columns, vocabulary)
    shown = rng.choices(known, k=columns * columns)
    return {"cell": cell, "columns": columns, "words": shown, "line": rng.randrange(columns)}


def draw_page(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    return _read_line(plan, rng, "word_page", "Read the highlighted line.", marked=plan["line"])


def draw_asked(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    return _read_line(plan, rng, "asked_line", f"Read line {plan['line'] + 1}.", marked=None)


def _read_line(
    plan: dict, rng: random.Random, task: str, question: str, *, marked: int | None
) -> tuple[Image.Image, dict]:
    columns = plan["columns"]
    picture = word_page(
        plan["words"], rng, columns=columns, rows=columns, marked=marked, cell=plan["cell"]
    )
    answer, box = picture.boxes[plan["line"]]
    regions = [{"text": answer, "box": list(box)}]
    words = [{"text": text, "box": list(box)} for text, box in picture.words]
    return picture.image, chat_sample([], question, answer, task=task, regions=regions, words=words)
