"""`make gpu` rehearsed: every step on the stand-in device, with everything a GPU can do to a
program.

Nothing here is a measurement. The tests show that a failure costs the case in which it happens and
no other, and that everything recorded before it survives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import lines
from benchmarks.gpu.supervising import schedule, timeline
from benchmarks.gpu.supervising.supervisor import Supervisor
from groundkern import available_backends

ROOT = Path(__file__).parents[1]
FEW = 2
INJECTED = {
    "ceilings#1": "error",
    "smoke#0": "crash",
    "smoke#1": "nan",
    "replay#0": "hang",
    "loss#0": "lost",
    "loss#1": "oom",
    "tiles": "crash",  # before its first case
}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path, list[lines.Line]]:
    if (reason := available_backends()["triton"]) is not None:
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("out")
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--few", str(FEW)]
    arguments += [f"--inject={where}={kind}" for where, kind in INJECTED.items()]
    env = {**os.environ, "OUT": str(out)}
    done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)
    found, broken = lines.read(out / "results.jsonl")
    assert broken == []
    return done, out, found


def _of(found: list[lines.Line], event: str, step: str) -> list[lines.Line]:
    return [x for x in found if x["event"] == event and x["step"] == step]


@pytest.mark.long
def test_every_step_ends_whatever_the_others_do(rehearsal) -> None:
    done, _, found = rehearsal
    ended = {x["step"]: x["status"] for x in found if x["event"] == "end"}
    assert set(ended) == {step.name for step in schedule.CALLS["first"]}, done.stderr
    failed = {name for name, status in ended.items() if status != "done"}
    assert failed == {"tiles", "tests", "tests_large"}, "those that cannot go on, or are to fail"
    assert done.returncode == 1
    assert "things went wrong" in done.stdout


@pytest.mark.long
def test_a_failure_costs_its_case_and_no_other(rehearsal) -> None:
    _, _, found = rehearsal
    errors = {(x["step"], x["kind"]) for x in found if x["event"] == "error"}
    assert errors == {
        ("ceilings", "ValueError"),
        ("smoke", "crashed"),
        ("replay", "hung"),
        ("loss", "RuntimeError"),
        ("loss", "OutOfMemoryError"),
    }
    for step in ("ceilings", "smoke", "replay", "loss"):
        started, ended = _of(found, "start", step), _of(found, "done", step)
        assert len(started) == FEW, "each case once, also after its process died"
        assert {x["case"] for x in started} == {x["case"] for x in ended}
    restarts = {x["step"]: x["restarts"] for x in found if x["event"] == "end"}
    assert [restarts[x] for x in ("ceilings", "smoke", "replay", "loss")] == [0, 1, 1, 1]


@pytest.mark.long
def test_nan_is_found_and_the_rest_is_measured(rehearsal) -> None:
    _, _, found = rehearsal
    (checked,) = _of(found, "smoke", "smoke")  # the other case crashed
    assert not checked["ok"]
    assert {c["error"] for c in checked["checks"]} == {"inf"}
    assert {x["row"]["mode"] for x in _of(found, "row", "replay")} == {"full"}
    assert _of(found, "kernel", "replay"), "kernel by kernel"


@pytest.mark.long
def test_every_test_is_on_record_with_its_traceback(rehearsal) -> None:
    _, _, found = rehearsal
    for step in ("tests", "tests_large"):
        outcomes = [x["outcome"] for x in _of(found, "test", step)]
        assert outcomes.count("passed") >= 4
        texts = [x["text"] for x in _of(found, "test", step) if x["outcome"] == "failed"]
        assert any("a failure of the rehearsal" in text for text in texts)
    crashed = [x["test"] for x in _of(found, "test", "tests") if "crashes" in x["test"]]
    assert crashed, "a worker that dies is told, and another one goes on"


@pytest.mark.long
def test_few_files_come_back(rehearsal) -> None:
    _, out, _ = rehearsal
    files = [x for x in out.rglob("*") if x.is_file()]
    assert {x.name for x in files} == {"results.jsonl", "log.txt", "archive.tar.gz"}
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert "Segmentation fault" in log, "the traceback of a process that crashed"
    assert "Timeout (0:00:" in log, "and of one that hung"


@pytest.mark.long
def test_it_says_that_it_was_rehearsed(rehearsal) -> None:
    _, _, found = rehearsal
    assert found[0]["event"] == "run"
    assert found[0]["rehearsed"] is True


@pytest.mark.long
def test_the_table_of_minutes(rehearsal) -> None:
    _, _, found = rehearsal
    text = timeline.table(found)
    assert text.count("\n") == 1 + len(timeline.MINUTES)
    assert "| 7 |" in text and "loss" in text


def test_a_call_ends_in_its_time(tmp_path) -> None:
    """No step starts that could not end in time, and the record names those that are left out."""
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "ceilings",
        "loss",
        "--rehearse",
        "--few",
        "1",
    ]
    done = subprocess.run(
        [*arguments, "--seconds", "20", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "loss: left out" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["los"], "step: expected some of compile, ceilings"),
        (["--inject", "smoke=crash"], "are for --rehearse"),
        (["--few", "1"], "are for --rehearse"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_a_step_is_ended_at_its_limit_by_the_real_clock(tmp_path) -> None:
    """With all processes it started; the next step runs, and the call ends."""
    started = tmp_path / "started"
    child = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    steps = (
        schedule.Step("hangs", "", 2.0, command=("-c", hangs)),
        schedule.Step("fails", "", 9.0, command=("-c", "raise SystemExit(3)")),
        schedule.Step("runs", "", 9.0, command=("-c", "print('it ran')")),
    )
    began = time.monotonic()
    whole = Supervisor(steps, tmp_path, seconds=60).run()
    assert time.monotonic() - began < 30, "nothing waited for what hangs"
    found, _ = lines.read(tmp_path / "results.jsonl")
    ended = {x["step"]: x["status"] for x in found if x["event"] == "end"}
    assert ended == {"hangs": "timed out", "fails": "failed", "runs": "done"}
    assert not whole
    assert started.exists()
    alive = subprocess.run(["pgrep", "-f", str(started)], capture_output=True, text=True).stdout
    assert alive == "", "the grandchild ended too"
    assert "it ran" in (tmp_path / "log.txt").read_text(encoding="utf-8")
