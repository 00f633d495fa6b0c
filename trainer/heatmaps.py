"""Where a model looks on a few held-out samples: plain data that report pictures are drawn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groundkern.hf import GroundedExample, image_geometry
from trainer.evaluate import own_columns, read, to_device
from trainer.pictures import data_uri

THUMBNAIL = 560  # pixels of the longer side in the report


def heat_maps(
    model: torch.nn.Module,
    processor: Any,
    collator: Any,
    tasks: dict[str, list[int]],
    dataset: Any,
    *,
    bf16: bool = False,
) -> list[dict]:
    """One entry for each picked sample that has regions, of an attached model in evaluation mode.

    Args:
        tasks: indices of the samples to show, by task.

    Returns:
        Dicts of plain values: task, name, question, answer, image (a data URI), size (width,
        height), boxes, points, polygons and polylines (fractions), rects [n][4] (fractions),
        attention [n] and, if the answer has aligned tokens, contribution [n].
    """
    entries = []
    for task, indices in tasks.items():
        for index in indices:
            example = dataset[index]
            batch = collator([example])
            tables = image_geometry(processor, model.config, [example.images], batch)
            batch = to_device(batch, model.device)
            _, maps, contributions = read(model, batch, bf16=bf16)
            if maps is not None:
                entry = _entry(example, batch, tables[0], maps, contributions)
                entries.append({"task": task, **entry})
    return entries


def _entry(
    example: GroundedExample,
    batch: dict,
    table: Tensor,
    maps: Tensor,
    contributions: Tensor | None,
) -> dict:
    image = int(batch["gk_map_image"][0, 0])
    columns = own_columns(batch)[0, 0, : len(table)].cpu()  # the first map row's image
    columns &= (table[:, 0] == image) & (table[:, 3] > table[:, 1])
    regions = [region for region in example.regions if region.image == image]
    turn = min((region.turn for region in regions), default=0)
    regions = [region for region in regions if region.turn == turn]
    picture = example.images[image].convert("RGB")
    thumbnail = picture.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    entry = {
        "name": example.name,
        "question": _text(example.messages[turn - 1]),
        "answer": _text(example.messages[turn]),
        "image": data_uri(thumbnail),
        "size": picture.size,
        "boxes": [box for region in regions for box in region.boxes],
        "points": [point for region in regions for point in region.points],
        "polygons": [polygon for region in regions for polygon in region.polygons],
        "polylines": [line for region in regions for line in region.polylines],
        "rects": _rounded(table[columns][:, 1:]),
        "attention": _rounded(maps[0, 0, : len(table)].cpu()[columns]),
    }
    if contributions is not None:
        sets = batch["gk_side_set"][0]
        rows = sets == sets[0]  # the tokens of the first phrase
        contribution = contributions[0, rows].float().mean(0)[: len(table)].cpu()
        entry["contribution"] = _rounded(contribution[columns])
    return entry


def _text(message: dict) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def _rounded(values: Tensor) -> list:
    return [
        [round(x, 5) for x in row] if isinstance(row, list) else round(row, 6)
        for row in values.tolist()
    ]
