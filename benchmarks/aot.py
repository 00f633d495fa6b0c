"""`python -m benchmarks.aot [--subset]`: compile every Triton kernel for GPUs that are not here.

Each op's launchers run on meta tensors with the launch itself replaced by a recorder, so that what is
compiled is what would be launched: the tile table's rows, dtypes, constexprs, alignment. Prints
registers, shared memory, spills and the matrix instruction of each kernel and target; exits with 1 on a
spill, on shared memory over the target's limit or on a kernel that does not compile. Compiling says nothing
about speed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported below

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from groundkern.ops.attention_map import triton_kernels as attention_map
from groundkern.ops.side_attention import triton_kernels as side_attention


@dataclass(frozen=True)
class Target:
    """A device to compile for and the shared memory one program may take, in bytes."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536),
}
MATRIX = (r"wgmma\.mma_async", r"tcgen05\.mma", r"mma\.sync", r"v_mfma_\w+")
NEEDS_NO_MATRIX = "fp32 dots are exact (ieee), which NVIDIA has no matrix instruction for"


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    label: str
    kernel: JITFunction
    arguments: tuple
    options: dict

    def key(self, gpu: GPUTarget) -> str:
        return f"{self.kernel.__name__} {self.source(gpu)[1:]}"

    def source(self, gpu: GPUTarget) -> tuple[ASTSource, dict, dict]:
        """(source, options, signature), specialised as the runtime would."""
        backend = make_backend(gpu)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.arguments, **self.options)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, dict(options), bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return source, parsed.__dict__, signature


def recorded(label: str, run) -> Iterator[Launch]:
    """The launches `run()` would make."""
    seen: list[Launch] = []

    def record(kernel, *arguments, grid, warmup, **options):
        seen.append(Launch(label, kernel, arguments, options))

    launch, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = launch
    yield from seen


def compiled(launch: Launch, name: str) -> dict[str, object]:
    """Registers, shared memory, spills and matrix instruction of one launch on one target."""
    target = TARGETS[name]
    source, options, _ = launch.source(target.gpu)
    try:
        kernel = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"failure": f"does not compile: {lines[-1]}"}
    text = kernel.asm["ptx" if target.gpu.backend == "cuda" else "amdgcn"]
    found = next((match for pattern in MATRIX if (match := re.search(pattern, text))), None)
    registers, spills = _usage(kernel, target.gpu)
    shared = kernel.metadata.shared
    failure = f"spills {spills} bytes" if spills else None
    if shared > target.shared:
        failure = f"shared memory {shared} over the target's {target.shared}"
    return {
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "matrix": found.group() if found else "-",
        "dots": "tt.dot" in kernel.asm["ttir"],
        "failure": failure,
    }


def _usage(kernel, gpu: GPUTarget) -> tuple[int, int]:
    """(registers, bytes of stack) of one thread."""
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        numbers = [re.search(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", "private_segment_fixed_size")]
        return tuple(int(match.group(1)) for match in numbers)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)
