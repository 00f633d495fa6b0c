"""What the page shows of one sample: its chat with spans marked, and its images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from PIL import Image

from groundkern.hf.data.example import Region, message_text
from trainer.images import SampleError
from trainer.pictures import data_uri
from trainer.sample import Sample

if TYPE_CHECKING:
    from trainer.inspection.seen import SeenByModel

COLORS = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#c2255c", "#0c8599", "#e67700", "#5f3dc4")
LONGEST = 1000  # pixels of the longer side of an image on the page
LEGIBLE = 500  # smaller images are shown by so many times their size that stays below this

Rect = tuple[float, float, float, float]


@dataclass
class Shape:
    """Something drawn over an image, in its view's pixels: one of box, point and polygon."""

    color: str
    title: str
    number: int = 0
    shift: int = 0  # numbers of regions that begin at the same point stand side by side
    box: Rect | None = None
    point: tuple[float, float] | None = None
    polygon: list[tuple[float, float]] | None = None


@dataclass
class View:
    """An image as it is shown: a data URI of width x height pixels, and what is drawn over it."""

    uri: str
    width: int
    height: int
    caption: str
    frame: Rect = (0.0, 0.0, 1.0, 1.0)  # what it shows, in fractions of the original image
    grid: list[Rect] = field(default_factory=list)
    inside: list[Rect] = field(default_factory=list)  # tokens of a region
    labels: list[tuple[Rect, str]] = field(default_factory=list)  # labelled tokens
    words: list[Shape] = field(default_factory=list)
    regions: list[Shape] = field(default_factory=list)

    def point(self, x: float, y: float) -> tuple[float, float]:
        """A point in fractions of the original image, in pixels of the view."""
        x0, y0, x1, y1 = self.frame
        x, y = (x - x0) / (x1 - x0) * self.width, (y - y0) / (y1 - y0) * self.height
        return round(x, 1), round(y, 1)

    def box(self, box: Rect) -> Rect:
        """A box likewise: x, y, width, height."""
        (x0, y0), (x1, y1) = self.point(*box[:2]), self.point(*box[2:])
        return x0, y0, round(x1 - x0, 1), round(y1 - y0, 1)


@dataclass
class Card:
    """One sample on the page."""

    where: str
    task: str
    messages: list[tuple[str, list[tuple[str, str, str]]]]  # role, (text, color, title) pieces
    views: list[View] = field(default_factory=list)
    tokens: list[tuple[str, str, str]] = field(default_factory=list)  # text, class, title
    warnings: list[str] = field(default_factory=list)


def card(sample: Sample, model: SeenByModel | None) -> Card:
    """What the page shows of a sample; one whose images cannot be decoded shows why."""

    spans = dict.fromkeys((r.turn, r.start, r.stop) for r in sample.regions)
    numbers = {span: number for number, span in enumerate(spans, start=1)}
    made = Card(sample.where, sample.task, _messages(sample, numbers))
    try:
        example = sample.load()
        seen = model.see(example) if model is not None else None
    except (SampleError, ValueError) as error:
        made.warnings.append(str(error))
        return made
    for index, image in enumerate(example.images):
        view = framed(image) if seen is None else seen.view(index)
        view.words = [
            Shape("", word.text, box=view.box(word.box))
            for word in sample.words
            if word.image == index
        ]
        view.regions = [
            shape
            for region in sample.regions
            if region.image == index
            for shape in _shapes(region, numbers, sample, view)
        ]
        starts: Counter = Counter()
        for shape in view.regions:
            start = shape.box[:2] if shape.box else shape.point or shape.polygon[0]
            shape.shift = starts[start]
            starts[start] += 12
        made.views.append(view)
    if seen is not None:
        made.tokens, made.warnings = seen.tokens, seen.warnings
    return made


def framed(
    image: Image.Image,
    frame: Rect = (0.0, 0.0, 1.0, 1.0),
    size: tuple[int, int] | None = None,
    caption: str = "",
) -> View:
    """A view of a frame of an image (black beyond it), resized to `size`.

    Args:
        image: the original, RGB.
        frame: in fractions of it.
        size: pixels the processor makes of the frame; None: as it is.
        caption: what is said below it.
    """
    width, height = image.size
    edges = [frame[0] * width, frame[1] * height, frame[2] * width, frame[3] * height]
    outer = [math.floor(edge + 1e-6) for edge in edges[:2]]
    outer += [math.ceil(edge - 1e-6) for edge in edges[2:]]
    size = size or (outer[2] - outer[0], outer[3] - outer[1])
    inner = [edge - start for edge, start in zip(edges, outer[:2] * 2)]
    inner = [min(max(0.0, edge), side) for edge, side in zip(inner, _sides(outer) * 2)]
    seen = image.crop(tuple(outer)).resize(size, Image.Resampling.BICUBIC, tuple(inner))
    scale = min(1.0, LONGEST / max(size))
    if scale < 1:
        seen = seen.resize(tuple(max(1, round(side * scale)) for side in size))
    times = max(1, LEGIBLE // max(seen.size))
    shown = (seen.width * times, seen.height * times)
    return View(data_uri(seen), *shown, caption or f"{width} x {height} pixels", frame)


def _sides(box: list[int]) -> list[int]:
    return [box[2] - box[0], box[3] - box[1]]


def _shapes(region: Region, numbers: dict, sample: Sample, view: View) -> Iterator[Shape]:
    span = (region.turn, region.start, region.stop)
    number = numbers[span]
    title = message_text(sample.messages[region.turn])[region.start : region.stop]
    color = COLORS[(number - 1) % len(COLORS)]
    for box in region.boxes:
        yield Shape(color, title, number, box=view.box(box))
    for point in region.points:
        yield Shape(color, title, number, point=view.point(*point))
    there_and_back = ((*line, *reversed(line)) for line in region.polylines)
    for polygon in (*region.polygons, *there_and_back):
        yield Shape(color, title, number, polygon=[view.point(*corner) for corner in polygon])


def _messages(sample: Sample, numbers: dict) -> list[tuple[str, list[tuple[str, str, str]]]]:
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
