"""python -m benchmarks.counts: what a call costs in numbers that do not wobble.

FLOPs of the matrix products that linear cross entropy hands out, and bytes touched at the peak of a
call (as memory.py counts them), of our CPU calls at issue-5's sizes; where valgrind is installed,
machine instructions of the C++ kernels at smaller ones (instructions.py); and where Triton is, the
kernels that a call launches on a GPU (launches.py). They are compared with counts.json, which is
committed: more than it says fails, fewer asks for `--write`. Times are never compared.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks import harness, memory, problems
from groundkern import native

FILE = Path(__file__).with_name("counts.json")
THREADS = 2  # scratch memory is per thread
ISA = {"GROUNDKERN_CPU_ISA": "avx2"}  # panels differ between instruction sets
# Relative; pages differ between runs and allocators, instructions between compilers.
ALLOWED = {"bytes": 0.1, "instructions": 0.1}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# Arguments of the C++ functions that make each of them do one more product with weight's sizes.
ASKED = {
    "linear_cross_entropy_forward": ("weight",),
    "linear_cross_entropy_backward": ("dhidden", "dweight"),
}
CPU = torch.device("cpu")


def cases() -> list[problems.Problem]:
    some = problems.problems(
        shapes=[problems.ISSUE_5],
        ops=list(problems.OPS),
        dtypes=[torch.float32, torch.bfloat16],
        keys=[],
        rows=[],
    )
    return [p for p in some if not p.whole]


def product_flops(run) -> int:
    """FLOPs of the matrix products during a call: torch's, those inside our ops included, and those
    that our launchers ask of C++."""
    counted: list[int] = []

    def noting(function, tensors, **options):
        asked = [name for name in ASKED.get(function.__name__, ()) if tensors[name] is not None]
        for _ in asked:
            counted.append(2 * tensors["weight"].numel() * tensors["target"].numel())
        plain(function, tensors, **options)

    plain = native.call
    with (
        mock.patch.object(native, "call", noting),
        torch.profiler.profile(record_shapes=True, with_flops=True) as profile,
    ):
        run()
    return sum(counted) + sum(e.flops or 0 for e in profile.events() if e.name in PRODUCTS)


def measured() -> Iterator[tuple[str, dict[str, int]]]:
    """Name and counts of each case's native call, forward and backward."""
    torch.set_num_threads(THREADS)
    for problem in cases():
        call = problem.make(CPU)
        run, _ = harness.runner(call, harness.ours(call, "native"), "full")
        run()
        one = harness.Contestant("ours", "ours", run)
        peak = memory.of_contestants([one], CPU)["ours"]
        yield problem.key, {"flops": product_flops(run), "bytes": peak}


def now() -> dict[str, dict[str, int]]:
    """FLOPs and bytes of this tree, from a process with memory.py's allocator settings."""
    return _asked("benchmarks.counts", "--measure", **memory.ALLOCATOR, **ISA)


def launches() -> dict[str, dict[str, int]]:
    """Kernels that calls of this tree launch on a GPU."""
    return _asked("benchmarks.launches", "--json")


def _asked(*program: str, **environment: str) -> dict[str, dict[str, int]]:
    """What a module prints as JSON."""
    result = subprocess.run(
        [sys.executable, "-m", *program],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"counting failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def instructions() -> dict[str, dict[str, int]]:
    """Machine instructions of this tree; RuntimeError without valgrind."""
    from benchmarks.instructions import count

    return {name: {"instructions": n} for name, n in count().items()}


def committed() -> dict[str, dict[str, int]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def comparable(name: str, kind: str) -> bool:
    """Whether a count of this machine can be held to the committed one.

    Where the processor does not multiply bf16, the native loss works in fp32; the committed counts
    are of one that does.
    """
    by_processor = "linear_cross_entropy" in name and name.endswith("bfloat16") and kind != "flops"
    return not by_processor or multiplies_bf16()


def multiplies_bf16() -> bool:
    """As `native_kernels` asks."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def changes(new: dict[str, dict[str, int]], old: dict[str, dict[str, int]]) -> tuple[list, list]:
    """(what grew or is new or gone, what shrank), one sentence each."""
    worse, better = [], []
    for name in sorted({*new, *old}):
        some, others = new.get(name, {}), old.get(name, {})
        for kind in sorted(k for k in {*some, *others} if comparable(name, k)):
            a, b, allowed = some.get(kind), others.get(kind), ALLOWED.get(kind, 0.0)
            sentence = f"{name}: {kind} {b} -> {a}"
            if a is None or b is None or a > b * (1 + allowed):
                worse.append(sentence)
            elif a < b * (1 - allowed):
                better.append(sentence)
    return worse, better


def main() -> int:
    """1 where a count grew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make what is measured the measure")
    parser.add_argument("--measure", action="store_true", help="print the counts as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(dict(measured())))
        return 0
    new, old = now(), committed() if FILE.exists() else {}
    if shutil.which("valgrind"):
        new |= instructions()
    else:
        print("valgrind is not installed: instructions are not counted", file=sys.stderr)
        new |= {name: counts for name, counts in old.items() if name.startswith("counted/")}
    if importlib.util.find_spec("triton"):
        new |= launches()
    else:
        print("triton is not installed: launches are not counted", file=sys.stderr)
        new |= {name: counts for name, counts in old.items() if name.startswith("gpu/")}
    others = [n for n in old if not all(comparable(n, kind) for kind in old[n])]
    if others:
        said = f"not compared, as this processor does not multiply bf16: {', '.join(others)}"
        print(said, file=sys.stderr)
        new |= {name: old[name] for name in others}
    if args.write:
        FILE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
        return 0
    worse, better = changes(new, old)
    for sentence in worse:
        print(f"more: {sentence}", file=sys.stderr)
    for sentence in better:
        print(f"fewer: {sentence}; keep it with python -m benchmarks.counts --write")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
