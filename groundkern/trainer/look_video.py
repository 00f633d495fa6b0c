"""Maps of an answer over the frames of a video: a contact sheet, and an animation of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from PIL import Image
from torch import Tensor

from groundkern import maps_in_time
from groundkern.hf import Region, Video
from groundkern.hf.data.moments import SHAPES, moments_of
from groundkern.maps_in_time import Moment
from groundkern.rasters import Raster
from groundkern.targets.bells import outlines_of
from groundkern.trainer.data.record import VideoRecord
from groundkern.trainer.data.videos import VideoRules, find_videos
from groundkern.trainer.looks import MAPS, Looks, scores
from groundkern.trainer.outlines import outlines
from groundkern.trainer.pictures import full_scale, heated, outline
from groundkern.trainer.sheet import Sheet
from groundkern.trainer.visual_places import shown_at

COLUMNS = 6  # of a contact sheet
ALL, LARGEST = 9_000_000, 130_000  # pixels of all pictures of a sheet, and of one at most
SHORTEST = 20  # milliseconds of an animation's frame: browsers show a shorter one for 100

Box = tuple[float, float, float, float]


def clip_of(path: Path, rules: VideoRules) -> Video:
    """The frames that are taken of a video.

    Args:
        path: a file, or a folder of frames, which were taken `rules.fps` a second.
        rules: which frames; of a folder all, evenly, up to the most.

    Raises:
        SampleError: it cannot be used.
    """
    path = path.resolve()
    record = VideoRecord(path=path.name, fps=rules.fps)
    if path.is_dir():
        rules = replace(rules, fps=None)
    return find_videos([record], root=path.parent, rules=rules, where=f"{path}")[0].load()


@dataclass(frozen=True)
class Clip:
    """A video, and what the answer speaks of.

    Args:
        video: its frames.
        boxes, rasters: in every frame of the time.
        time: seconds, the second exclusive; None: all of it.
    """

    video: Video
    boxes: tuple[Box, ...] = ()
    rasters: tuple[Raster, ...] = ()
    time: tuple[float, float] | None = None

    def on(self, looks: Looks) -> Tensor | None:
        """bool [C]: the visual tokens that the target covers; None if nothing was given."""
        if not (self.boxes or self.rasters or self.time):
            return None
        return maps_in_time.inside(looks.rects, looks.times, self._moments)

    def pictures(
        self, looks: Looks, tokens: list[int], layers: list[int], on: Tensor | None
    ) -> Iterator[tuple[str, bytes]]:
        """What is drawn, each with the suffix of its file: .png, .webp and .gif.

        Args:
            looks: of the answer.
            tokens: those that count.
            layers: these too.
            on: of `on`.
        """
        over = {name: looks.over(name, tokens, layers) for name in MAPS}
        said = "".join(looks.tokens[token] for token in tokens)
        captions = {name: _captions(name, values, on) for name, values in over.items()}
        heats = {name: self._heats(looks, values) for name, values in over.items()}
        yield ".png", _encoded([self._sheet(heats, captions, said)], "PNG")
        frames = self._animated(heats, captions, said)
        steps = pairwise(self.video.steps)
        lengths = [max(SHORTEST, round(1000 * (end - start))) for start, end in steps]
        yield ".webp", _encoded(frames, "WEBP", duration=lengths, quality=80, method=2)
        yield ".gif", _encoded(frames, "GIF", duration=lengths)

    @cached_property
    def _moments(self) -> list[Moment]:
        shapes = {"boxes": self.boxes, "rasters": self.rasters}
        region = Region(0, 0, 1, -1, video=0, time=self.time, **shapes)
        return moments_of([region], self.video)

    @cached_property
    def _frames(self) -> list[Image.Image]:
        """The frames as they are drawn: larger or smaller than they are."""
        width, height = self.video.frames[0].size
        area = min(LARGEST, ALL // (len(MAPS) * len(self.video.frames)))
        scale = (area / (width * height)) ** 0.5
        size = tuple(max(1, round(side * scale)) for side in (width, height))
        return [frame.resize(size, Image.LANCZOS) for frame in self.video.frames]

    def _heats(self, looks: Looks, values: Tensor) -> list[Image.Image]:
        """A map over every frame, all on one scale."""
        top, found = full_scale([values.abs().tolist()]), []
        for frame, time in zip(self._frames, self.video.times, strict=True):
            here = shown_at(looks.times, time)
            picture = heated(frame, looks.rects[here].tolist(), values[here].numpy(), top)
            for moment in self._moments:
                if moment.time == time:
                    outline(picture, _drawn(moment))
            found.append(picture)
        return found

    def _sheet(
        self, heats: dict[str, list[Image.Image]], captions: dict[str, list[str]], said: str
    ) -> Image.Image:
        """All frames under each map, one map below the other."""
        columns = min(COLUMNS, len(self._frames))
        rows = -(-len(self._frames) // columns)
        lines = max(map(len, captions.values()))
        sheet = Sheet(self._frames[0].size, columns, rows * len(MAPS), title=said, lines=lines)
        for number, (name, pictures) in enumerate(heats.items()):
            for index, (picture, time) in enumerate(zip(pictures, self.video.times, strict=True)):
                row, column = divmod(index, columns)
                caption = [f"{captions[name][0]}, {time:.2f} s"]
                caption += captions[name][1:] if index == 0 else []
                sheet.add(picture, caption, number * rows + row, column)
        return sheet.image

    def _animated(
        self, heats: dict[str, list[Image.Image]], captions: dict[str, list[str]], said: str
    ) -> list[Image.Image]:
        """The three maps side by side, frame after frame."""
        lines, found = max(map(len, captions.values())), []
        for index, time in enumerate(self.video.times):
            sheet = Sheet(self._frames[0].size, len(MAPS), 1, title=said, lines=lines)
            for column, (name, pictures) in enumerate(heats.items()):
                caption = [f"{captions[name][0]}, {time:.2f} s", *captions[name][1:]]
                sheet.add(pictures[index], caption, 0, column)
            found.append(sheet.image)
        return found


def _captions(name: str, values: Tensor, on: Tensor | None) -> list[str]:
    caption = [name]
    if name == "contribution":
        caption[0] += f" {values.sum():+.2f}"
    if on is not None:
        found = scores(values, name, on)
        caption.append("  ".join(f"{key} {value:.2f}" for key, value in found.items()))
    return caption


def _drawn(moment: Moment) -> dict[str, list]:
    """The shapes of a moment as `pictures.outline` takes them."""
    shapes = {kind: list(moment.shapes.get(kind, ())) for kind in SHAPES}
    shapes["polygons"] += outlines_of(shapes.pop("bells"))
    shapes["polylines"] += [line for raster in shapes.pop("rasters") for line in outlines(raster)]
    return shapes


def _encoded(frames: list[Image.Image], form: str, **options: int | list[int]) -> bytes:
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:], "loop": 0} if form != "PNG" else {}
    frames[0].save(buffer, form, **more, **options)
    return buffer.getvalue()
