"""Where a model looks on a few held-out samples: plain data that report pictures are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groundkern.hf import GroundedExample, Region, Video
from groundkern.targets.bells import outlines_of
from groundkern.trainer.inspection.sheets import Cell, regions_at, sheet_of
from groundkern.trainer.metrics.held_out import device_of, has_aligned, own_columns, read, to_device
from groundkern.trainer.outlines import outlines
from groundkern.trainer.pictures import page_uri
from groundkern.trainer.visual_places import VisualPlaces, shown_at, visual_places

FRAMES = 12  # of a video, at most, in its picture
KEPT = 1_200_000  # pixels of a picture, whatever its shape: the text of a receipt stays readable
Point = tuple[float, float]


def heat_maps(
    model: torch.nn.Module,
    collator: Any,
    tasks: dict[str, list[int]],
    dataset: Any,
    *,
    limit: int,
    autocast: torch.dtype | None = None,
    look: Callable[..., tuple[Any, Tensor, Tensor | None]] = read,
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
        look: reads the maps of a batch, as `groundkern.trainer.metrics.held_out.read` does.

    Returns:
        Dicts of plain values: task, name, question, answer, image (a data URI), size (width,
        height), boxes, points, polygons and polylines (fractions; of masks their outlines), rects
        [n][4] (fractions),
        attention [n] and, if the answer has aligned tokens, contribution [n].
    """
    entries = []
    for task, indices in tasks.items():
        found = _entries(model, collator, indices, dataset, autocast, look)
        entries += [{"task": task, **entry} for entry in islice(found, limit)]
    return entries


def _entries(
    model: torch.nn.Module,
    collator: Any,
    indices: list[int],
    dataset: Any,
    autocast: torch.dtype | None,
    look: Callable[..., tuple[Any, Tensor, Tensor | None]],
) -> Iterator[dict]:
    for index in indices:
        if not dataset.sample(index).regions:  # known without decoding an image
            continue
        example = dataset[index]
        batch = collator([example])
        if not bool((batch["gk_map_position"] >= 0).any()):
            continue
        places = visual_places(collator, example, batch)
        batch = to_device(batch, device_of(model))
        aligned = has_aligned(batch)
        _, maps, contributions = look(model, batch, autocast=autocast, aligned=aligned)
        yield _entry(example, batch, places, maps, contributions)


def _entry(
    example: GroundedExample,
    batch: dict,
    places: VisualPlaces,
    maps: Tensor,
    contributions: Tensor | None,
) -> dict:
    number, count = int(batch["gk_map_image"][0, 0]), len(places.number)
    columns = own_columns(batch)[0, 0, :count].cpu()  # the first map row's image
    columns &= places.of(number)
    regions = [region for region in example.regions if example.place(region) == number]
    turn = min((region.turn for region in regions), default=0)
    regions = [region for region in regions if region.turn == turn]
    if number < len(example.images):
        picture = example.images[number].convert("RGB")
        tokens, rects = columns.nonzero()[:, 0], places.rects[columns]
        shapes = _shapes(regions)
    else:
        video = example.videos[number - len(example.images)]
        picture, tokens, rects, shapes = _frames(video, columns, places, regions)
    entry = {
        "name": example.name,
        "question": _text(example.messages[turn - 1]),
        "answer": _text(example.messages[turn]),
        "image": page_uri(kept(picture), quality=92),
        "size": picture.size,
        **shapes,
        "rects": _rounded(rects),
        "attention": _rounded(maps[0, 0, :count].cpu()[tokens]),
    }
    if contributions is not None:
        sets = batch["gk_side_set"][0]
        rows = sets == sets[0]  # the tokens of the first phrase
        contribution = contributions[0, rows].float().mean(0)[:count].cpu()
        entry["contribution"] = _rounded(contribution[tokens])
    return entry


def _frames(
    video: Video, columns: Tensor, places: VisualPlaces, regions: list[Region]
) -> tuple[Image.Image, Tensor, Tensor, dict]:
    """Frames of a video as one picture; the tokens that each of them shows, one frame's after
    another's; where each of these is in the picture; and the regions' shapes in it."""
    chosen = np.linspace(0, len(video.frames) - 1, min(FRAMES, len(video.frames)))
    chosen = chosen.round().astype(int).tolist()
    frames, times = (tuple(each[i] for i in chosen) for each in (video.frames, video.times))
    _, cells, picture = sheet_of(Video(frames, times, video.fps), 0)
    width, height = picture.size
    tokens, rects = [], []
    for cell in cells:
        tokens.append((columns & shown_at(places.times, cell.time)).nonzero()[:, 0])
        scale = torch.tensor([cell.width / width, cell.height / height] * 2, dtype=torch.float64)
        start = torch.tensor([cell.left / width, cell.top / height] * 2, dtype=torch.float64)
        rects.append(places.rects[tokens[-1]] * scale + start)

    def within(cell: Cell) -> Callable[[Point], Point]:
        def at(point: Point) -> Point:
            x, y = cell.point(*point)
            return x / width, y / height

        return at

    shown = [pair for region in regions for pair in regions_at(region, video, cells)]
    shapes = _shapes([there for _, there in shown], [within(cell) for cell, _ in shown])
    return picture, torch.cat(tokens), torch.cat(rects), shapes


def _shapes(
    regions: list[Region], places: list[Callable[[Point], Point]] | None = None
) -> dict[str, list]:
    """The shapes of regions; of each every point goes where its function of `places` puts it."""
    found: dict[str, list] = {kind: [] for kind in ("boxes", "points", "polygons", "polylines")}
    for region, at in zip(regions, places or [tuple] * len(regions), strict=True):
        lines = [*region.polylines, *(line for r in region.rasters for line in outlines(r))]
        found["boxes"] += [(*at(box[:2]), *at(box[2:])) for box in region.boxes]
        found["points"] += map(at, region.points)
        rings = [ring.tolist() for ring in outlines_of(region.bells)]
        found["polygons"] += [tuple(map(at, polygon)) for polygon in (*region.polygons, *rings)]
        found["polylines"] += [tuple(map(at, line)) for line in lines]
    return found


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
