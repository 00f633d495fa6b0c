"""Compiles recorded launches for other GPUs, or ahead of time for the one that is here."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from benchmarks.aot.reading import amdgcn, sass
from benchmarks.aot.reading.code import Instruction, main_loop, shaped
from benchmarks.aot.reading.ttgir import in_flight, narrowed, tensor_memory_shapes
from benchmarks.aot.recorder import GPUTarget, LabelledLaunch, triton
from benchmarks.aot.wanted import unmet


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    shared: bytes of shared memory that one program may use. kind: one of `recorder.KINDS`.
    """

    gpu: GPUTarget
    shared: int
    kind: str = "large"


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, "small"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, "AMD"),
}
MATRIX = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+")
UTCHMMA = "UTCHMMA"  # only TTGIR says its shape


def compiled(launch: LabelledLaunch, name: str, read: bool = True) -> dict[str, object]:
    """What became of one launch on one target.

    A `table.Entry` without the tile, what to print as "matrix", and "failure": None or one
    sentence. read: read the machine code too, for `loop` and all loads and stores of local memory.
    """
    target = TARGETS[name]
    source, options = launch.source(target.gpu)
    try:
        with _running_on(target.gpu):
            kernel = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failure = f"does not compile: {type(error).__name__}: {' '.join(lines[-3:])}"
        return {"matrix": "-", "failure": failure}
    text = kernel.asm["ptx" if target.gpu.backend == "cuda" else "amdgcn"]
    found = MATRIX.search(text)
    dots = "tt.dot" in kernel.asm["ttir"]
    got: dict[str, object] = {
        **_resources(kernel, target.gpu),
        "matrix": found.group() if found else "no matrix instruction" if dots else "no dot",
    }
    if read:
        got |= _read(kernel, target.gpu)
    failure = _failure(launch, target, kernel.asm["ttir"], got, bool(found))
    return {**got, "failure": failure or unmet(launch, name, got.get("loop"))}


@contextmanager
def _running_on(gpu: GPUTarget) -> Iterator[None]:
    """Kernels that ask what they run on are told this; otherwise Triton asks the driver."""

    def current_target() -> GPUTarget:
        return gpu

    current_target.__triton_builtin__ = True  # as Triton's own: no part of a kernel's hash
    with mock.patch.object(triton.language.target_info, "current_target", current_target):
        yield


def _failure(
    launch: LabelledLaunch, target: Target, ttir: str, got: dict[str, object], matrix: bool
) -> str | None:
    dots, fp32, narrow = "tt.dot" in ttir, "float32" in launch.label, narrowed(ttir)
    if got["spills"] and not (dots and fp32):
        return f"spills {got['spills']} bytes"
    if got["shared"] > target.shared:
        return f"shared memory {got['shared']} over the target's {target.shared}"
    if dots and not matrix and not fp32:
        return "dots without a matrix instruction"
    if narrow:
        return f"16-bit where sums are to be fp32: {narrow[0]}"
    return None


def _resources(kernel, gpu: GPUTarget) -> dict[str, int]:
    """Registers and spilled bytes of one thread, shared memory of a program."""
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, stack = (
            int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))
            for key in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        text = _cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        if stack and not any(x.local for x in sass.parse(_cuobjdump(kernel.asm["cubin"], "-sass"))):
            stack = 0  # a stack frame to which nothing is stored is no spill
    return {"registers": registers, "shared": kernel.metadata.shared, "spills": stack}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(kernel) -> list[Instruction]:
    """The machine code of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        return amdgcn.parse(kernel.asm["amdgcn"])
    return sass.parse(_cuobjdump(kernel.asm["cubin"], "-sass"))


def _read(kernel, gpu: GPUTarget) -> dict[str, object]:
    code, ttgir = instructions(kernel), kernel.asm["ttgir"]
    loop, local = main_loop(code), sum(x.local for x in code)
    if loop is None:
        return {"local": local, "loop": None}
    if UTCHMMA in loop.matrix:
        loop = shaped(loop, UTCHMMA, tensor_memory_shapes(ttgir))
    facts = asdict(loop) | {
        "in_flight": in_flight(ttgir),
        "loads": {str(width): count for width, count in loop.loads.items()},
    }
    return {"local": local, "loop": facts}


WORK: list = []  # forked workers read it by index


def _job(function: Callable, place: int) -> object:
    return function(*WORK[place])


def in_processes(function: Callable, work: Iterable[tuple], jobs: int | None) -> Iterator:
    """function(*arguments) for all `work`, in order, in forked processes, because launches do not
    pickle."""
    WORK[:] = work
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("fork")) as pool:
        yield from pool.map(partial(_job, function), range(len(WORK)))
