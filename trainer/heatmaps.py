"""Where a model looks on a few held-out samples: plain data that report pictures are drawn from."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from groundkern.hf import GroundedExample, image_geometry
from trainer.evaluate import forward, own_columns, to_device

THUMBNAIL = 560  # pixels of the longer side kept for the report


def heat_maps(
    model: torch.nn.Module,
    processor: Any,
    collator: Any,
    tasks: dict[str, list[int]],
    dataset: Any,
    *,
    bf16: bool = False,
) -> list[dict]:
    """One entry for each picked sample that has regions; all objectives must be attached.

    Args:
        tasks: indices of the samples to show, by task.

    Returns:
        Dicts of plain values: task, name, question, answer, image (a data URI), size (width,
        height), boxes, points and polygons (fractions), rects [n][4] (fractions), attention [n] and, where the answer
        has aligned tokens, contribution [n].
    """
    entries = []
    for task, indices in tasks.items():
        for index in indices:
            example = dataset[index]
            batch = collator([example])
            tables = image_geometry(processor, model.config, [example.images], batch)
            batch = to_device(batch, model.device)
            output = forward(model, batch, bf16=bf16)
            if (batch["gk_map_position"] >= 0).any():
                entries.append({"task": task, **_entry(example, batch, output, tables[0])})
    return entries


def _entry(example: GroundedExample, batch: dict, output: Any, table: Tensor) -> dict:
    image = int(batch["gk_map_image"][0, 0])
    columns = own_columns(batch)[0, 0, : len(table)].cpu()  # the first map row's image
    columns &= (table[:, 0] == image) & (table[:, 3] > table[:, 1])
    regions = [region for region in example.regions if region.image == image]
    turn = min((region.turn for region in regions), default=0)
    regions = [region for region in regions if region.turn == turn]
    picture = example.images[image].convert("RGB")
    entry = {
        "name": example.name,
        "question": _text(example.messages[turn - 1]),
        "answer": _text(example.messages[turn]),
        "image": _data_uri(picture),
        "size": picture.size,
        "boxes": [box for region in regions for box in region.boxes],
        "points": [point for region in regions for point in region.points],
        "polygons": [polygon for region in regions for polygon in region.polygons],
        "rects": _rounded(table[columns][:, 1:]),
        "attention": _rounded(output.maps[0, 0, : len(table)].cpu()[columns]),
    }
    sets = batch["gk_side_set"][0]
    if (sets >= 0).any():
        rows = sets == sets[0]  # the tokens of the first phrase
        contribution = output.contributions[0, rows].float().mean(0)[: len(table)].cpu()
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


def _data_uri(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
