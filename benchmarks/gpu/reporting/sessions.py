"""Calls of `make gpu`, from their records, grouped by device and commit.

Two calls at one commit on one kind of card are one session; of what both measured, the later
counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.lines import Line
from benchmarks.timing.results import FIELDS, Row

GRAPH, EAGER = "groundkern triton, CUDA graph", "groundkern triton"
STAMP = ("device", "processor", "threads", "system", "python", "torch", "triton", "groundkern")
STAMP += ("commit", "date")
NEEDED = {  # fields without which a line is useless
    "ceiling": ("name", "value", "unit"),
    "smoke": ("case", "ok", "checks"),
    "row": ("row",),
    "kernel": ("case", "mode", "kernel", "us"),
    "tile": ("op", "key", "tile", "status"),
    "best": ("op", "key", "tile", "us", "present_tile", "present_us"),
    "test": ("test", "outcome"),
    "training": ("case", "row"),
    "error": ("kind", "message"),
    "end": ("status",),
}
COMMIT = re.compile(r"[0-9a-f]{7,40}")


def number(x: object) -> float | None:
    """A finite number; None for null, "nan" and "inf"."""
    real = isinstance(x, (int, float)) and not isinstance(x, bool)
    return float(x) if real and math.isfinite(x) else None


def outcome(row: Row) -> str:
    """`timed`, `refused`, `failed` and so on, without the reason."""
    return str(row["status"]).split(":")[0]


def is_timed(row: Row) -> bool:
    """Whether it has a time that can be shown."""
    return outcome(row) == "timed" and number(row["p50_ms"]) is not None


@dataclass
class SuiteCall:
    """One call of `make gpu`. path: the file. run, device: its first lines, empty if they are
    missing."""

    path: Path
    run: Line = field(default_factory=dict)
    device: Line = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def of(self, event: str) -> list[Line]:
        return [x for x in self.lines if x["event"] == event]

    @property
    def name(self) -> str:
        """ "first", "second" or the steps that were asked for."""
        asked = self.run.get("call", "unknown")
        return " ".join(map(str, asked)) if isinstance(asked, list) else str(asked)

    @property
    def rehearsed(self) -> bool:
        return self.run.get("rehearsed") is not False

    @property
    def commit(self) -> str:
        """The run's own: a machine without git reads it from a file."""
        return str(self.run.get("commit") or "unknown")

    @property
    def date(self) -> str:
        return str(self.run.get("date") or self.device.get("date") or "")

    @property
    def card(self) -> str:
        return str(self.device.get("device") or "an unknown device")

    @property
    def stamp(self) -> Row:
        """The columns that every committed row has."""
        return {name: self.device.get(name, "") for name in STAMP} | {"commit": self.commit}

    def refusals(self) -> Iterator[str]:
        """Why nothing of this call may become a result, in sentences."""
        run, where = self.run, self.path.name
        if not run:
            yield f"{where}: without its run line nobody knows whether this was a rehearsal"
        elif self.rehearsed:
            yield f"{where}: rehearsed on a stand-in, never a result"
        if not COMMIT.fullmatch(self.commit):
            yield f"{where}: commit {self.commit!r} is not one that can be checked out"
        if not self.device:
            yield f"{where}: no device line: nobody knows where this ran"
            return
        if self.card.startswith(("cpu", "stand-in")):
            yield f"{where}: the device is {self.card}, not a GPU"
        if self.device.get("commit") not in (self.commit, "unknown"):
            yield f"{where}: the device line names commit {self.device.get('commit')!r}"
        missing = [n for n in ("processor", "threads", "torch", "date") if not self.device.get(n)]
        if missing:
            yield f"{where}: the device line lacks {', '.join(missing)}"
        named = [x.get("device") for x in self.of("device")]
        named += [x["row"]["device"] for x in self.of("row") if "device" in x["row"]]
        for other in dict.fromkeys(x for x in named if x != self.card):
            yield f"{where}: holds lines of {other!r} beside {self.card!r}"


@dataclass
class Session:
    """Calls on one device at one commit, oldest first."""

    calls: list[SuiteCall]

    @property
    def last(self) -> SuiteCall:
        return self.calls[-1]

    def of(self, event: str) -> list[Line]:
        return [x for call in self.calls for x in call.of(event)]

    def latest(self, event: str, *names: str) -> list[Line]:
        """The last line for each value of some fields, in the order of the first ones."""
        return list({str([x.get(n) for n in names]): x for x in self.of(event)}.values())

    def rows(self) -> list[Row]:
        """Rows with their stamp; later ones replace earlier ones."""
        found: dict[tuple, Row] = {}
        for call in self.calls:
            for line in call.of("row"):
                row = line["row"]
                key = tuple(row[n] for n in ("problem", "dtype", "mode", "contestant"))
                found[key] = {"stage": line["step"], **row, **call.stamp}
        return list(found.values())

    def refusals(self) -> list[str]:
        return [sentence for call in self.calls for sentence in call.refusals()]


def groups(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Rows of the same problem, dtype and mode, in their order."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault((row["problem"], row["dtype"], row["mode"]), []).append(row)
    return found


def _whole(line: Line) -> bool:
    """Whether it has the fields that a line of its kind must have."""
    if any(name not in line for name in NEEDED.get(line["event"], ())):
        return False
    return line["event"] != "row" or (
        isinstance(line["row"], dict) and all(name in line["row"] for name in FIELDS)
    )


def calls_of(path: Path) -> tuple[list[SuiteCall], list[str]]:
    """(the calls in a file, what is wrong with it in sentences)."""
    found, wrong = lines.read(path)
    calls: list[SuiteCall] = []
    for line in found:
        if line["event"] == "run" or not calls:
            calls.append(SuiteCall(path))
        call = calls[-1]
        if not _whole(line):
            wrong.append(f"{path.name}: a {line['event']} line at {line['t']} s lacks fields")
            continue
        call.lines.append(line)
        if line["event"] == "run":
            call.run = line
        elif line["event"] == "device" and not call.device:
            call.device = line
    if not found:
        wrong.append(f"{path.name} holds no line of a run")
    return calls, wrong


def read(paths: list[Path]) -> tuple[list[Session], list[str]]:
    """(sessions, oldest first; what is wrong with the files, in sentences)."""
    calls, wrong = [], []
    for path in paths:
        some, sentences = calls_of(path)
        calls, wrong = calls + some, wrong + sentences
    sessions: dict[tuple, list[SuiteCall]] = {}
    for call in sorted(calls, key=lambda call: call.date):
        sessions.setdefault((call.card, call.commit, call.rehearsed), []).append(call)
    return [Session(some) for some in sessions.values()], wrong
