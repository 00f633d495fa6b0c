"""Failures for a rehearsal, at a chosen case of a step: what a GPU can do to a program.

`smoke#2=crash`: the third case of the step ends the process; `tiles=crash`: it dies when it starts.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import torch

KINDS = {
    "crash": "the process is killed by a segmentation fault",
    "hang": "the case never ends",
    "oom": "torch.OutOfMemoryError",
    "lost": "an illegal access: this call and every later one of the process fail",
    "nan": "results are NaN",
    "error": "an exception",
}
CASE_LIMIT = 3.0  # real seconds after which a case that is meant to hang is ended


@dataclass(frozen=True)
class Failure:
    """case: its number in the step, from 0; None: before the first one."""

    step: str
    case: int | None
    kind: str


def parse(text: str) -> Failure:
    """Raises ValueError for anything but STEP[#CASE]=KIND."""
    where, _, kind = text.partition("=")
    step, _, case = where.partition("#")
    if kind not in KINDS or not step or (case and not case.isdigit()):
        raise ValueError(f"--inject: expected STEP[#CASE]={'|'.join(KINDS)}, got {text!r}")
    return Failure(step, int(case) if case else None, kind)


class Injected:
    """The failures of one step. lost: whether the device has stopped answering."""

    def __init__(self, failures: list[Failure]) -> None:
        self._failures = failures
        self._kind: str | None = None
        self.lost = False

    def limit(self, number: int) -> float | None:
        """Real seconds after which a case is ended, if it is meant to hang."""
        hangs = any(x.case == number and x.kind == "hang" for x in self._failures)
        return CASE_LIMIT if hangs else None

    def at_start(self) -> None:
        for failure in self._failures:
            if failure.case is None:
                _fail(failure.kind)

    def before(self, number: int, case: str) -> None:
        """Called before each case."""
        found = [x.kind for x in self._failures if x.case == number]
        self._kind = found[0] if found else None
        self.lost = self._kind == "lost"
        if self._kind not in (None, "nan"):
            _fail(self._kind)

    def spoils(self) -> bool:
        """Whether the current case is to return NaN."""
        return self._kind == "nan"


def _fail(kind: str) -> None:
    match kind:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(3600)
        case "oom":
            raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")
        case "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")
        case _:
            raise ValueError("a failure of the rehearsal")
