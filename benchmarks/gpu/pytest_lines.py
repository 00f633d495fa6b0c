"""A pytest plugin: every test's outcome on record as it ends, so that a killed run has said much.

`-p benchmarks.gpu.pytest_lines`, with the environment that the supervisor sets. Under pytest-xdist
the process that collects the reports writes them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.lines import Lines

_CLOCK = Clock(float(os.environ.get("GROUNDKERN_ELAPSED", "0")))
_RECORD = os.environ.get("GROUNDKERN_LINES")


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
        lines = Lines(Path(_RECORD), os.environ.get("GROUNDKERN_STEP", "tests"), _CLOCK.now)
        seconds = round(report.duration, 3)
        lines.write("test", test=report.nodeid, outcome=outcome, seconds=seconds, text=text)
