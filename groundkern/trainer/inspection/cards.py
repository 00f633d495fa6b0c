"""What the page shows of one sample: its chat with spans marked, its images and its videos."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image

from groundkern.hf.data.example import Region, message_text
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.inspection.captions import Room, touches
from groundkern.trainer.inspection.overlays import overlay
from groundkern.trainer.inspection.recent import Recent
from groundkern.trainer.inspection.sheets import Cell, regions_at, sheet_of
from groundkern.trainer.inspection.views import Shape, View, data_uri, drawn, framed

if TYPE_CHECKING:
    from groundkern.trainer.inspection.seen import SeenByModel

COLORS = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
Pieces = list[tuple[str, str, str]]  # text, color, title


@dataclass
class Card:
    """One sample on the page."""

    where: str
    task: str
    messages: list[tuple[str, Pieces]]  # by role
    views: list[View] = field(default_factory=list)
    tokens: list[tuple[str, str, str]] = field(default_factory=list)  # text, class, title
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failed: bool = False  # its images or videos cannot be decoded, or it does not fit the model


def card(sample: Sample, model: SeenByModel | None, recent: Recent) -> Card:
    """What the page shows of a sample; one that cannot be decoded shows why."""
    spans = dict.fromkeys((r.turn, r.start, r.stop) for r in sample.regions)
    numbers = {span: number for number, span in enumerate(spans, start=1)}
    made = Card(sample.where, sample.task, _messages(sample, numbers), notes=_weights(sample))
    try:
        example = sample.load(recent.decode)
        seen = model.see(example) if model is not None else None
        example = model.shown(example) if model is not None else example
    except (SampleError, ValueError) as error:
        made.warnings.append(str(error))
        made.failed = True
        return made
    for index, (path, image) in enumerate(zip(sample.images, example.images)):
        view = framed(image.size) if seen is None else seen.view(index)
        key = (path, view.frame, view.seen)
        view.uri = recent.encode(key, partial(_uri, image, view))
        _draw(view, index, replace(sample, regions=example.regions), numbers)
        made.views.append(view)
    for number, video in enumerate(example.videos):
        view, cells, picture = sheet_of(video, number)
        view.uri = data_uri(picture)
        regions = [region for region in example.regions if region.video == number]
        view.regions = [
            shape
            for region in regions
            for cell, there in regions_at(region, video, cells)
            for shape in _shapes(there, numbers, sample, cell)
        ]
        if seen is not None:
            seen.draw_video(view, number, cells)
        _write_captions(view)
        made.views.append(view)
    if seen is not None:
        made.tokens, made.warnings = seen.tokens, seen.warnings
    return made


def _weights(sample: Sample) -> list[str]:
    """What has another weight than 1, in words."""
    notes = []
    if sample.grounding_weight != 1:
        notes.append(f"grounding weight {sample.grounding_weight:g}")
    for kind in ("regions", "words", "phrases"):
        weights = [part.weight for part in getattr(sample, kind)]
        others = sorted({weight for weight in weights if weight != 1})
        if others:
            count = sum(weight != 1 for weight in weights)
            span = f"{others[0]:g}" if len(others) == 1 else f"{others[0]:g} to {others[-1]:g}"
            notes.append(f"weight {span} of {count:,} of {len(weights):,} {kind}")
    return notes


def _uri(image: Image.Image, view: View) -> str:
    return data_uri(drawn(image, view))


def _draw(view: View, index: int, sample: Sample, numbers: dict) -> None:
    """Regions and words of an image, with captions; a region's number comes before any word."""
    view.words = [
        Shape("", word.text, box=view.box(word.box)) for word in sample.words if word.image == index
    ]
    view.regions = [
        shape
        for region in sample.regions
        if region.image == index
        for shape in _shapes(region, numbers, sample, view)
    ]
    _write_captions(view)


def _write_captions(view: View) -> None:
    """Captions of the shapes of a view."""
    room = Room(view.width, view.height)
    paper = (0.0, 0.0, view.width, view.height)
    for shape in (*view.regions, *view.words):
        if touches(shape.around(), paper):  # not where the processor crops it away
            shape.caption = room.take(str(shape.number or shape.title), shape.around())
    view.font, view.hidden = room.font, room.hidden


def _shapes(region: Region, numbers: dict, sample: Sample, view: View | Cell) -> Iterator[Shape]:
    span = (region.turn, region.start, region.stop)
    number = numbers[span]
    title = message_text(sample.messages[region.turn])[region.start : region.stop]
    title += "" if region.weight == 1 else f" (weight {region.weight:g})"
    color = COLORS[(number - 1) % len(COLORS)]
    for box in region.boxes:
        yield Shape(color, title, number, box=view.box(box))
    for point in (*region.points, *(bell[:2] for bell in region.bells)):
        yield Shape(color, title, number, point=view.point(*point))
    for raster in region.rasters:
        box = view.box(raster.bounds())
        yield Shape(color, title, number, box=box, overlay=overlay(raster, color))
    there_and_back = ((*line, *reversed(line)) for line in region.polylines)
    for polygon in (*region.polygons, *there_and_back):
        yield Shape(color, title, number, polygon=[view.point(*corner) for corner in polygon])


def _messages(sample: Sample, numbers: dict) -> list[tuple[str, Pieces]]:
    """Role and pieces of each message; the pieces of a region's span have its color and number."""
    shown = []
    for turn, message in enumerate(sample.messages):
        text = message_text(message)
        spans = [(start, stop, n) for (t, start, stop), n in numbers.items() if t == turn]
        edges = sorted(
            {0, len(text), *(edge for start, stop, _ in spans for edge in (start, stop))}
        )
        pieces = []
        for start, stop in pairwise(edges):
            on = [n for s, e, n in spans if s <= start and stop <= e]
            color = COLORS[(on[-1] - 1) % len(COLORS)] if on else ""
            pieces.append((text[start:stop], color, ", ".join(map(str, on))))
        shown.append((message["role"], pieces))
    return shown
