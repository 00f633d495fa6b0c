"""pytest-benchmark over every problem and contestant: cases, JSON, comparing, and what may fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import microbenchmarks, problems
from benchmarks.contestants import admission
from benchmarks.contestants.admission import Entry
from benchmarks.microbenchmarks import Case

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = problems.side_attention(
    problems.TINY, torch.float32, shape="quick", rows=4, keys=64, visual=40
)


def run(*words: str) -> str:
    # pytest-benchmark does not time anything in what looks like a worker of pytest-xdist
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.long
def test_cases_are_timed_written_and_compared(tmp_path) -> None:
    paths = [tmp_path / "before.json", tmp_path / "now.json"]
    words = ["--shape", "quick", "--dtype", "float32", "--mode", "forward", "--threads", "1"]
    chosen = "S64xN4-float32 and side_attention and (groundkern or SDPA or FlexAttention)"
    for path in paths:
        timing = ["--benchmark-max-time", "0.01", "--benchmark-json", str(path)]
        quiet = ["-p", "no:xdist", "-p", "no:cacheprovider"]
        out = run("pytest", "benchmarks/microbenchmarks.py", *words, "-k", chosen, *timing, *quiet)
        assert "2 passed, 1 skipped" in out
        assert "refused: FlexAttention has no backward on CPU" in out
    written = json.loads(paths[1].read_text())
    assert written["machine_info"]["groundkern"]["torch"] == torch.__version__
    case = "quick-side_attention-S64xN4-float32-forward"
    found = {x["params"]["case"]: x for x in written["benchmarks"]}
    assert set(found) == {f"{case}-groundkern", f"{case}-SDPA-boolean-mask"}
    assert {x["group"] for x in found.values()} == {"quick/side_attention/S64xN4/float32/forward"}
    ours = found[f"{case}-groundkern"]
    assert ours["stats"]["rounds"] >= 5
    said = ours["extra_info"]
    assert said["contestant"].startswith("groundkern ")
    assert said["shape"] == "4 rows, 32 of 64 keys used, 4/2 heads, dim 16"
    assert said["floor_bytes"] > 0 and said["floor_flops"] > 0
    table = run("pytest_benchmark", "compare", *map(str, paths), "--group-by", "fullname")
    assert table.count(f"[{case}-groundkern]") >= 2


def admitted(adapter) -> admission.Contestant:
    return microbenchmarks.admitted(
        Case(TINY, "full", Entry("other", "peer", adapter)), CPU, "reference"
    )


def test_a_wrong_contestant_fails_and_a_refused_one_is_skipped() -> None:
    def doubled(call):
        step = admission.ours(call, "reference")
        return lambda x: tuple(2 * y for y in step(x))

    def refused(call):
        raise admission.Refused("no such head dimension")

    def broken(call):
        raise RuntimeError("no such kernel")

    assert admitted(lambda call: admission.ours(call, "reference")).status == "timed"
    with pytest.raises(pytest.fail.Exception, match="disagrees: result 0"):
        admitted(doubled)
    with pytest.raises(pytest.skip.Exception, match="refused: no such head dimension"):
        admitted(refused)
    with pytest.raises(pytest.fail.Exception, match="failed: RuntimeError: no such kernel"):
        admitted(broken)


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_every_mode_can_be_repeated(mode) -> None:
    """A backward needs its forward outside the clock, each time."""
    found = microbenchmarks.admitted(Case(TINY, mode, microbenchmarks.OURS), CPU, "reference")
    step, setup = microbenchmarks.timed(found, CPU)
    for _ in range(2):
        assert not setup()
        results, gradients = step()
        assert (bool(results), bool(gradients)) == (mode != "backward", mode != "forward")
