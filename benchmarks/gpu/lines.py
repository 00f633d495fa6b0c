"""The record of a run on a GPU: one JSON object per line, on disk before the next thing starts.

Every process of a run appends to the same file. A line is one `write` on a file opened for
appending, so lines of several processes do not mix, and what was measured survives the process, the
run and the machine. docs/ops/gpu.md says which lines there are.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def plain(x: object) -> object:
    """Values that every JSON reader accepts: numbers that are not finite become "nan", "inf",
    "-inf"."""
    if isinstance(x, dict):
        return {str(k): plain(y) for k, y in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(y) for y in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if x is None or isinstance(x, (str, int, float, bool)):
        return x
    return str(x)


class Lines:
    """Appends the lines of one step.

    Args:
        now: seconds since the run began.
    """

    def __init__(self, path: Path, step: str, now) -> None:
        self.path, self.step, self.now = path, step, now

    def write(self, event: str, **fields: object) -> None:
        line = {"t": round(self.now(), 3), "step": self.step, "event": event, **fields}
        data = (json.dumps(plain(line)) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, data)
            os.fsync(file)
        finally:
            os.close(file)


def read(path: Path) -> tuple[list[Line], list[str]]:
    """(the lines of a record, what is wrong with it in sentences). A process that was killed may
    have left half a line."""
    found, wrong = [], []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for number, piece in enumerate(text.splitlines(), 1):
        if not piece.strip():
            continue
        try:
            line = json.loads(piece)
        except json.JSONDecodeError:
            wrong.append(f"{path.name}, line {number} is not JSON: {piece[:60]!r}")
            continue
        if isinstance(line, dict) and {"t", "step", "event"} <= line.keys():
            found.append(line)
        else:
            wrong.append(f"{path.name}, line {number} is no line of a run: {piece[:60]!r}")
    return found, wrong


def in_flight(lines: list[Line], step: str) -> str | None:
    """The case of a step that began and did not end, in which its process died."""
    case = None
    for line in lines:
        if line["step"] == step and line["event"] == "start":
            case = line["case"]
        elif line["step"] == step and line["event"] == "done":
            case = None
    return case


def started(lines: list[Line], step: str) -> set[str]:
    """The cases of a step that are not tried again."""
    return {x["case"] for x in lines if x["step"] == step and x["event"] == "start"}
