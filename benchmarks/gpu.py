"""`make gpu`: the GPU tests, then the GPU suite, in one call under nine minutes, without install.

`python -m benchmarks.gpu tests`, `... sweep loss` and so on run single stages, which then share the
time. Everything goes to $OUT (default: bench_results/gpu): pytest's log, CSV and JSON, figures.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import __main__ as program
from benchmarks import plots, suite

ROOT = Path(__file__).parents[1]
TOTAL = 480.0  # seconds: nine minutes less the last problem
NO_TESTS = 5  # pytest's exit status for "none collected"
MODEL = ["--shape", "qwen2.5-vl-7b", "--dtype", "bfloat16"]
# Arguments of `python -m benchmarks`. torch.compile and FlexAttention compile for every shape, so
# only single shapes have them, and the sweep does not.
SUITES = {
    "attention": ["side_attention", "attention_map", *MODEL],
    "sweep": ["side_attention", "attention_map", *MODEL, "--no-compile"]
    + ["--keys", "4096", "32768", "131072", "--rows", "1", "8", "64", "256"],
    "loss": ["linear_cross_entropy", *MODEL],
    "issue_5": ["--shape", "issue-5", "--no-compile"],
}
COMMANDS = {
    "tests": ["-m", "pytest", "-m", "gpu", "tests/ops", "tests/test_lse.py", "-q"],
    "step": ["-m", "benchmarks", "training_step", "--shape", "qwen2.5-vl-3b"]
    + ["--dtype", "bfloat16", "--lora", "64", "--checkpointing", "--tokens", "2048", "8192"]
    + ["--seconds", "3", "--least", "3"],
}
# Shares of the time: what a stage leaves over goes to those after it.
STAGES = {"tests": 4, "attention": 2, "sweep": 3, "loss": 3, "step": 3, "issue_5": 1}
DRAWN = {"attention": plots.overviews, "loss": plots.overviews, "sweep": plots.sweeps}


def command(name: str, out: Path, seconds: float) -> int:
    """The exit status of a stage that is a program of its own; its output in <name>.log."""
    words = [sys.executable, *COMMANDS[name]]
    if name == "step":
        words += ["--csv", f"{out}/step.csv", "--json", f"{out}/step.json", "--plot", str(out)]
    print(" ".join(words[1:]), flush=True)
    path = out / f"{name}.log"
    with path.open("w", encoding="utf-8") as log:
        try:
            status = subprocess.run(
                words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"{name} was stopped after {seconds:.0f} s; run it alone", flush=True)
            return 1
    print(path.read_text(encoding="utf-8")[-2000:], flush=True)
    if name == "tests" and status == NO_TESTS:
        print("no test is marked gpu in this version", flush=True)
        return 0
    return status


def parse(words: list[str] | None) -> list[str]:
    """The stages to run, in their order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(STAGES)}; all by default")
    asked = parser.parse_args(words).stage
    unknown = sorted(set(asked) - set(STAGES))
    if unknown:
        parser.error(f"argument stage: expected some of {', '.join(STAGES)}, got {unknown[0]!r}")
    return [name for name in STAGES if name in (asked or STAGES)]


def main(words: list[str] | None = None) -> int:
    """0 where tests passed and every contestant that ran agreed with ours."""
    stages = parse(words)
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none here.", file=sys.stderr)
        return 1
    start = time.perf_counter()
    out = Path(os.environ.get("OUT") or ROOT / "bench_results" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    console = program.make_console()
    rows: list[suite.Row] = []
    left_out: list[str] = []
    status = 0
    for i, name in enumerate(stages):
        left = TOTAL - (time.perf_counter() - start)
        share = max(0.0, left) * STAGES[name] / sum(STAGES[n] for n in stages[i:])
        if name in COMMANDS:
            status = command(name, out, share) or status
            continue
        limits = ["--seconds", "0.3", "--least", "10", "--deadline", str(share)]
        new, cut = program.run(program.parse([*SUITES[name], *limits]), console)
        rows += [{"stage": name, **row} for row in new]
        left_out += [f"{name}: {problem}" for problem in cut]
        suite.write(out / "gpu.csv", out / "gpu.json", rows, left_out)
        if new and name in DRAWN:
            DRAWN[name](new, out)
    return status or int(bool(suite.failures(rows)))


if __name__ == "__main__":
    sys.exit(main())
