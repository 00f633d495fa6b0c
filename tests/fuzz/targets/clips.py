"""Files of videos, damaged: their frames are sound, or they are refused in a sentence."""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from groundkern.trainer.data.record import VideoRecord
from groundkern.trainer.data.videos import VideoRules, find_videos
from tests.fuzz.scratch import folder, written
from tests.fuzz.target import Target, expect
from tests.trainer.clips import SIZE, write_clip, write_sound

RULES = VideoRules(fps=8, frames=6, max_pixels=1 << 20, max_seconds=600)


@cache
def _files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as made:
        paths = [write_clip(Path(made) / f"a.{kind}", 12) for kind in ("mp4", "mkv", "avi", "ts")]
        paths += [write_clip(Path(made) / "turned.mov", 4, rotation=90)]
        paths += [write_sound(Path(made) / "sound.mp4")]
        return {path.name: path.read_bytes() for path in paths}


def check_clip(data: bytes) -> bool:
    """What is taken has frames of one size at times that ascend, no more than are allowed."""
    written("clips/c.bin", data)
    rules = {"rules": RULES, "max_pixels": 1 << 18, "where": "x:1"}
    (stored,) = find_videos([VideoRecord(path="c.bin")], root=folder() / "clips", **rules)
    video = stored.load()
    expect(0 < len(video.frames) <= RULES.frames, "some frames", len(video.frames))
    expect({frame.size for frame in video.frames} == {stored.size}, f"all {SIZE}", stored.size)
    times = list(video.times)
    expect(times == sorted(set(times)) and times[0] >= 0, "times that ascend", times)
    return True


TARGETS = (Target("clip", check_clip, _files(), "bytes"),) if find_spec("av") else ()
