"""Pictures of the report as strings that go straight into HTML: heat maps and loss curves."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

SERIES = ("#e8590c", "#1c7ed6", "#868e96")  # this run, the run beside it: legible on light and dark
_TEXT = "#010203"  # replaced by the page's own text colour until the SVG is written
_TARGET = (0, 190, 255)
_SIDE = 420  # pixels of the longer side of a heat map


def full_scale(maps: Sequence[Sequence[float]]) -> float:
    """The value drawn darkest in all of these maps: their maximum, at least 4 times a map's mean.

    One scale makes several maps comparable; the floor keeps an even map pale.
    """
    positive = [np.maximum(np.asarray(values, dtype=float), 0.0) for values in maps]
    return max((max(v.max(), 4 * v.mean()) for v in positive if v.size), default=0.0)


def heat_picture(entry: dict, values: Sequence[float] | None, top: float = 1.0) -> str:
    """A sample's image with a heat map over it and its target outlined, as a data URI.

    Args:
        entry: one entry of `trainer.heatmaps.heat_maps`.
        values: one number per rectangle of the entry, from 0 (clear) to `top` (dark red); None
            draws the target on the image as it is.
        top: the value drawn darkest, of `full_scale`.
    """
    image = _from_data_uri(entry["image"])
    scale = _SIDE / max(image.size)
    image = image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.LANCZOS)
    if values is not None:
        warm = np.maximum(np.asarray(values, dtype=float), 0.0)
        image = heated(image, entry["rects"], warm, top)
    outline(image, entry)
    return data_uri(image)


def data_uri(image: Image.Image) -> str:
    """The image as PNG in the form that goes into a page's `src`."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def heated(
    image: Image.Image, rects: Sequence[Sequence[float]], values: np.ndarray, top: float
) -> Image.Image:
    """An image with a heat map over it.

    Where rectangles overlap (tiles and a global view), their values add up, each spread over its
    own area: a value counts in full on a rectangle of the median area.

    Args:
        image: RGB.
        rects: [n] rectangles in fractions of the image.
        values: [n], drawn in yellow to red above 0 and in blue below.
        top: the magnitude drawn darkest.
    """
    width, height = image.size
    heat = np.zeros((height, width))
    areas = [max(1e-12, (x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in rects]
    usual = float(np.median(areas)) if areas else 1.0
    for (x0, y0, x1, y1), area, value in zip(rects, areas, values):
        rows = slice(max(0, round(y0 * height)), max(0, round(y1 * height)))
        heat[rows, max(0, round(x0 * width)) : max(0, round(x1 * width))] += value * usual / area
    heat = np.clip(heat / max(top, 1e-12), -1, 1)
    size = np.abs(heat)
    warm, cold = (
        matplotlib.colormaps[name](0.2 + 0.8 * size)[..., :3] for name in ("YlOrRd", "Blues")
    )
    colour = np.where(heat[..., None] >= 0, warm, cold) * 255
    grey = np.asarray(image.convert("L"), dtype=float)[..., None]
    paper = 115 + 0.55 * grey  # pale and without colour of its own, so that colour means heat
    alpha = 0.8 * np.sqrt(size)[..., None]
    return Image.fromarray((paper * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8))


def outline(image: Image.Image, entry: dict) -> None:
    """Draw a sample's boxes, points, polygons and polylines (fractions) on an image."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for grow, colour, line in ((3, "white", 5), (2, _TARGET, 3)):
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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
    svg = re.sub(r' id="(?!p[0-9a-f]{10}")[^"]*"', "", svg)  # keeps what clip-path refers to
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return svg.replace(_TEXT, "currentColor").strip()


def _from_data_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
