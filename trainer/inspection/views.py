"""An image as the page shows it, and what is drawn over it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image

from trainer.pictures import data_uri

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
    overlay: str | None = None  # of a mask or heat: a data URI over the box


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
        caption: the text below it.
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
