"""Where a model looks on a few held-out samples: plain data that report pictures are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from groundkern.hf import GroundedExample, Region
from trainer.metrics.held_out import device_of, has_aligned, own_columns, read, to_device
from trainer.outlines import outlines
from trainer.pictures import page_uri

KEPT = 1_200_000  # pixels of a picture, whatever its shape: the text of a receipt stays readable


def heat_maps(
    model: torch.nn.Module,
    collator: Any,
    tasks: dict[str, list[int]],
    dataset: Any,
    *,
    limit: int,
    autocast: torch.dtype | None = None,
) -> list[dict]:
    """An entry for each of the first samples that have a map to show.

    A sample without regions, without an image, or whose answer is empty or cut has none: the next
    one takes its place.

    Args:
        model: attached, in evaluation mode.
        collator: examples to a batch; its `geometry` says where visual tokens are.
        tasks: indices of the samples to choose from, by task.
        dataset: a `JsonLinesDataset`.
        limit: entries of a task.
        autocast: the dtype that the model runs in; None: its weights' own.

    Returns:
        Dicts of plain values: task, name, question, answer, image (a data URI), size (width,
        height), boxes, points, polygons and polylines (fractions; of masks their outlines), rects
        [n][4] (fractions),
        attention [n] and, if the answer has aligned tokens, contribution [n].
    """
    entries = []
    for task, indices in tasks.items():
        found = _entries(model, collator, indices, dataset, autocast)
        entries += [{"task": task, **entry} for entry in islice(found, limit)]
    return entries


def _entries(
    model: torch.nn.Module,
    collator: Any,
    indices: list[int],
    dataset: Any,
    autocast: torch.dtype | None,
) -> Iterator[dict]:
    for index in indices:
        if not dataset.sample(index).regions:  # known without decoding an image
            continue
        example = dataset[index]
        batch = collator([example])
        if not bool((batch["gk_map_position"] >= 0).any()):
            continue
        tables = collator.geometry([example.images], batch)
        batch = to_device(batch, device_of(model))
        aligned = has_aligned(batch)
        _, maps, contributions = read(model, batch, autocast=autocast, aligned=aligned)
        yield _entry(example, batch, tables[0], maps, contributions)


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
    entry = {
        "name": example.name,
        "question": _text(example.messages[turn - 1]),
        "answer": _text(example.messages[turn]),
        "image": page_uri(kept(picture), quality=92),
        "size": picture.size,
        "boxes": [box for region in regions for box in region.boxes],
        "points": [point for region in regions for point in region.points],
        "polygons": [polygon for region in regions for polygon in region.polygons],
        "polylines": [line for region in regions for line in _lines(region)],
        "rects": _rounded(table[columns][:, 1:]),
        "attention": _rounded(maps[0, 0, : len(table)].cpu()[columns]),
    }
    if contributions is not None:
        sets = batch["gk_side_set"][0]
        rows = sets == sets[0]  # the tokens of the first phrase
        contribution = contributions[0, rows].float().mean(0)[: len(table)].cpu()
        entry["contribution"] = _rounded(contribution[columns])
    return entry


def _lines(region: Region) -> list:
    return [*region.polylines, *(line for r in region.rasters for line in outlines(r))]


def kept(picture: Image.Image) -> Image.Image:
    """The picture, made smaller if it has more than `KEPT` pixels."""
    scale = (KEPT / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    smaller = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(smaller, Image.LANCZOS)


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
