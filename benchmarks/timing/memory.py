"""Peak memory of one call, beyond its inputs.

CUDA: torch's max_memory_allocated, less what was allocated before the call. CPU: how far the
resident set of a fresh process rises during the call (VmHWM, reset before it). There glibc maps
every block over 64 KiB by itself and returns it to the system when it is freed. This counts every
page that is touched: by torch, by C++ scratch, by the workspace of matrix products; it does not
count memory that is allocated and never touched. Results and gradients are alive at the end, so
they count.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import problems
from benchmarks.contestants import admission
from benchmarks.timing import processes
from groundkern import buffers

COUNTS = {
    "cpu": "rise of the resident set of a fresh process during the call",
    "cuda": "max_memory_allocated during the call, less what was allocated before",
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status.

    Args:
        field: VmRSS, what is resident now; VmHWM, its peak since `RESET` was written.
    """
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _of_cpu(run: Callable[[], object]) -> int:
    gc.collect()
    buffers.release()  # pooled buffers that this call uses count as its own
    RESET.write_text("5")
    before = resident("VmRSS")
    results = run()
    peak = resident("VmHWM") - before
    del results
    return peak


def _of_cuda(run: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


def of_contestants(found: list[admission.Contestant], device: torch.device) -> dict[str, int]:
    """Bytes by name, of contestants that have run before, so that nothing is set up for the first
    time. Those whose outputs were made beforehand (the floor, a graph) are left out."""
    measure = _of_cuda if device.type == "cuda" else _of_cpu
    peaks = {}
    for c in found:
        if c.run is not None and c.allocates:
            if c.before:
                c.before()
            peaks[c.name] = measure(c.run)
    return peaks


def in_fresh_process(
    problem: problems.Problem, mode: str, *, backends: list[str], compiled: bool
) -> dict[str, int]:
    """`of_contestants` on CPU, in a process of its own; empty if the system has no /proc."""
    if not RESET.exists():
        return {}
    request = {
        "name": problem.name,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "shape": problem.name.split("/")[0],
        "op": problem.op,
        "mode": mode,
        "backends": backends,
        "compiled": compiled,
        "threads": torch.get_num_threads(),
        "keys": [problem.keys] if problem.keys else [],
        "rows": [problem.rows],
        "sweep": [problem.swept] if problem.swept else [],
    }
    question = json.dumps(request)
    return processes.answer("benchmarks.timing.memory", question, environment=ALLOCATOR)


def main() -> None:
    """Reads one request as JSON from the command line, prints the bytes as JSON on the last
    line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timing.memory")
    parser.add_argument("request", type=json.loads)
    request = parser.parse_args().request
    torch.set_num_threads(request["threads"])
    some = problems.problems(
        shapes=[request["shape"]],
        ops=[request["op"]],
        dtypes=[getattr(torch, request["dtype"])],
        keys=request["keys"],
        rows=request["rows"],
        sweep=request["sweep"],
    )
    problem = next(p for p in some if p.name == request["name"])
    device = torch.device("cpu")
    found = admission.contestants(
        problem,
        request["mode"],
        device,
        backends=request["backends"],
        compiled=request["compiled"],
    )
    print(json.dumps(of_contestants(found, device)))


if __name__ == "__main__":
    main()
