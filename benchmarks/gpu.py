"""`make gpu`: the GPU tests, then the GPU suite, in one call under nine minutes, without install.

Everything goes to $OUT (default: bench_results/gpu): pytest's log, CSV and JSON, figures.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import __main__ as program
from benchmarks import plots, suite

ROOT = Path(__file__).parents[1]
TOTAL, TESTS = 480.0, 200.0  # seconds: nine minutes less the last problem; the tests' share
NO_TESTS = 5  # pytest's exit status for "none collected"
MODEL = ["--shape", "qwen2.5-vl-7b", "--dtype", "bfloat16"]
# Name, share of the time left, arguments. torch.compile and FlexAttention compile for every shape,
# so only single shapes have them, and the sweep does not.
STAGES = (
    ("attention", 0.4, ["side_attention", "attention_map", *MODEL]),
    (
        "sweep",
        0.5,
        ["side_attention", "attention_map", *MODEL, "--no-compile"]
        + ["--keys", "4096", "32768", "131072", "--rows", "1", "8", "64", "256"],
    ),
    ("loss", 0.7, ["linear_cross_entropy", *MODEL]),
    ("issue_5", 1.0, ["--shape", "issue-5", "--no-compile"]),
)
DRAWN = {"attention": plots.overviews, "loss": plots.overviews, "sweep": plots.sweeps}


def tests(out: Path) -> int:
    """pytest -m gpu on the ops' tests, which need nothing but torch; the log in gpu_tests.log."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/ops", "-q"]
    print(" ".join(command[1:]), flush=True)
    with (out / "gpu_tests.log").open("w", encoding="utf-8") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=TESTS
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"the GPU tests were stopped after {TESTS:.0f} s", flush=True)
            return 1
    print((out / "gpu_tests.log").read_text(encoding="utf-8")[-2000:], flush=True)
    if status == NO_TESTS:
        print("no test is marked gpu in this version", flush=True)
        return 0
    return status


def main() -> int:
    """0 where tests passed and every contestant that ran agreed with ours."""
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 1
    start = time.perf_counter()
    out = Path(os.environ.get("OUT") or ROOT / "bench_results" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    status = tests(out)
    console = program.make_console()
    rows: list[suite.Row] = []
    left_out: list[str] = []
    for name, share, arguments in STAGES:
        left = TOTAL - (time.perf_counter() - start)
        limits = ["--seconds", "0.3", "--least", "10", "--deadline", str(max(0.0, share * left))]
        new, cut = program.run(program.parse([*arguments, *limits]), console)
        rows += [{"stage": name, **row} for row in new]
        left_out += [f"{name}: {problem}" for problem in cut]
        suite.write(out / "gpu.csv", out / "gpu.json", rows, left_out)
        if new and name in DRAWN:
            DRAWN[name](new, out)
    return status or int(bool(suite.failures(rows)))


if __name__ == "__main__":
    sys.exit(main())
