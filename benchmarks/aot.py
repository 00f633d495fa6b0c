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


def _side_attention(dtype: torch.dtype, dim: int, sets: bool, lse: bool, softcap: float):
    """Forward and backward at a real shape: 64 rows, group 7, 4096 keys."""
    rows, heads, kv_heads, keys, batch = 64, 28, 4, 4096, 2
    with torch.device("meta"):
        q = torch.empty(rows, heads, dim, dtype=dtype)
        k, v = (torch.empty(batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
        selection = _selection(rows, keys, sets)
        statistics = torch.empty(rows, heads)
    given = statistics if lse else None
    side_attention.forward(q, k, v, *selection, given, dim**-0.5, softcap)
    if not lse:
        rest = (q, k, v, q, statistics, *selection, dim**-0.5, softcap)
        side_attention.backward(q, statistics, *rest)


def _selection(rows: int, keys: int, sets: bool) -> tuple[torch.Tensor | None, ...]:
    """sequence, start, stop, words, set_index."""
    integers = [torch.empty(rows, dtype=torch.int32) for _ in range(4)]
    words = torch.empty(8, keys // 32, dtype=torch.int32)
    return (*integers[:3], words, integers[3]) if sets else (*integers[:3], None, None)


def launches(subset: bool) -> Iterator[Launch]:
    """Every kernel at every row of its tile table; the subset: bf16 at head dimension 128."""
    dtypes = (torch.bfloat16,) if subset else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for dim in (128,) if subset else (64, 72, 128, 256):
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            yield from recorded(
                f"side_attention {name} sets",
                lambda t=dtype, d=dim: _side_attention(t, d, True, False, 0.0),
            )
            yield from recorded(
                f"side_attention {name} sets lse",
                lambda t=dtype, d=dim: _side_attention(t, d, True, True, 0.0),
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="bf16, head dimension 128 only")
    parser.add_argument("--only", default="", help="kernels whose label or name contains this")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = [(launch, t) for launch in launches(options.subset) for t in options.target or TARGETS]
    work = [w for w in work if options.only in f"{w[0].label} {w[0].kernel.__name__}"]
    failures = 0
    for (launch, target), got in zip(work, map(_job, work)):
        failures += got["failure"] is not None
        print(launch.label, launch.kernel.__name__, target, got, flush=True)
    return int(failures > 0)


def _job(work):
    return compiled(*work)


if __name__ == "__main__":
    sys.exit(main())
