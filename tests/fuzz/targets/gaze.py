"""Files of fixations: what is taken is read the same from JSON, or the file is refused."""

from __future__ import annotations

import json
import math

from groundkern.trainer.prepare.gaze.fixations import read_fixations
from tests.fuzz.scratch import written
from tests.fuzz.target import Target, expect

FILES = {
    "csv": b"path,x,y,time,duration\na.png,1,2.5,,0.3\n\"b, c\",0,-4,1.5,1e-3\n",
    "frames": b"\xef\xbb\xbfx,y,path,frame,other\r\n1,2,a.mp4,17,\r\n",
    "json": b'[{"path": "a", "x": 1, "y": 2.5, "duration": 0.3}, {"path": "b", "x": "3", "y": 0, '
            b'"time": 1, "duration": 2, "eye": "left"}]',
    "lines": b'{"path": "a", "x": 1, "y": 2.5}\n\n{"path": "\\u00e9", "x": 0, "y": 1, "frame": 3}',
}  # fmt: skip


def check_fixations(data: bytes) -> bool:
    """Finite numbers in their ranges, that a JSON file of them gives again."""
    suffix = {b"[": "json", b"{": "jsonl"}.get(data[:1], "csv")
    found, _ = read_fixations(written(f"gaze/a.{suffix}", data))
    records = []
    for path, fixations in found.items():
        for each in fixations:
            given = {k: v for k, v in each._asdict().items() if v is not None}
            expect(all(map(math.isfinite, given.values())), "finite numbers", each)
            expect("time" not in given or "frame" not in given, "a time or a frame", each)
            expect(min(given.get("time", 0), given.get("frame", 0)) >= 0, "from 0 on", each)
            expect(given.get("duration", 1) > 0, "a duration above 0", each)
            records.append({"path": path, **given})
    expect(len(records) > 0, "a fixation", data)
    again, _ = read_fixations(written("gaze/again.json", json.dumps(records).encode()))
    expect(again == found, "the same again", again, found)
    return True


TARGETS = (Target("fixations", check_fixations, FILES, "text", ("path", ",", "time", "1e999")),)
