"""Videos of a data set: files, or folders of frames; which of their frames a sample takes.

Frames are taken evenly in time. What a header says decides whether a video is taken at all, before
a frame is decoded: its size, its length, its bytes and the pixels of all frames that are taken.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from groundkern.hf.data.video import Video
from groundkern.trainer.data.images import (
    MAX_PIXELS,
    SampleError,
    check_size,
    confined,
    image_size,
    load_rgb,
    wrong,
)
from groundkern.trainer.data.record import VideoRecord
from groundkern.trainer.data.video_files import VideoFile

EXACT = 1e-6  # seconds: what rounding may do to a time
ROUNDED = 0.01  # of a video: annotations end this much behind it where its length was rounded
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")


@dataclass(frozen=True)
class VideoRules:
    """Which frames of a video are taken, and what it may be.

    Args:
        fps: frames for each second of it; None: all there are.
        frames: at most so many.
        max_pixels: width x height x frames of all videos of a sample.
        max_bytes: of a file.
        max_seconds: how long it may be.
    """

    fps: float | None = 2.0
    frames: int = 64
    max_pixels: int = 300_000_000
    max_bytes: int = 4_000_000_000
    max_seconds: float = 14_400.0


RULES = VideoRules()  # where nobody says otherwise


@dataclass(frozen=True)
class StoredVideo:
    """A video whose header was read; its frames are still on disk.

    Args:
        path: the real path of a file or folder.
        size: (width, height) of a frame, upright.
        fps: frames per second of the source; None: not known.
        duration: of the source in seconds.
        rate: frames that are taken of a second; None: all.
        most: at most so many.
        start, end: only frames shown between these are taken, in seconds.
        frames: of a folder: its frames, in their order.
        max_pixels: width x height x frames.
        where, field: what starts an error message.
    """

    path: Path
    size: tuple[int, int]
    fps: float | None
    duration: float
    rate: float | None
    most: int
    start: float
    end: float
    frames: tuple[Path, ...]
    max_pixels: int
    where: str
    field: str

    @property
    def planned(self) -> int:
        """How many frames are taken at most, as far as the header tells."""
        end = min(self.end, self.duration)
        found = len(_targets(self.start, end, self.rate, self.most))
        if self.fps and (end - self.start) * self.fps < found:
            return int((end - self.start) * self.fps) + 1
        return found

    def moment(self, frame: int, field: str) -> tuple[float, float]:
        """When a frame of the source is shown: seconds, the second exclusive.

        Args:
            frame: its index in the source.
            field: what names the index in an error message.

        Raises:
            SampleError: the source has no such frame, or cannot be read.
        """
        seconds, end = self._times
        if frame >= len(seconds):
            wanted = f"a frame of the {len(seconds)} of {self.path.name!r}, from 0"
            raise wrong(self.where, field, wanted, frame)
        behind = seconds[frame + 1] if frame + 1 < len(seconds) else end
        return float(seconds[frame]), float(behind)

    def load(self) -> Video:
        """Decode the frames that are taken.

        Raises:
            SampleError: frames that are damaged, missing, or of several sizes; more of them than
                the header announced, and than are allowed.
        """
        seconds, end = self._times
        stop = min(self.end, end)
        chosen = sampled(seconds, self.start, stop, self.rate, self.most)
        if not chosen:
            wanted = f"a frame between {self.start:g} and {self.end:g} s"
            raise self._wrong(wanted, f"none in {self.path.name!r} of {end:.3f} s")
        check_pixels([(self.size, len(chosen))], self.max_pixels, self.where, self.field)
        if self.frames:
            where = {"where": self.where, "field": self.field}
            frames = [load_rgb(self.frames[index], self.size, **where) for index in chosen]
        else:
            frames = VideoFile(self.path, self.where, self.field).frames(chosen, self.size)
        return Video(tuple(frames), tuple(float(seconds[index]) for index in chosen), self.fps)

    @cached_property
    def _times(self) -> tuple[NDArray, float]:
        """When each frame of the source is shown, and when the last one ends."""
        if self.frames:
            return np.arange(len(self.frames)) / self.fps, len(self.frames) / self.fps
        times = VideoFile(self.path, self.where, self.field).times()
        return times.seconds, times.end

    def _wrong(self, wanted: str, got: object) -> SampleError:
        return wrong(self.where, self.field, wanted, got)


def sampled(seconds: NDArray, start: float, end: float, rate: float | None, most: int) -> list[int]:
    """Which frames of a video are taken: those shown at times that are evenly apart.

    Args:
        seconds: when each frame is shown, ascending.
        start, end: only frames shown between these, the second exclusive.
        rate: frames for a second; None: all.
        most: at most so many.

    Returns:
        Indices, ascending, none twice; empty if no frame is shown in that time.
    """
    low, high = np.searchsorted(seconds, [start - EXACT, end - EXACT], "left").tolist()
    if rate is None and high - low <= most:
        return list(range(low, high))
    if low >= high:
        return []
    targets = _targets(start, end, rate, most)
    shown = np.searchsorted(seconds, targets + EXACT, "right") - 1
    return np.unique(shown.clip(low, high - 1)).tolist()


def find_videos(
    records: Sequence[VideoRecord],
    *,
    root: Path,
    rules: VideoRules,
    max_pixels: int = MAX_PIXELS,
    where: str,
) -> tuple[StoredVideo, ...]:
    """The videos of a sample, whose headers are right.

    Args:
        records: what the sample says of them.
        root: the folder that paths start from and may not leave.
        rules: which frames are taken, and limits.
        max_pixels: width x height that a frame may have.
        where: what starts an error message.

    Raises:
        SampleError: one sentence: not there, no video, no frames, too large, too long, too many
            pixels, times that it does not have.
    """
    found = []
    for index, record in enumerate(records):
        finding = _Finding(record, root, rules, max_pixels, where, f"videos[{index}]")
        found.append(finding.video())
        sizes = [(video.size, video.planned) for video in found]
        check_pixels(sizes, rules.max_pixels, where, finding.field)
    return tuple(found)


def check_pixels(
    videos: Sequence[tuple[tuple[int, int], int]], most: int, where: str, field: str
) -> None:
    """Refuse more pixels than a sample's videos may have together.

    Args:
        videos: (width, height) and frames of each.
        most: pixels.
        where, field: what starts the error message.

    Raises:
        SampleError: they have more.
    """
    pixels = sum(width * height * frames for (width, height), frames in videos)
    if pixels > most:
        (width, height), frames = videos[-1]
        got = f"{pixels} with {frames} frames of {width} x {height}"
        wanted = f"at most {most} pixels in all frames together (`data.video_pixels`)"
        raise wrong(where, field, wanted, got)


def natural(name: str) -> list[tuple[int, int, str]]:
    """What to sort names by, so that `frame_2` comes before `frame_10`."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), p) if p[0] in "0123456789" else (1, 0, p) for p in pieces]


@dataclass(frozen=True)
class _Finding:
    """One video of a record, being looked at."""

    record: VideoRecord
    root: Path
    rules: VideoRules
    max_pixels: int
    where: str
    field: str

    def video(self) -> StoredVideo:
        place = {"where": self.where, "field": self.field, "folder_too": True}
        path, size = confined(self.record.path, self.root, **place), (0, 0)
        if path.is_dir():
            frames, fps, rate = self._frames(path), self.record.fps, self.rules.fps
            duration = len(frames) / fps
        else:
            frames, rate = (), self.record.fps or self.rules.fps
            size, fps, duration = self._header(path)
        if duration > self.rules.max_seconds:
            wanted = f"at most {self.rules.max_seconds:g} seconds (`data.video_seconds`)"
            raise self._wrong("", wanted, f"{duration:.1f} in {path.name!r}")
        start, end = self._window(duration)
        if frames:
            seconds = np.arange(len(frames)) / fps
            chosen = sampled(seconds, start, min(end, duration), rate, self._most)
            size = self._size_of_all([frames[index] for index in chosen] or frames[:1])
        return StoredVideo(
            path=path,
            size=size,
            fps=fps,
            duration=duration,
            rate=rate,
            most=self._most,
            start=start,
            end=end,
            frames=frames,
            max_pixels=self.rules.max_pixels,
            where=self.where,
            field=self.field,
        )

    @property
    def _most(self) -> int:
        return self.record.frames or self.rules.frames

    def _header(self, path: Path) -> tuple[tuple[int, int], float | None, float]:
        """Size, rate and duration of a file."""
        if (size := path.stat().st_size) > self.rules.max_bytes:
            wanted = f"at most {self.rules.max_bytes} bytes (`data.video_bytes`)"
            raise self._wrong("", wanted, f"{size} in {path.name!r}")
        file = VideoFile(path, self.where, self.field)

        def check(size: tuple[int, int]) -> None:
            limit = {"max_pixels": self.max_pixels, "where": self.where, "field": self.field}
            check_size(size, None, path.name, **limit)

        header = file.header(check)
        duration = file.times().end if header.duration is None else header.duration
        return header.size, header.fps, duration

    def _frames(self, folder: Path) -> tuple[Path, ...]:
        """The frames of a folder, in their order."""
        if self.record.fps is None:
            wanted = "how many frames of the folder were taken in a second"
            raise self._wrong(".fps", wanted, "none")
        try:
            names = [entry.name for entry in os.scandir(folder) if not entry.is_dir()]
        except OSError as error:
            raise self._wrong("", "a readable folder", f"{folder.name!r} ({error})") from None
        names = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
        if not names:
            wanted = f"a folder with frames ({', '.join(SUFFIXES)})"
            raise self._wrong("", wanted, f"none in {folder.name!r}")
        names.sort(key=lambda name: (natural(name), name))
        return tuple(folder / name for name in names)

    def _size_of_all(self, frames: Sequence[Path]) -> tuple[int, int]:
        """The one size that frames have, by their headers."""
        size = None
        limit = {"max_pixels": self.max_pixels, "where": self.where, "field": self.field}
        for frame in frames:
            if frame.is_symlink():
                confined(
                    str(frame.relative_to(self.root.resolve())),
                    self.root,
                    where=self.where,
                    field=self.field,
                )
            found = image_size(frame, **limit)
            size = size or found
            if found != size:
                wanted = f"frames of one size, {size[0]} x {size[1]} as {frames[0].name!r} has"
                raise self._wrong("", wanted, f"{found[0]} x {found[1]} in {frame.name!r}")
        return size

    def _window(self, duration: float) -> tuple[float, float]:
        """The seconds between which frames are taken."""
        start, end = self.record.start or 0.0, self.record.end
        if start >= duration:
            raise self._wrong(".start", f"a time below {duration:.3f} s", f"{start:g}")
        if end is None:
            return start, math.inf
        if not start < end:
            raise self._wrong(".end", f"a time behind `start`, {start:g}", f"{end:g}")
        check_end(end, duration, self.where, f"{self.field}.end")
        return start, end

    def _wrong(self, field: str, wanted: str, got: object) -> SampleError:
        return wrong(self.where, self.field + field, wanted, got)


def check_end(end: float, duration: float, where: str, field: str) -> None:
    """Refuse a time that is behind the end of a video, but for the rounding of its length.

    Raises:
        SampleError: it is.
    """
    if end > duration * (1 + ROUNDED) + ROUNDED:
        raise wrong(where, field, f"a time within the {duration:.3f} s of the video", f"{end:g}")


def _targets(start: float, end: float, rate: float | None, most: int) -> NDArray:
    """The times of which the frames are taken; as many as are allowed if there is no rate."""
    length = max(0.0, end - start)
    count = most + 1 if rate is None else max(1, math.ceil(min(length * rate, most + 1) - EXACT))
    step = length / most if count > most else 1 / rate
    return start + np.arange(min(count, most)) * step
