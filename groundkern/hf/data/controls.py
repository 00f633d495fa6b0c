"""Regions made wrong on purpose: what a run is compared with that says the right regions matter.

"shuffled": the places of another sample's regions, drawn without a look at the own ones, so that
they keep what regions have in common (size, position, shape) and say nothing of this sample.
"random": the own places, moved together to a place of the same image, and of the same time of its
video, that is drawn evenly among those where they fit. "complement" is made of sets of visual
tokens (`regions`): those of the image that the region does not cover.

What is drawn follows from the sample's name, text and regions and from a seed alone. So epochs,
worker processes, ranks and continued runs agree, and a model can learn a control by heart: one that
changed in every epoch would average to the same map everywhere.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from groundkern.checks import fail
from groundkern.hf.data.example import Box, GroundedExample, Region, message_text
from groundkern.hf.data.moments import SHAPES
from groundkern.hf.data.video import Track
from groundkern.rasters import Raster

CONTROLS = ("shuffled", "random", "complement")
PLACES = (*SHAPES, "time", "tracks", "raster_track")
"""The fields of a `Region` that a control changes; its words, and what they count for, stay."""
_TRIES = 64  # samples of a pool that are asked for a region of an image, or of a video
Span = tuple[float, float]


@dataclass(frozen=True)
class SampleRegions:
    """The regions of a sample that may be given to others.

    Args:
        key: of `key_of`.
        regions: all of its regions.
        spans: the seconds from which and up to which each of its videos runs.
    """

    key: bytes
    regions: tuple[Region, ...]
    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, example: GroundedExample) -> SampleRegions:
        """Those of an example.

        Args:
            example: its images are not looked at.

        Returns:
            Its regions, by a key that tells it from others.
        """
        spans = tuple((video.steps[0], video.steps[-1]) for video in example.videos)
        key = key_of(example.name, example.messages, example.regions)
        return cls(key, example.regions, spans)


def key_of(name: str, messages: Sequence[dict[str, Any]], regions: Sequence[Region]) -> bytes:
    """What tells a sample from others, the same in every process.

    Args:
        name, messages, regions: of a `GroundedExample`.
    """
    kinds = [kind for kind in PLACES if kind not in ("rasters", "raster_track")]  # pixels
    shapes = [[getattr(r, kind) for kind in kinds] for r in regions]
    words = [(r.turn, r.start, r.stop, r.image, r.video) for r in regions]
    texts = [message_text(message) for message in messages]
    return hashlib.sha256(repr((name, texts, words, shapes)).encode()).digest()


class Controls:
    """Makes the regions of samples wrong.

    Args:
        pool: of "shuffled": `SampleRegions`, or None for a sample that has none after all.
        seed: of what is drawn.
    """

    def __init__(self, pool: Sequence[SampleRegions | None] | None, seed: int) -> None:
        self.pool: Sequence[SampleRegions | None] | None = pool
        self.seed: int = seed

    def applied(self, example: GroundedExample, control: str | None) -> GroundedExample:
        """The example with its regions under a control; itself if that changes no shapes.

        Args, Raises: as `regions`; "complement" and None change none.
        """
        if control in (None, "complement") or not example.regions:
            return example
        return replace(example, regions=self.regions(example, control))

    def regions(self, example: GroundedExample, control: str) -> tuple[Region, ...]:
        """The regions of an example under a control, in their order.

        Regions of equal places get equal ones.

        Args:
            example: as the collator is given it.
            control: "shuffled" or "random".

        Raises:
            ValueError: the pool has no regions of another sample, on an image or in a video as the
                own ones are.
        """
        key = key_of(example.name, example.messages, example.regions)
        made: list[tuple[tuple[object, ...], Region]] = []
        numbers = {False: 0, True: 0}  # distinct places of images, and of videos
        found = []
        for region in example.regions:
            places = region.image, region.video, *(getattr(region, kind) for kind in PLACES)
            known = next((new for own, new in made if own == places), None)
            if known is None:
                film = region.video is not None
                span = None
                if region.video is not None:
                    video = example.videos[region.video]
                    span = video.steps[0], video.steps[-1]
                if control == "random":
                    draw = self._draw(key, len(made))
                    known = _moved(region, span, draw)
                else:
                    known = self._anothers(example, region, span, key, numbers[film])
                    numbers[film] += 1
                made.append((places, known))
            found.append(replace(region, **{kind: getattr(known, kind) for kind in PLACES}))
        return tuple(found)

    def _draw(self, key: bytes, number: int = 0) -> random.Random:
        digest = hashlib.sha256(repr((self.seed, key, number)).encode()).digest()
        return random.Random(int.from_bytes(digest[:8], "big"))

    def _anothers(
        self, example: GroundedExample, region: Region, span: Span | None, key: bytes, number: int
    ) -> Region:
        """The region of another sample; all regions of a sample get them of the same one."""
        pool = self.pool or ()
        start = self._draw(key).randrange(max(1, len(pool)))
        for step in range(min(_TRIES, len(pool))):
            other = pool[(start + step) % len(pool)]
            if other is None or other.key == key:
                continue
            alike = [r for r in other.regions if (r.video is None) == (region.video is None)]
            if alike:
                chosen = alike[number % len(alike)]
                return chosen if span is None else _in_span(chosen, other.spans, span)
        kind = "an image" if region.video is None else "a video"
        name = example.name or "example"
        return fail(f"{name}: control_pool", f"a region on {kind} of another sample", "none")


def _in_span(region: Region, spans: tuple[Span, ...], span: Span) -> Region:
    """A region of one video at the same part of another one."""
    assert region.video is not None
    (first, last), (start, stop) = spans[region.video], span
    rate = (stop - start) / max(last - first, 1e-9)

    def at(time: float) -> float:
        return start + (time - first) * rate

    return _at_times(region, at)


def _at_times(region: Region, at: Callable[[float], float]) -> Region:
    tracks = tuple(tuple((at(time), box) for time, box in track) for track in region.tracks)
    rasters = tuple((at(time), raster) for time, raster in region.raster_track)
    time = None if region.time is None else (at(region.time[0]), at(region.time[1]))
    return replace(region, time=time, tracks=tracks, raster_track=rasters)


def _moved(region: Region, span: Span | None, draw: random.Random) -> Region:
    """The places of a region, all by one way, so that they stay in the image and the video.

    A heat moves by what it has at half of its maximum or more; what leaves at an edge comes back at
    the opposite one.
    """
    x0, y0, x1, y1 = _bounds(region)
    dx, dy = draw.uniform(-x0, 1.0 - x1), draw.uniform(-y0, 1.0 - y1)

    def point(p: tuple[float, float]) -> tuple[float, float]:
        return _within(p[0] + dx), _within(p[1] + dy)

    def box(b: Box) -> Box:
        return (*point(b[:2]), *point(b[2:]))

    def rolled(raster: Raster) -> Raster:
        return _rolled(raster, dx, dy)

    def track(steps: Track) -> Track:
        return tuple((time, box(b)) for time, b in steps)

    moved = replace(
        region,
        boxes=tuple(map(box, region.boxes)),
        points=tuple(map(point, region.points)),
        bells=tuple((*point(bell[:2]), *bell[2:]) for bell in region.bells),
        polygons=tuple(tuple(map(point, line)) for line in region.polygons),
        polylines=tuple(tuple(map(point, line)) for line in region.polylines),
        rasters=tuple(map(rolled, region.rasters)),
        tracks=tuple(map(track, region.tracks)),
        raster_track=tuple(
            (time, raster and rolled(raster)) for time, raster in region.raster_track
        ),
    )
    tracks = *region.tracks, region.raster_track
    times = region.time or [time for steps in tracks for time, _ in steps]
    if span is None or not times:
        return moved
    first, last = max(min(times), span[0]), min(max(times), span[1])
    later = draw.uniform(min(span[0] - first, 0.0), max(span[1] - last, 0.0))
    return _at_times(moved, lambda time: time + later)


def _bounds(region: Region) -> tuple[float, float, float, float]:
    """The smallest box around all places; the whole image if there are none."""
    boxes: list[tuple[float, ...]] = [
        *region.boxes,
        *(b for steps in region.tracks for _, b in steps),
    ]
    rasters = *region.rasters, *(raster for _, raster in region.raster_track if raster)
    boxes += [(raster.mask() or raster).bounds() for raster in rasters]
    boxes += [
        (*map(_within, (x - sx, y - sy)), *map(_within, (x + sx, y + sy)))
        for x, y, sx, sy in region.bells
    ]
    boxes += [p * 2 for p in region.points]
    boxes += [p * 2 for line in (*region.polygons, *region.polylines) for p in line]
    if not boxes:
        return 0.0, 0.0, 1.0, 1.0
    x0, y0, x1, y1 = zip(*boxes)
    return min(x0), min(y0), max(x1), max(y1)


def _rolled(raster: Raster, dx: float, dy: float) -> Raster:
    height, width = raster.values.shape
    by = round(dy * height), round(dx * width)
    return replace(raster, values=torch.roll(raster.values, by, (0, 1)))


def _within(x: float) -> float:
    return min(max(x, 0.0), 1.0)
