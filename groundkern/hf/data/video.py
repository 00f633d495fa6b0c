"""A video as the frames that were sampled of it, and boxes that move over its frames."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING

from groundkern.messages import require
from groundkern.rasters import Raster

if TYPE_CHECKING:
    from PIL import Image

SAME = 1e-3
"""Seconds by which two times may differ that are the same: rates and times are often rounded."""

Track = tuple[tuple[float, tuple[float, float, float, float]], ...]
"""(seconds, (x0, y0, x1, y1)) at some times, ascending. Between two of them the box moves straight;
before the first and after the last there is nothing."""

RasterTrack = tuple[tuple[float, Raster | None], ...]
"""(seconds, mask or heat, or None where there is nothing) at some times, ascending. Each holds
until the next one's time; before the first there is nothing."""


@dataclass(frozen=True)
class Video:
    """The frames that were sampled of a video.

    Args:
        frames: upright RGB images of one size, one at least.
        times: when each frame was taken, in seconds of the source, ascending.
        fps: the frames per second of the source; None: not known.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    fps: float | None = None

    @property
    def steps(self) -> tuple[float, ...]:
        """When each frame begins, and when the last one ends: a frame lasts until the next one, the
        last as long as the one before it (a single one: as its `fps` says, or a second)."""
        last = 1 / (self.fps or 1.0)
        if len(self.times) > 1:
            last = self.times[-1] - self.times[-2]
        return (*self.times, self.times[-1] + last)

    @property
    def spacing(self) -> float:
        """Seconds from one frame to the next, on average."""
        steps = self.steps
        frames = max(1, len(self.times) - 1)
        return (steps[frames] - steps[0]) / frames

    def check(self, where: str) -> None:
        """Check frames and times.

        Args:
            where: what error messages call this video.

        Raises:
            ValueError: no frame, frames of several sizes, another number of times, times that do
                not ascend, or a rate that is not above 0.
        """
        require(len(self.frames) > 0, f"{where}.frames", "one frame at least", "none")
        sizes = sorted({frame.size for frame in self.frames})
        require(len(sizes) == 1, f"{where}.frames", "frames of one size", sizes)
        count = len(self.frames)
        wanted = f"one time for each of {count} frames"
        require(len(self.times) == count, f"{where}.times", wanted, len(self.times))
        _check_ascending(f"{where}.times", self.times)
        known = self.fps is None or (isfinite(self.fps) and self.fps > 0)
        require(known, f"{where}.fps", "a number above 0 or None", self.fps)

    def frames_within(self, start: float, stop: float) -> list[int]:
        """The frames that were taken in a time; if there is none, the one that lasts then.

        Args:
            start, stop: seconds, `stop` exclusive.

        Returns:
            Their indices; none if the time is before the first frame or after the last one ends.
        """
        early, late = start - SAME, start + SAME
        found = [i for i, time in enumerate(self.times) if early <= time < stop - SAME]
        steps = self.steps
        if not found and steps[0] <= late < steps[-1]:
            found = [bisect_right(self.times, late) - 1]
        return found


def box_at(track: Track, time: float) -> tuple[float, float, float, float] | None:
    """Where a track's box is at a time; None: before its first box or after its last.

    Args:
        track: boxes that move.
        time: seconds of the video.
    """
    times = [at for at, _ in track]
    if not times[0] - SAME <= time <= times[-1] + SAME:
        return None
    time = min(max(time, times[0]), times[-1])
    before = max(bisect_right(times, time) - 1, 0)
    behind = min(before + 1, len(track) - 1)
    (t0, low), (t1, high) = track[before], track[behind]
    part = 0.0 if t1 == t0 else (time - t0) / (t1 - t0)
    x0, y0, x1, y1 = (a + (b - a) * part for a, b in zip(low, high, strict=True))
    return x0, y0, x1, y1


def raster_at(track: RasterTrack, time: float) -> Raster | None:
    """The mask or heat of a time; None: before the first, or where there is nothing.

    Args:
        track: a mask or heat that changes.
        time: seconds of the video.
    """
    index = bisect_right([at for at, _ in track], time + SAME) - 1
    return track[index][1] if index >= 0 else None


def check_time(where: str, time: tuple[float, float]) -> None:
    """Check the time of a region.

    Raises:
        ValueError: not two finite numbers, the first below the second.
    """
    fits = len(time) == 2 and all(map(isfinite, time)) and time[0] < time[1]
    require(fits, where, "[t0, t1] in seconds, t0 < t1", time)


def check_tracks(where: str, tracks: tuple[Track, ...]) -> None:
    """Check the times of tracks.

    Raises:
        ValueError: a track without boxes, or whose times do not ascend.
    """
    for index, track in enumerate(tracks):
        require(len(track) > 0, f"{where}[{index}]", "one box at least", "none")
        _check_ascending(f"{where}[{index}]", tuple(time for time, _ in track))


def check_raster_track(where: str, track: RasterTrack) -> None:
    """Check the times and kinds of a mask or heat that changes.

    Raises:
        ValueError: times that do not ascend, or something else than a `Raster` or None.
    """
    _check_ascending(where, tuple(time for time, _ in track))
    kinds = all(raster is None or isinstance(raster, Raster) for _, raster in track)
    require(kinds, where, "each a `Raster` or None", "something else")


def _check_ascending(where: str, times: tuple[float, ...]) -> None:
    ascend = all(map(isfinite, times)) and all(a < b for a, b in pairwise(times))
    require(ascend, where, "seconds that ascend", times)
