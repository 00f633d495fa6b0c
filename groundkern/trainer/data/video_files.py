"""Files of videos by PyAV: what a header says, when each frame is shown, and frames as upright RGB.

Times are those that the file gives its frames, counted from the first one, so that a variable rate
is kept. One thread decodes, every error that the decoder finds is one, and a frame is the same
whether its decoder came from the beginning or from the keyframe before it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from groundkern.trainer.data.file_kinds import HEAD, PICTURES, kind_of
from groundkern.trainer.data.images import SETTLED, SampleError, wrong

# containers that hold their own frames: a playlist could name other files, or addresses
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf"
NAMES = "MP4, MOV, Matroska, WebM, AVI, MPEG, FLV, Ogg or ASF"
NEEDED = "PyAV, which decodes videos (pip install av), or a folder of frames"
KEPT = 16  # videos of which the times are remembered
_TURNS = {  # the upper left of a display matrix, by its signs: what makes the frame upright
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_SIDEWAYS = tuple(turn for (a, *_), turn in _TURNS.items() if a == 0)


@dataclass(frozen=True)
class VideoHeader:
    """What is known of a video before it is read.

    Args:
        size: (width, height) of its frames, upright.
        fps: frames per second, on average; None: not known.
        duration: seconds; None: not known.
    """

    size: tuple[int, int]
    fps: float | None
    duration: float | None


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a video are shown.

    Args:
        seconds: fp64 [n], ascending, the first 0.
        end: when the last one ends.
        stamps: int64 [n], in the units of the file.
        keys: int64 [k, 2], ascending: stamps of the frames from which decoding can begin, and where
            to go to in the file for each.
    """

    seconds: NDArray
    end: float
    stamps: NDArray
    keys: NDArray


@dataclass(frozen=True)
class VideoFile:
    """A file of a video, for messages too.

    Args:
        path: a file.
        where, field: what starts an error message.
    """

    path: Path
    where: str
    field: str

    def wrong(self, wanted: str, got: object) -> SampleError:
        """An error about it."""
        return wrong(self.where, self.field, wanted, got)

    def header(self, check: Callable[[tuple[int, int]], None]) -> VideoHeader:
        """Its header; the first frame is decoded too, since it says which side is up.

        Args:
            check: of (width, height), before anything is decoded.

        Raises:
            SampleError: no video, one without frames, or one that cannot be decoded; what `check`
                raises.
        """
        found = self._once(_headers, lambda: self._header(check))
        check(found.size)  # it may be known from a run of other limits
        return found

    def times(self) -> FrameTimes:
        """When each frame is shown: all of the file is read and none of it decoded.

        Raises:
            SampleError: as `header`; frames without times, or fewer than the file says it has.
        """
        return self._once(_times, self._read_times)

    def frames(self, chosen: Sequence[int], size: tuple[int, int]) -> list[Image.Image]:
        """Some of its frames, upright RGB.

        Args:
            chosen: indices of `times().stamps`, ascending.
            size: (width, height) of each, as the header has it.

        Raises:
            SampleError: one of them is damaged, missing or of another size.
        """
        times = self.times()
        wanted = times.stamps[list(chosen)]
        behind = np.searchsorted(times.keys[:, 0], wanted, "right") - 1
        found: dict[int, Image.Image] = {}
        with self._opened() as (container, stream):
            for key, group in groupby(zip(wanted.tolist(), behind.tolist()), lambda pair: pair[1]):
                start, place = times.keys[key].tolist()
                with suppress(Exception):  # said below, if the long way does not help either
                    container.seek(place, stream=stream, backward=True)
                    found |= self._decode(container, stream, [stamp for stamp, _ in group], start)
        if missing := [stamp for stamp in wanted.tolist() if stamp not in found]:
            with self._opened() as (container, stream):  # from the beginning
                found |= self._decode(container, stream, missing)
        for index, stamp in zip(chosen, wanted.tolist(), strict=True):
            at = f"at {times.seconds[index]:.3f} s of {self._name}"
            if stamp not in found:
                raise self.wrong("frames that can be decoded", f"none {at}")
            if (other := found[stamp].size) != size:
                got = f"{other[0]} x {other[1]} {at}"
                raise self.wrong(f"frames of one size, {size[0]} x {size[1]}", got)
        return [found[stamp] for stamp in wanted.tolist()]

    def _once(self, kept: dict[tuple, Any], make: Callable[[], Any]) -> Any:
        """What `make` found in the file, if it has not changed since."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise self.wrong("a readable file", f"{self._name} ({error.strerror})") from None
        known = (str(self.path), found.st_ino, found.st_size, found.st_mtime_ns)
        if known in kept:
            return kept[known]
        made = make()
        if time.time_ns() - found.st_mtime_ns >= SETTLED:  # else a write could leave the same time
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            kept[known] = made
        return made

    @property
    def _name(self) -> str:
        return repr(self.path.name)

    def _header(self, check: Callable[[tuple[int, int]], None]) -> VideoHeader:
        with self._opened() as (container, stream):
            check((stream.codec_context.width, stream.codec_context.height))
            first = next(container.decode(stream), None)
            if first is None:
                raise self.wrong("a video with a frame at least", f"none in {self._name}")
            size = (first.width, first.height)
            check(size)
            duration = None
            if stream.duration is not None and stream.time_base:
                duration = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                duration = container.duration / 1e6
            rate = stream.average_rate or stream.guessed_rate
            size = size[::-1] if self._turn(first) in _SIDEWAYS else size
            return VideoHeader(size, float(rate) if rate else None, duration)

    def _read_times(self) -> FrameTimes:
        found, keys, last = set(), {}, 0
        with self._opened() as (container, stream):
            unit, average = float(stream.time_base), stream.average_rate
            # an AVI counts those that repeat the frame before them too, which are no packets
            announced = stream.frames if "mp4" in container.format.name else 0
            for packet in container.demux(stream):
                announced -= packet.size > 0
                if not packet.size or packet.is_discard:
                    continue
                if packet.pts is None:
                    wanted = "a file that says when its frames are shown, such as MP4"
                    raise self.wrong(wanted, f"none of {self._name} at frame {len(found)}")
                if packet.is_keyframe:
                    keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
                if keys:
                    found.add(packet.pts)
                    last = max(last, packet.pts + (packet.duration or 0))
        if announced > 0:
            got = f"{announced} fewer in {self._name}, which is cut off or damaged"
            raise self.wrong("as many frames as the file says it has", got)
        start = min(keys, default=0)
        stamps = np.array(sorted(stamp for stamp in found if stamp >= start), np.int64)
        if not len(stamps):
            raise self.wrong("a video with a frame at least", f"none in {self._name}")
        seconds = (stamps - stamps[0]) * unit
        end = float((last - stamps[0]) * unit)
        if end <= seconds[-1]:  # nobody says how long the last one is shown
            steps = np.diff(seconds[-2:]) if average is None else [1 / float(average)]
            end = float(seconds[-1]) + float(next(iter(steps), 1.0))
        return FrameTimes(seconds, end, stamps, np.array(sorted(keys.items()), np.int64))

    def _decode(
        self, container: Any, stream: Any, stamps: list[int], start: int | None = None
    ) -> dict[int, Image.Image]:
        """Decodes on to the last of `stamps`: those frames of them that came.

        Args:
            container, stream: where they come from.
            stamps: ascending.
            start: that of the keyframe where decoding begins; frames before it, which need what is
                before the keyframe, are not looked at. None: of all frames the first.
        """
        found, before, asked = {}, None, set(stamps)
        for frame in container.decode(stream):
            if frame.pts is None or (before is not None and frame.pts < before):
                wanted = "frames in the order of their times, which an AVI with B-frames has not"
                raise self.wrong(wanted, f"{frame.pts} behind {before} in {self._name}")
            before = frame.pts
            if frame.is_corrupt and (start is None or frame.pts >= start):
                got = f"a damaged one at {frame.time} s of {self._name}"
                raise self.wrong("frames that can be decoded", got)
            if frame.pts in asked and frame.pts not in found:
                found[frame.pts] = self._upright(frame)
            if frame.pts >= stamps[-1]:
                break
        return found

    def _upright(self, frame: Any) -> Image.Image:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
        turn = self._turn(frame)
        return image if turn is None else image.transpose(turn)

    def _turn(self, frame: Any) -> Image.Transpose | None:
        matrix = next((bytes(d) for d in frame.side_data if d.type.name == "DISPLAYMATRIX"), None)
        if matrix is None:
            return None
        a, b, _, c, d = struct.unpack_from("5i", matrix)
        signs = tuple((n > 0) - (n < 0) for n in (a, b, c, d))
        if signs not in _TURNS:
            raise self.wrong(
                "frames turned by quarters", f"{frame.rotation} degrees in {self._name}"
            )
        return _TURNS[signs]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container, and its first stream of pictures; what PyAV raises becomes a sentence."""
        try:
            import av
        except ImportError:
            raise self.wrong(NEEDED, f"{self._name}, and no PyAV") from None
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        try:
            with av.open(f"file:{self.path}", options=options, metadata_errors="replace") as found:
                stream = self._stream(found)
                stream.thread_type = "NONE"
                stream.codec_context.options = {"err_detect": "explode", "threads": "1"}
                yield found, stream
        except SampleError:
            raise
        except Exception as error:  # a file of anybody's: FFmpeg and PyAV raise nearly anything
            if (kind := self._kind()) in PICTURES:
                got = f"{self._name}, a {kind} image, which belongs into `images`"
            else:
                got = f"{self._name} ({getattr(error, 'strerror', None) or error})"
            raise self.wrong(f"a video that can be decoded ({NAMES})", got) from None

    def _kind(self) -> str | None:
        """What its first bytes are; None of a file that cannot be read."""
        try:
            with self.path.open("rb") as file:
                return kind_of(file.read(HEAD))
        except OSError:
            return None

    def _stream(self, container: Any) -> Any:
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            sound = ", which has sound alone" if container.streams.audio else ""
            raise self.wrong("a file with a video stream", f"{self._name}{sound}")
        if streams[0].codec_context is None:
            raise self.wrong("a video that PyAV can decode", f"{self._name} of an unknown codec")
        return streams[0]


def _is_cover(stream: Any) -> bool:
    """Whether a stream is one picture: the cover of a song."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


_headers: dict[tuple, Any] = {}  # several samples often share a video, and each is read again
_times: dict[tuple, Any] = {}
