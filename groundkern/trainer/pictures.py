"""Pictures of the report as strings that go straight into HTML: heat maps and loss curves."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

SERIES = ("#e8590c", "#1c7ed6", "#868e96")  # this run, the run beside it: legible on light and dark
_TEXT = "#010203"  # replaced by the page's own text colour until the SVG is written
_TARGET = (0, 150, 255)
_WHOLE = 300_000  # pixels of a whole picture, whatever its shape: 548 x 548, 316 x 948
_ENLARGED = 3.0  # at most: a small picture stays small
_CLOSE = (360, 270)  # pixels of a close-up, drawn as they are, where its target fits in
_APART = 0.6  # a close-up of more than this share of the picture would show nothing new
_EXACT = 100_000  # pixels up to which a picture is PNG
_DARK = {"YlOrRd": (60, 0, 12), "Blues": (5, 10, 60)}  # what heat makes of black

Window = tuple[int, int, int, int]  # pixel edges


def full_scale(maps: Sequence[Sequence[float]]) -> float:
    """The value drawn darkest in all of these maps: their maximum, at least 4 times a map's mean.

    One scale makes several maps comparable; the floor keeps an even map pale.
    """
    positive = [np.maximum(np.asarray(values, dtype=float), 0.0) for values in maps]
    return max((max(v.max(), 4 * v.mean()) for v in positive if v.size), default=0.0)


def heat_picture(entry: dict, values: Sequence[float] | None, top: float = 1.0) -> str:
    """A sample's image with a heat map over it and its target outlined, as a data URI.

    Args:
        entry: one entry of `groundkern.trainer.heatmaps.heat_maps`.
        values: one number per rectangle of the entry, from 0 (clear) to `top` (dark red); None
            draws the target on the image as it is.
        top: the value drawn darkest, of `full_scale`.
    """
    return page_uri(_drawn(whole(_from_data_uri(entry["image"])), entry, values, top))


def whole(image: Image.Image) -> Image.Image:
    """An image as large as a page shows a whole one: of about one area, whatever its shape."""
    scale = min(_ENLARGED, (_WHOLE / (image.width * image.height)) ** 0.5)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.LANCZOS)


def close_up(entry: dict, values: Sequence[float] | None, top: float = 1.0) -> str | None:
    """The surroundings of a sample's target, as `heat_picture` draws it but at full size.

    Returns:
        None if the whole picture is not made smaller, or if the target is most of it.
    """
    image = _from_data_uri(entry["image"])
    window = _window(entry, image.size)
    if image.width * image.height <= _WHOLE or window is None:
        return None
    picture = _drawn(image, entry, values, top, window).crop(window)
    scale = min(1.0, _CLOSE[0] / picture.width)
    small = tuple(max(1, round(side * scale)) for side in picture.size)
    return page_uri(picture.resize(small, Image.LANCZOS) if scale < 1 else picture)


def _drawn(
    image: Image.Image,
    entry: dict,
    values: Sequence[float] | None,
    top: float,
    window: Window | None = None,
) -> Image.Image:
    if values is not None:
        warm = np.maximum(np.asarray(values, dtype=float), 0.0)
        window = window or (0, 0, *image.size)
        image.paste(heated(image, entry["rects"], warm, top, window), window[:2])
    outline(image, entry)
    return image


def _window(entry: dict, size: tuple[int, int]) -> Window | None:
    """Pixel edges around the targets with some room, at least `_CLOSE`; None: nearly everything."""
    corners = [(x, y) for x0, y0, x1, y1 in entry["boxes"] for x, y in ((x0, y0), (x1, y1))]
    corners += [tuple(point) for point in entry["points"]]
    corners += [tuple(p) for path in (*entry["polygons"], *entry["polylines"]) for p in path]
    if not corners:
        return None
    edges = []
    for along, whole, least in zip(zip(*corners), size, _CLOSE):
        low, high = (min(max(edge, 0.0), 1.0) * whole for edge in (min(along), max(along)))
        length = min(whole, max(least, round(1.2 * (high - low))))
        start = min(max(0, round((low + high - length) / 2)), whole - length)
        edges.append((start, start + length))
    (x0, x1), (y0, y1) = edges
    if (x1 - x0) * (y1 - y0) > _APART * size[0] * size[1]:
        return None
    return x0, y0, x1, y1


def data_uri(image: Image.Image) -> str:
    """The image as PNG in the form that goes into a page's `src`."""
    return _uri(image, "PNG", optimize=True)


def page_uri(image: Image.Image, *, quality: int = 82) -> str:
    """The same, but a large picture as WebP of a quality up to 100: text takes a third of PNG."""
    if image.width * image.height <= _EXACT:
        return data_uri(image)
    return _uri(image, "WEBP", quality=quality)


def _uri(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def heated(
    image: Image.Image,
    rects: Sequence[Sequence[float]],
    values: np.ndarray,
    top: float,
    window: Window | None = None,
) -> Image.Image:
    """An image with a heat map over it, under which its text stays readable.

    The image is grey, so that colour means heat. Heat keeps light and dark: paper turns yellow to
    red, ink dark red. It covers by its value; where that is 0, a pixel is as light as it was.

    Where rectangles overlap (tiles and a global view), their values add up, each spread over its
    own area: a value counts in full on a rectangle of the median area.

    Args:
        image: RGB.
        rects: [n] rectangles in fractions of the image.
        values: [n], drawn in yellow to red above 0 and in blue below.
        top: the magnitude drawn darkest.
        window: the part to return; None: all of it.
    """
    width, height = image.size
    heat = np.zeros((height, width))
    areas = [max(1e-12, (x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in rects]
    usual = float(np.median(areas)) if areas else 1.0
    for (x0, y0, x1, y1), area, value in zip(rects, areas, values):
        rows = slice(max(0, round(y0 * height)), max(0, round(y1 * height)))
        heat[rows, max(0, round(x0 * width)) : max(0, round(x1 * width))] += value * usual / area
    x0, y0, x1, y1 = window or (0, 0, width, height)
    heat = np.clip(heat[y0:y1, x0:x1] / max(top, 1e-12), -1, 1)
    grey = image.crop((x0, y0, x1, y1)).convert("L")
    return Image.fromarray(_tinted(np.asarray(grey, dtype=float), heat))


def _tinted(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Grey pixels [H, W] in 0..255 under heat [H, W] in -1..1: uint8 [H, W, 3]."""
    grey, size = grey[..., None], np.abs(heat)
    tone = _tone(grey / 255, size, "YlOrRd")
    if (heat < 0).any():
        tone = np.where(heat[..., None] >= 0, tone, _tone(grey / 255, size, "Blues"))
    alpha = 0.9 * size[..., None] ** 0.75
    return np.rint(grey * (1 - alpha) + tone * alpha).clip(0, 255).astype(np.uint8)


def _tone(lightness: np.ndarray, size: np.ndarray, name: str) -> np.ndarray:
    """The heat's two tones [H, W, 3], mixed by how light each pixel [H, W, 1] is."""
    light = matplotlib.colormaps[name](0.15 + 0.45 * size)[..., :3] * 255
    dark = np.array(_DARK[name]) * size[..., None]
    return dark + (light - dark) * lightness


def colour_scale(steps: int = 9) -> list[str]:
    """Heat from 0 to the top on white paper, as colours of the page."""
    colours = _tinted(np.full((1, steps), 255.0), np.linspace(0, 1, steps)[None])[0]
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours]


def outline(image: Image.Image, entry: dict) -> None:
    """Draw a sample's boxes, points, polygons and polylines (fractions) on an image.

    A box is drawn around what it holds, so that the smallest text in it stays readable.
    """
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for grow, colour, line in ((5, "white", 4), (4, _TARGET, 2)):
        for x0, y0, x1, y1 in entry["boxes"]:
            corners = [x0 * width - grow, y0 * height - grow, x1 * width + grow, y1 * height + grow]
            draw.rectangle(_inside(corners, image.size), outline=colour, width=line)
        for x, y in entry["points"]:
            x, y, radius = x * width, y * height, 5 + grow
            draw.ellipse(
                [x - radius, y - radius, x + radius, y + radius], outline=colour, width=line
            )
        closed = [[*polygon, polygon[0]] for polygon in entry["polygons"]]
        for path in (*closed, *entry["polylines"]):
            corners = [(x * width, y * height) for x, y in path]
            draw.line(corners, fill=colour, width=line, joint="curve")


def _inside(corners: list[float], size: tuple[int, int]) -> list[float]:
    x0, y0, x1, y1 = corners
    return [max(x0, 0), max(y0, 0), min(x1, size[0] - 1), min(y1, size[1] - 1)]


def loss_curves(runs: dict[str, list[dict]], term: str) -> str:
    """Inline SVG of one logged term over the steps, one line per run that has it.

    The same term on held-out samples is dashed.

    Args:
        runs: rows of metrics.jsonl by the run's name, in drawing order.
        term: a key of the rows, without `eval_`.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": term, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for (name, rows), colour in zip(runs.items(), SERIES):
            for key, line in ((term, "-"), (f"eval_{term}", "--")):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    how = {"marker": "o" if len(points) == 1 else None, "linestyle": line}
                    axes.plot(*zip(*points), color=colour, linewidth=1.8, label=name, **how)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(colors=_TEXT, labelsize=8, length=0)
        axes.set_xlabel("step", color=_TEXT, fontsize=8)
        axes.grid(color=_TEXT, alpha=0.15, linewidth=0.6)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _for_page(buffer.getvalue())


def _for_page(svg: str) -> str:
    """The <svg> element alone, sized by the page, in the page's font and text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # keeps markers and clip paths
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return svg.replace(_TEXT, "currentColor").strip()


def _from_data_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
