"""A card to draw on: boxes, cells, arrows and text in tenths of an inch, saved as the same bytes.

Text becomes paths, so that a figure looks the same wherever it is shown, and the card has a light
ground of its own, so that it reads on dark pages too. Colours are those of Okabe and Ito, which
people who are colour-blind tell apart; what a colour says is also written, or drawn by a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

Point = tuple[float, float]

INK, MUTED, PALE = "#23211d", "#6d6a62", "#d9d5ca"
CARD = "#fbfaf6"
ROW, ALLOWED, SHARED = "#D55E00", "#009E73", "#0072B2"
TEXT_TOKEN, VISUAL_TOKEN, ANSWER_TOKEN = "#e6e3db", "#c5e1f4", "#fbe3a6"
NONE = "none"
WIDTH = 72.0  # tenths of an inch

STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "groundkern",
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
}


class Canvas:
    """A card of `WIDTH` x `height`, y upwards, with a title at its top left."""

    def __init__(self, height: float, title: str) -> None:
        self.height = height
        with plt.rc_context(STYLE):
            self.figure = plt.figure(figsize=(WIDTH / 10, height / 10), facecolor=NONE)
            self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(0, height)
        self.axes.axis("off")
        self.box(0.3, 0.3, WIDTH - 0.6, height - 0.6, fill=CARD, edge=PALE, round=1.2, z=0)
        self.text(2.2, height - 3.1, title, size=11, bold=True, align="left")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 8.5,
        colour: str = INK,
        align: str = "center",
        bold: bool = False,
        mono: bool = False,
        rotate: float = 0,
        plate: bool = False,
    ) -> None:
        """Text whose middle is at y, lines separated by \\n; with a plate behind it on pictures."""
        behind = {"facecolor": CARD, "edgecolor": NONE, "pad": 0.8, "alpha": 0.85}
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=colour,
            ha=align,
            va="center",
            weight="bold" if bold else "normal",
            family="DejaVu Sans Mono" if mono else "DejaVu Sans",
            rotation=rotate,
            linespacing=1.5,
            bbox=behind if plate else None,
            zorder=6,
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = NONE,
        edge: str = INK,
        line: float = 0.8,
        round: float = 0,
        dash: bool = False,
        z: float = 2,
    ) -> None:
        """A rectangle from its lower left corner."""
        style = {
            "facecolor": fill,
            "edgecolor": edge,
            "linewidth": line,
            "linestyle": (0, (3, 2)) if dash else "-",
            "zorder": z,
        }
        if round:
            shape = f"round,pad=0,rounding_size={round}"
            patch = FancyBboxPatch((x, y), width, height, boxstyle=shape, **style)
        else:
            patch = Rectangle((x, y), width, height, **style)
        self.axes.add_patch(patch)

    def line(
        self, *points: Point, colour: str = INK, width: float = 1.0, dash: bool = False
    ) -> None:
        """A line through the points."""
        style = (0, (3, 2)) if dash else "-"
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=colour, linewidth=width, linestyle=style, zorder=4)

    def arrow(
        self, start: Point, end: Point, *, colour: str = INK, width: float = 1.1, bend: float = 0
    ) -> None:
        """An arrow that ends at `end`, bent to its left by `bend` of its length."""
        patch = FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=3.2,head_width=1.7",
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            linewidth=width,
            shrinkA=0,
            shrinkB=0,
            mutation_scale=1.25,
            zorder=5,
        )
        self.axes.add_patch(patch)

    def polygon(self, points: Sequence[Point], *, fill: str, edge: str = NONE) -> None:
        """A filled polygon."""
        self.axes.add_patch(Polygon(points, closed=True, facecolor=fill, edgecolor=edge, zorder=2))

    def ellipse(self, x: float, y: float, width: float, height: float, *, fill: str) -> None:
        """A filled ellipse about its centre."""
        self.axes.add_patch(Ellipse((x, y), width, height, facecolor=fill, zorder=2))

    def cross(self, x: float, y: float, width: float, height: float) -> None:
        """Strikes a rectangle out."""
        self.line((x, y), (x + width, y + height), colour=ROW, width=1.4)
        self.line((x, y + height), (x + width, y), colour=ROW, width=1.4)

    def save(self, path: Path) -> None:
        """Writes the figure; an SVG does not say when and by what."""
        kind = path.suffix[1:]
        options = {"metadata": {"Date": None, "Creator": None}} if kind == "svg" else {"dpi": 150}
        with plt.rc_context(STYLE):
            self.figure.savefig(path, format=kind, **options)
        plt.close(self.figure)
