"""A pytest plugin: records every test's outcome when the test ends, even if the run is killed
later.

`-p benchmarks.gpu.supervising.pytest_lines`, with the environment that the supervisor sets. Under
pytest-xdist the process that collects the reports writes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.lines import Lines
from benchmarks.gpu.supervising.clock import Clock

_CLOCK = Clock(float(os.environ.get("GROUNDKERN_ELAPSED", "0")))
_RECORD = os.environ.get("GROUNDKERN_LINES")
_PLAYED = os.environ.get("GROUNDKERN_PLAYED")  # seconds that a rehearsal plays for these tests
PLAYED = 3.0  # guessed seconds of one test on a card


def _lines(ahead: float = 0.0) -> Lines:
    now = (lambda: _CLOCK.now() + ahead) if ahead else _CLOCK.now
    return Lines(Path(_RECORD or ""), os.environ.get("GROUNDKERN_STEP", "tests"), now)


def pytest_collection_finish(session: pytest.Session) -> None:
    """A rehearsal runs no test: it guesses how far a real run would get."""
    if _PLAYED is None:
        return
    number, seconds = len(session.items), float(_PLAYED)
    jobs = int(os.environ.get("GROUNDKERN_JOBS", "1"))
    run = min(number, int(seconds * jobs / PLAYED))
    text = f"{number} tests collected; {run} of them would end in time, at {PLAYED:g} s for each"
    _lines(min(seconds, number * PLAYED / jobs)).write("note", text=f"{text}, {jobs} at once")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _RECORD is None or os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        text = ""
        if report.failed:
            text = report.longreprtext[-3000:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            text = str(report.longrepr[2])
        seconds = round(report.duration, 3)
        _lines().write("test", test=report.nodeid, outcome=outcome, seconds=seconds, text=text)
