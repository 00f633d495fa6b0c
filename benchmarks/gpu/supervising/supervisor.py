"""Runs the steps of a call, each in a process of its own with a limit, all on record.

This process never opens the device and does not import torch, so the next step starts whatever
happens to one. Under `$OUT` there are at most three files: the record, the log of everything that
was printed, and an archive of what steps left in their scratch folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from traceback import format_exc

from benchmarks.gpu import lines
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.supervising.clock import Clock, PlayedClock
from benchmarks.gpu.supervising.schedule import LOST, PYTEST, RESERVE, START, Step

ROOT = Path(__file__).parents[3]
RECORD, LOG, ARCHIVE = "results.jsonl", "log.txt", "archive.tar.gz"
ARCHIVE_BYTES = 15 * 2**20
RESTARTS = 6  # at most, of one step
MARGIN = 3.0  # a step's process begins no case in its last seconds
REAL_LIMIT = 120.0  # real seconds of a step in a short rehearsal, whatever its clock plays


class Supervisor:
    """One call.

    Args:
        out: folder for the three files.
        seconds: of the whole call.
        rehearse: on the stand-in device, by a played clock.
        few: cases of each step, in a short rehearsal.
        injected: failures of a rehearsal, `inject.parse`'s texts.
    """

    def __init__(
        self,
        steps: tuple[Step, ...],
        out: Path,
        *,
        seconds: float,
        rehearse: bool = False,
        few: int | None = None,
        injected: tuple[str, ...] = (),
    ) -> None:
        self.steps, self.out, self.seconds = steps, out, seconds
        self.rehearse, self.few, self.injected = rehearse, few, injected
        self.clock = PlayedClock() if rehearse else Clock()
        out.mkdir(parents=True, exist_ok=True)
        for name in (RECORD, LOG, ARCHIVE):
            (out / name).unlink(missing_ok=True)
        self.record = out / RECORD
        self.scratch = Path(tempfile.mkdtemp(prefix="groundkern-gpu-"))
        self.background: dict[str, tuple[Step, subprocess.Popen, float]] = {}
        self.stopped = False

    def lines(self, step: str = "") -> Lines:
        return Lines(self.record, step, self.clock.now)

    def say(self, text: str) -> None:
        print(f"[{self.clock.now():5.0f} s] {text}", flush=True)

    def run(self, **header: object) -> bool:
        """Returns whether every step ended by itself."""
        self.lines().write("run", seconds=self.seconds, rehearsed=self.rehearse, **header)
        before = {x: signal.signal(x, self._stop) for x in (signal.SIGTERM, signal.SIGINT)}
        site = self._carried()
        whole = True
        try:
            for step in self.steps:
                if step.waits_for in self.background:
                    whole &= self._finish(step.waits_for)
                if self._left() < START or self.stopped:
                    self.lines(step.name).write("end", status="left out", seconds=0, restarts=0)
                    self.say(f"{step.name}: left out")
                    whole = False
                    continue
                whole &= self._guarded(step, site)
            for name in list(self.background):
                whole &= self._finish(name)
        finally:
            for _, process, _ in self.background.values():
                _kill(process)
            self._archive()
            for number, handler in before.items():
                signal.signal(number, handler)
        return whole

    def _guarded(self, step: Step, site: Path | None) -> bool:
        """Runs a step; whatever goes wrong around it is recorded, and the next one follows."""
        try:
            return self._begin(step, site)
        except Exception as error:
            message, kind = str(error)[:500], type(error).__name__
            record = self.lines(step.name)
            record.write("error", case="", kind=kind, message=message, traceback=format_exc())
            record.write("end", status="failed", seconds=0, restarts=0)
            return False
        finally:
            self._archive()

    def _stop(self, *_) -> None:
        self.stopped = True
        self.say("stopped from outside: what is on record stays")

    def _left(self) -> float:
        return self.seconds - RESERVE - self.clock.now()

    def _carried(self) -> Path | None:
        """Installs the wheels in the folder `carry` where only this call sees them."""
        wheels = sorted((ROOT / "carry").glob("*.whl"))
        if not wheels or self.rehearse:
            return None
        site = self.scratch / "site"
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
        command = [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)]
        text = ", ".join(x.name for x in wheels)
        try:
            with (self.out / LOG).open("a", encoding="utf-8") as log:
                streams = {"stdout": log, "stderr": subprocess.STDOUT}
                subprocess.run(command, timeout=60, check=True, **streams)
        except (OSError, subprocess.SubprocessError) as error:
            self.lines().write("note", text=f"wheels did not install ({error}): {text}")
            return None
        self.lines().write("note", text=f"carried wheels installed: {text}")
        return site

    def _begin(self, step: Step, site: Path | None) -> bool:
        limit = min(step.limit, self._left())
        self.lines(step.name).write("begin", limit=round(limit, 1))
        self.say(f"{step.name}: {step.what}")
        if step.background:
            process = self._start(step, self.clock.now() + limit, site)
            self.background[step.name] = (step, process, self.clock.now() + limit)
            return True
        return self._attend(step, limit, site)

    def _attend(self, step: Step, limit: float, site: Path | None) -> bool:
        """Runs a step in the foreground, in as many processes as it needs."""
        began, end, restarts = self.clock.now(), self.clock.now() + limit, 0
        while True:
            known = lines.started(self._on_record(), step.name)
            process = self._start(step, end, site)
            status = self._wait(process, end)
            self._catch_up(step)
            case = lines.in_flight(self._on_record(), step.name)
            if case is not None:
                self._lost(step, case, status)
            went_on = lines.started(self._on_record(), step.name) - known
            if status == 0 or status is None or self.stopped:
                break
            if step.command or not went_on or restarts >= RESTARTS:
                break
            if end - self.clock.now() < START:
                status = None
                break
            restarts += 1
            self.say(f"{step.name}: its process ended ({_named(status)}); a new one goes on")
        return self._end(step, status, self.clock.now() - began, restarts)

    def _end(self, step: Step, status: int | None, seconds: float, restarts: int) -> bool:
        outcome = {0: "done", None: "timed out"}.get(status, "failed")
        more = {"status": outcome, "seconds": round(seconds, 1), "restarts": restarts}
        self.lines(step.name).write("end", **more, exit=_named(status))
        self.say(f"{step.name}: {outcome} after {seconds:.0f} s")
        return status == 0

    def _finish(self, name: str) -> bool:
        """Waits for a background step."""
        step, process, end = self.background.pop(name)
        began = next(x["t"] for x in self._on_record() if x["step"] == name)
        status = self._wait(process, end)
        self._catch_up(step)
        return self._end(step, status, max(0.0, self.clock.now() - began), 0)

    def _start(self, step: Step, end: float, site: Path | None) -> subprocess.Popen:
        elapsed = self.clock.now()
        paths = [str(site or ""), os.environ.get("PYTHONPATH", "")]
        # Without pytest's variables for its workers, in case a test started this process.
        env = {k: x for k, x in os.environ.items() if not k.startswith("PYTEST_")}
        env["PYTHONUNBUFFERED"] = "1"
        env["PYTHONPATH"] = os.pathsep.join(x for x in paths if x)
        env |= {"GROUNDKERN_LINES": str(self.record), "GROUNDKERN_STEP": step.name}
        env |= {"GROUNDKERN_ELAPSED": str(elapsed), "OUT": str(self.scratch)}
        arguments = ["-m", "benchmarks.gpu.steps.worker", step.name, "--lines", str(self.record)]
        arguments += ["--scratch", str(self.scratch), "--elapsed", str(elapsed)]
        arguments += ["--until", str(end - MARGIN)]
        if self.rehearse:
            # Steps that launch use the interpreter, those that only compile the compiler.
            env["TRITON_INTERPRET"] = "0" if step.name.startswith("compile") else "1"
            arguments += ["--rehearse", *(f"--inject={x}" for x in self.injected)]
            arguments += [] if self.few is None else ["--few", str(self.few)]
        if step.command:
            arguments = list(step.command)
        if step.command and self.rehearse and self.few is not None:
            arguments = self._rehearsed_tests(step)
        elif step.command and self.rehearse:
            plain = [x for x in arguments if not x.startswith(("-n", "--timeout"))]
            arguments = [*(x for x in plain if x != "8"), "--collect-only", "-q"]
            env |= {"GROUNDKERN_PLAYED": str(end - elapsed - START)}
            env |= {"GROUNDKERN_JOBS": "8" if "8" in step.command else "1"}
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            print(
                f"\n=== {step.name} at {elapsed:.0f} s: {' '.join(arguments)}", file=log, flush=True
            )
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group to kill; its session ends with the call
            )

    def _rehearsed_tests(self, step: Step) -> list[str]:
        """pytest on tests that pass, fail, hang and crash, with the step's own options."""
        file = self.scratch / "test_rehearsal.py"
        file.write_text(TESTS, encoding="utf-8")
        plain = [x for x in step.command[len(PYTEST) :] if not x.startswith("--timeout")]
        plain[plain.index("-m") + 1] = "rehearsal"
        plain = ["2" if x == "8" else x for x in plain]
        place = ["-c", str(ROOT / "pyproject.toml"), "-o", "markers=rehearsal", "--timeout=1"]
        return ["-m", "pytest", str(file), *PYTEST[4:], *plain, *place]

    def _wait(self, process: subprocess.Popen, end: float) -> int | None:
        """The exit status; None if the process was killed at its limit."""
        began = time.monotonic()
        while process.poll() is None:
            spent = time.monotonic() - began
            if self.rehearse:
                left = (REAL_LIMIT if self.few is not None else 15 * REAL_LIMIT) - spent
            else:
                left = end - self.clock.now()
            if left <= 0 or self.stopped:
                _kill(process)
                return None
            time.sleep(0.05)
        return process.returncode

    def _catch_up(self, step: Step) -> None:
        """Sets a played clock to where the step's process left it."""
        if isinstance(self.clock, PlayedClock):
            times = [x["t"] for x in self._on_record() if x["step"] == step.name]
            self.clock.spend(max(0.0, max(times, default=0.0) - self.clock.now()))

    def _on_record(self) -> list[lines.Line]:
        return lines.read(self.record)[0]

    def _lost(self, step: Step, case: str, status: int | None) -> None:
        """Records the case in which a process died."""
        kind = "timed out" if status is None else "crashed" if status < 0 else "hung"
        if kind == "hung":
            self.clock.spend(step.case_limit)  # if the clock is played
        message = f"its process ended: {_named(status)}"
        record = self.lines(step.name)
        record.write("error", case=case, kind=kind, message=message, traceback="see log.txt")
        record.write("done", case=case, seconds=0)

    def _archive(self) -> None:
        """Archives what steps left behind, small files first, as far as it may be sent back."""
        try:
            self._write_archive()
        except OSError as error:
            self.say(f"no archive: {error}")

    def _write_archive(self) -> None:
        files = sorted((x for x in self.scratch.rglob("*") if x.is_file()), key=_size)
        files = [x for x in files if "site" not in x.relative_to(self.scratch).parts]
        if not files:
            return
        half = self.scratch / (ARCHIVE + ".part")
        total, left_out = 0, []
        with tarfile.open(half, "w:gz") as archive:
            for file in files:
                total += _size(file)
                if file == half or total > ARCHIVE_BYTES:
                    left_out.append(file.name)
                else:
                    archive.add(file, str(file.relative_to(self.scratch)))
        (self.out / ARCHIVE).write_bytes(half.read_bytes())
        half.unlink()
        if left_out:
            self.say(f"too large for the archive: {', '.join(left_out)}")


TESTS = """
import os, time
import pytest

pytestmark = pytest.mark.rehearsal

@pytest.mark.parametrize("n", range(4))
def test_passes(n): pass

def test_fails(): assert 1 == 2, "a failure of the rehearsal"

def test_hangs(): time.sleep(60)

def test_crashes(): os.abort()

def test_after(): pass
"""


def _size(path: Path) -> int:
    return path.stat().st_size


def _named(status: int | None) -> str:
    if status is None:
        return "killed at its limit"
    if status < 0:
        return signal.Signals(-status).name
    return {LOST: "the device was lost"}.get(status, f"exit status {status}")


def _kill(process: subprocess.Popen) -> None:
    """Kills the process and everything it started. One that waits in the driver may survive: then
    the next step starts beside it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and number == signal.SIGTERM:
            return
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        for _ in range(20):
            if process.poll() is not None:
                break
            time.sleep(0.1)
