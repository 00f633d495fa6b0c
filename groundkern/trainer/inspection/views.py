"""An image as the page shows it, and what is drawn over it."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from markupsafe import Markup
from PIL import Image

from groundkern.trainer.inspection.captions import Caption

MOST = 3_000_000  # pixels of a picture on the page: the small print of a scanned page is readable
LEGIBLE = 500  # smaller images are shown by so many times their size that stays below this
EXACT = 100_000  # pixels up to which a picture is PNG; a larger one is, if it has few colours
COLOURS = 16
LARGER = Image.Resampling.BICUBIC
SMALLER = Image.Resampling.HAMMING  # 0.6 of the time of bicubic, which is a little sharper

Rect = tuple[float, float, float, float]
Size = tuple[int, int]


@dataclass
class Shape:
    """Something drawn over an image, in its view's units: one of box, point and polygon."""

    color: str
    title: str
    number: int = 0
    box: Rect | None = None
    point: tuple[float, float] | None = None
    polygon: list[tuple[float, float]] | None = None
    caption: Caption | None = None
    overlay: str | None = None  # of a mask or heat: a data URI over the box

    def around(self) -> Rect:
        """The box that holds it: x, y, width, height."""
        if self.box:
            return self.box
        corners = self.polygon or [self.point]
        low, high = ([f(axis) for axis in zip(*corners)] for f in (min, max))
        return *low, high[0] - low[0], high[1] - low[1]


@dataclass
class View:
    """An image as it is shown, width x height units large, and what is drawn over it."""

    width: int
    height: int
    caption: str
    frame: Rect = (0.0, 0.0, 1.0, 1.0)  # what it shows, in fractions of the original image
    seen: Size | None = None  # pixels that the processor makes of the frame
    uri: str = ""
    font: float = 12.0  # of its captions
    hidden: int = 0  # captions that found no room
    grid: list[Rect] = field(default_factory=list)
    inside: list[Rect] = field(default_factory=list)  # tokens of a region
    labels: list[tuple[Rect, str]] = field(default_factory=list)  # labelled tokens
    words: list[Shape] = field(default_factory=list)
    regions: list[Shape] = field(default_factory=list)

    @cached_property
    def key(self) -> str:
        """What the picture is called on the page, which holds one that is shown twice once."""
        return f"p{blake2b(self.uri.encode(), digest_size=8).hexdigest()}"

    def point(self, x: float, y: float) -> tuple[float, float]:
        """A point in fractions of the original image, in units of the view."""
        x0, y0, x1, y1 = self.frame
        x, y = (x - x0) / (x1 - x0) * self.width, (y - y0) / (y1 - y0) * self.height
        return round(x, 1), round(y, 1)

    def box(self, box: Rect) -> Rect:
        """A box likewise: x, y, width, height."""
        (x0, y0), (x1, y1) = self.point(*box[:2]), self.point(*box[2:])
        return x0, y0, round(x1 - x0, 1), round(y1 - y0, 1)


def framed(
    whole: Size,
    frame: Rect = (0.0, 0.0, 1.0, 1.0),
    seen: Size | None = None,
    caption: str = "",
) -> View:
    """A view of a frame of an image, without its picture.

    Args:
        whole: width and height of the original.
        frame: in fractions of it.
        seen: pixels that the processor makes of the frame; None: as it is.
        caption: the text below it.
    """
    x0, y0, x1, y1 = _outer(whole, frame)
    size = seen or (x1 - x0, y1 - y0)
    scale = min(1.0, math.sqrt(MOST / (size[0] * size[1])))
    width, height = (max(1, round(side * scale)) for side in size)
    times = max(1, LEGIBLE // max(width, height))
    caption = caption or f"{whole[0]} x {whole[1]} pixels"
    return View(width * times, height * times, caption, frame, seen)


def drawn(image: Image.Image, view: View) -> Image.Image:
    """The picture of a view: the frame of the original (black beyond it), resized.

    Args:
        image: the original, RGB.
        view: what is shown of it.
    """
    outer = _outer(image.size, view.frame)
    size = (outer[2] - outer[0], outer[3] - outer[1])
    seen = image if outer == (0, 0, *image.size) else image.crop(outer)
    if view.seen is not None:
        edges = [edge * side for edge, side in zip(view.frame, image.size * 2)]
        inner = [edge - start for edge, start in zip(edges, outer[:2] * 2)]
        inner = [min(max(0.0, edge), side) for edge, side in zip(inner, size * 2)]
        smaller = view.seen[0] * view.seen[1] < size[0] * size[1]
        seen = seen.resize(view.seen, SMALLER if smaller else LARGER, tuple(inner))
    if seen.width * seen.height > MOST:  # as `framed` says
        seen = seen.resize((view.width, view.height), SMALLER, reducing_gap=2.0)
    return seen


def data_uri(picture: Image.Image) -> str:
    """A picture as the page holds it: PNG if small, translucent or of few colours, else JPEG.

    A scan or a photo takes a fifth of PNG as JPEG, and a fiftieth of the time.
    """
    buffer, size = io.BytesIO(), picture.width * picture.height
    if size <= EXACT or picture.mode == "RGBA" or picture.getcolors(COLOURS):
        kind = "png"
        picture.save(buffer, "PNG")
    else:
        kind = "jpeg"
        picture.save(buffer, "JPEG", quality=85, subsampling=0)  # thin coloured lines stay sharp
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def edges(box: Rect) -> Markup:
    """A box as the attributes of a `rect`."""
    return Markup('x="{}" y="{}" width="{}" height="{}"'.format(*box))


def _outer(whole: Size, frame: Rect) -> tuple[int, int, int, int]:
    """The whole pixels that hold a frame."""
    edges = [edge * side for edge, side in zip(frame, whole * 2)]
    low = (math.floor(edge + 1e-6) for edge in edges[:2])
    return *low, *(math.ceil(edge - 1e-6) for edge in edges[2:])
