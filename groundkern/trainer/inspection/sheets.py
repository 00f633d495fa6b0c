"""The frames that are taken of a video, side by side, with what is known of each drawn over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from groundkern.hf.data.example import Region
from groundkern.hf.data.video import Video
from groundkern.trainer.drawing.pages import load_font
from groundkern.trainer.inspection.views import Rect, View

LONGEST = 320  # pixels of a frame's longer side
GAP, STRIP, TEXT = 6, 20, 14  # pixels between frames, below each for its time, and of that text
WIDEST = 1280  # pixels of a sheet


@dataclass(frozen=True)
class Cell:
    """Where a frame is on a sheet.

    Args:
        time: when it is shown, in seconds.
        left, top, width, height: in units of the sheet.
    """

    time: float
    left: int
    top: int
    width: int
    height: int

    def point(self, x: float, y: float) -> tuple[float, float]:
        """A point in fractions of the frame, in units of the sheet."""
        return round(self.left + x * self.width, 1), round(self.top + y * self.height, 1)

    def box(self, box: Rect) -> Rect:
        """A box likewise: x, y, width, height."""
        (x0, y0), (x1, y1) = self.point(*box[:2]), self.point(*box[2:])
        return x0, y0, round(x1 - x0, 1), round(y1 - y0, 1)


def sheet_of(video: Video, number: int) -> tuple[View, list[Cell], Image.Image]:
    """A view of all frames of a video, where each of them is, and the picture.

    Args:
        video: its frames.
        number: which video of the sample.
    """
    size = video.frames[0].size
    scale = min(2.0, LONGEST / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    wide, high = width + GAP, height + STRIP + GAP
    columns = min(len(video.frames), max(1, WIDEST // wide), _square(len(video.frames), wide, high))
    rows = math.ceil(len(video.frames) / columns)
    picture = Image.new("RGB", (columns * wide + GAP, rows * high + GAP), "white")
    draw, font = ImageDraw.Draw(picture), load_font("DejaVu Sans", TEXT)
    cells = []
    for index, (frame, time) in enumerate(zip(video.frames, video.times, strict=True)):
        row, column = divmod(index, columns)
        cell = Cell(time, GAP + column * wide, GAP + row * high, width, height)
        picture.paste(frame.resize((width, height), Image.BILINEAR), (cell.left, cell.top))
        draw.text((cell.left, cell.top + height + 2), f"{time:.2f} s", font=font, fill="black")
        cells.append(cell)
    rate = f" of a video of {video.fps:g} a second" if video.fps else ""
    caption = f"video {number}: {len(cells)} frames{rate}, {size[0]} x {size[1]} pixels"
    return View(*picture.size, caption), cells, picture


def regions_at(region: Region, video: Video, cells: list[Cell]) -> Iterator[tuple[Cell, Region]]:
    """Those of the frames in `cells` in which a region of a video holds, and its shapes there."""
    from groundkern.hf.data.moments import moments_of  # here: it is on torch

    there = {cell.time: cell for cell in cells}
    for moment in moments_of([region], video):
        if moment.time in there:
            yield there[moment.time], replace(region, tracks=(), **moment.shapes)


def _square(count: int, width: int, height: int) -> int:
    """Columns that make a sheet about as wide as high."""
    return max(1, round(math.sqrt(count * height / width)))
