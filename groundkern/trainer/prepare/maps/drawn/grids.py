"""Where is the odd patch?"""

from __future__ import annotations

import random

from PIL import Image

from groundkern.trainer.drawing.scenes import patch_grid
from groundkern.trainer.prepare.maps.drawn.limits import limit
from groundkern.trainer.records import chat_sample


def plan_grid(rng: random.Random, size: int, *, side: int) -> dict:
    limit("side", side, 2, size // 4)
    row, column = rng.randint(1, side), rng.randint(1, side)
    colours = rng.getrandbits(64)
    return {"cell": size // side, "side": side, "row": row, "column": column, "colours": colours}


def draw_grid(plan: dict, rng: random.Random) -> tuple[Image.Image, dict]:
    row, column, colours = plan["row"], plan["column"], random.Random(plan["colours"])
    picture = patch_grid(row, column, colours, side=plan["side"], cell=plan["cell"])
    answer = f"row {row} column {column}"
    box = list(picture.boxes[0][1])
    spans = [[4, 4 + len(str(row))], [len(answer) - len(str(column)), len(answer)]]
    regions = [{"char_span": span, "box": box} for span in spans]
    question = "Where is the red patch?"
    return picture.image, chat_sample([], question, answer, task="grid_patch", regions=regions)
