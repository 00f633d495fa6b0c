"""What our CPU calls cost at issue-5's sizes, and how that compares with counts.json."""

import json
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks import problems
from benchmarks.contestants import admission
from benchmarks.timing import memory, processes
from groundkern import native

FILE = processes.ROOT / "benchmarks" / "counts.json"
THREADS = 2  # scratch memory is per thread, so the number of threads is fixed
ISA = {"GROUNDKERN_CPU_ISA": "avx2"}  # the sizes of panels depend on the instruction set
# Relative: pages vary between runs and allocators, instructions between compilers.
ALLOWED = {"bytes": 0.1, "instructions": 0.1}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
# Arguments that each cost a C++ function one more product of weight's sizes.
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
    """FLOPs of the matrix products during a call: torch's, also inside our ops, and those that our
    launchers ask C++ for."""
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
    """Name and counts of each case: its native call, forward and backward."""
    torch.set_num_threads(THREADS)
    for problem in cases():
        call = problem.make(CPU)
        run, _ = admission.runner(call, admission.ours(call, "native"), "full")
        run()
        one = admission.Contestant("ours", "ours", run)
        peak = memory.of_contestants([one], CPU)["ours"]
        yield problem.key, {"flops": product_flops(run), "bytes": peak}


def now() -> dict[str, dict[str, int]]:
    """FLOPs and bytes of this tree, measured in a process with memory.py's allocator settings."""
    environment = {**memory.ALLOCATOR, **ISA}
    return processes.answer("benchmarks.counts", "--measure", environment=environment)


def launches() -> dict[str, dict[str, int]]:
    """Kernels that calls of this tree launch on a GPU."""
    return processes.answer("benchmarks.launches", "--json", environment={})


def instructions() -> dict[str, dict[str, int]]:
    """Machine instructions of this tree; RuntimeError without valgrind."""
    from benchmarks.counts.instructions import count

    return {name: {"instructions": n} for name, n in count().items()}


def committed() -> dict[str, dict[str, int]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def comparable(name: str, kind: str) -> bool:
    """Whether this machine's count can be compared with the committed one.

    On a processor without bf16 products the native loss computes in fp32; the committed counts are
    of one that has them.
    """
    by_processor = "linear_cross_entropy" in name and name.endswith("bfloat16") and kind != "flops"
    return not by_processor or multiplies_bf16()


def multiplies_bf16() -> bool:
    """Asks as `native_kernels` does."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def changes(new: dict[str, dict[str, int]], old: dict[str, dict[str, int]]) -> tuple[list, list]:
    """(what grew, is new or is gone; what shrank), one sentence each."""
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
