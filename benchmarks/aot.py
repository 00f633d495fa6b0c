"""`python -m benchmarks.aot [--subset]`: compile every Triton kernel for GPUs that are not here.

Each op's launchers run on meta tensors with the launch itself replaced by a recorder, so that what
is compiled is what would be launched: the tile table's rows, dtypes, constexprs, alignment. Prints
registers, shared memory, spills and the matrix instruction of each kernel and target; exits with 1
on a spill, on a 16-bit dot without a matrix instruction, on shared memory over the target's limit,
on sums in 16 bits or on a kernel that does not compile; with --check FILE also where a kernel takes
over 10 % more registers or shared memory than the file says. Compiling says nothing about speed.

Spills of fp32 kernels with dots are printed and pass. Their dots are exact (ieee), which no matrix
instruction of NVIDIA's does: every thread multiplies out of registers. At head dimension 128 even
the smallest tile that words of a bit set allow, 16 rows by 32 keys, spills with 4, 8 and 16 warps.
fp32 is there to be compared with.
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
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported below

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import kernels
from groundkern.ops.attention_map import triton_kernels as attention_map
from groundkern.ops.linear_cross_entropy import triton_kernels as linear_cross_entropy
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
LAUNCHED = ("num_warps", "num_stages", "maxnreg")  # options that the code depends on
MATRIX = (r"wgmma\.mma_async", r"tcgen05\.mma", r"mma\.sync", r"v_mfma_\w+")


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    label: str
    kernel: JITFunction
    arguments: tuple
    options: dict

    def key(self, gpu: GPUTarget) -> str:
        """The same for launches that compile to the same code."""
        source, options = self.source(gpu)
        return f"{source.hash()} {[options.get(name) for name in LAUNCHED]}"

    @property
    def tile(self) -> str:
        """Block sizes, warps, stages and register budget."""
        names = [name for name in self.options if name.startswith("BLOCK") or name in LAUNCHED]
        return " ".join(f"{name}={self.options[name]}" for name in names)

    def source(self, gpu: GPUTarget) -> tuple[ASTSource, dict]:
        """(source, options), specialised as the runtime would."""
        backend = make_backend(gpu)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        nvidia = ("maxnreg",) if gpu.backend == "hip" else ()  # as `Tile.options` leaves it out
        given = {name: x for name, x in self.options.items() if name not in nvidia}
        bound, specialization, options = binder(*self.arguments, **given)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, dict(options), bound, specialization, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), parsed.__dict__


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
    source, options = launch.source(target.gpu)
    try:
        kernel = triton.compile(source, target=target.gpu, options=options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        empty = dict.fromkeys(("registers", "shared", "spills", "matrix"), "-")
        return {**empty, "failure": f"does not compile: {lines[-1]}"}
    text = kernel.asm["ptx" if target.gpu.backend == "cuda" else "amdgcn"]
    found = next((match for pattern in MATRIX if (match := re.search(pattern, text))), None)
    registers, spills = _usage(kernel, target.gpu)
    shared = kernel.metadata.shared
    dots, narrow = "tt.dot" in kernel.asm["ttir"], narrowed(kernel.asm["ttir"])
    fp32 = "float32" in launch.label
    failure = None
    if spills and not (dots and fp32):
        failure = f"spills {spills} bytes"
    elif shared > target.shared:
        failure = f"shared memory {shared} over the target's {target.shared}"
    elif dots and not found and not fp32:
        failure = "dots without a matrix instruction"
    elif narrow:
        failure = f"16-bit where sums are to be fp32: {narrow[0]}"
    return {
        "registers": registers,
        "shared": shared,
        "spills": spills,
        "matrix": found.group() if found else "no matrix instruction" if dots else "no dot",
        "failure": failure,
    }


def narrowed(ttir: str) -> list[str]:
    """Lines of Triton IR that sum in 16 bits: a dot whose result is not fp32, or a value rounded
    to 16 bits for anything but an operand of a dot or a store.

    The interpreter dots wider operands, so no test of results there could see either.
    """
    lines = [line.strip() for line in ttir.splitlines()]
    found = [x for x in lines if " tt.dot " in x and not re.search(r"-> tensor<[\dx]+xf32[,>]", x)]
    rounded = {x.split(" = ")[0] for x in lines if re.search(r"= arith\.truncf .*x(bf16|f16)", x)}
    for line in lines:
        if " = arith.truncf" in line or not rounded:
            continue
        name, _, right = line.rpartition(" = ") if " = " in line else ("", "", line)
        if not rounded & set(re.findall(r"%[\w#]+", right)):
            continue
        if re.match(r"tt\.(trans|reshape)|ttg?\.convert_layout", right):
            rounded.add(name)
        elif not re.match(r"tt\.(dot|store)\b", right):
            found.append(line)
    return found


def _usage(kernel, gpu: GPUTarget) -> tuple[int, int]:
    """(registers, bytes spilled) of one thread."""
    if gpu.backend == "hip":
        text = kernel.asm["amdgcn"]
        numbers = [
            re.search(rf"\.{key}:\s+(\d+)", text)
            for key in ("vgpr_count", "private_segment_fixed_size")
        ]
        return tuple(int(match.group(1)) for match in numbers)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        if stack:  # a frame that nothing is stored to is no spill
            command = [str(tool), "-sass", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            stack = stack if re.search(r"\bSTL\b", text) else 0
    return registers, stack


ROWS, HEADS, KV_HEADS, KEYS, COLUMNS, BATCH = 64, 28, 4, 4096, 1024, 2
HIDDEN, VOCABULARY = 2048, 151_936
MAP_CALLS = (  # (function, kind, over); the first two are the subset's
    ("kl", "mean", "visible"),
    ("map", "value", "columns"),
    ("kl", "each", "columns"),
    ("map", "weight", "visible"),
)


def _selection(sets: bool) -> tuple[torch.Tensor | None, ...]:
    """sequence, start, stop, words, set_index."""
    integers = [torch.empty(ROWS, dtype=torch.int32) for _ in range(4)]
    words = torch.empty(8, KEYS // 32, dtype=torch.int32)
    return (*integers[:3], words, integers[3]) if sets else (*integers[:3], None, None)


def _side_attention(dtype: torch.dtype, dim: int, sets: bool, lse: bool, softcap: float) -> None:
    """Forward and, without a given lse, backward."""
    with torch.device("meta"):
        q = torch.empty(ROWS, HEADS, dim, dtype=dtype)
        k, v = (torch.empty(BATCH, KV_HEADS, KEYS, dim, dtype=dtype) for _ in range(2))
        selection, statistics = _selection(sets), torch.empty(ROWS, HEADS)
    options = (dim**-0.5, softcap)
    side_attention.forward(q, k, v, *selection, statistics if lse else None, *options)
    if not lse:
        side_attention.backward(q, statistics, q, k, v, q, statistics, *selection, *options)


def _attention_map(
    dtype: torch.dtype, dim: int, softcap: float, function: str, kind: str, over: str
) -> None:
    """Forward and backward of a KL, of the map or of contributions (kind "value")."""
    with torch.device("meta"):
        q = torch.empty(ROWS, HEADS, dim, dtype=dtype)
        k = torch.empty(BATCH, KV_HEADS, KEYS, dim, dtype=dtype)
        selection = (*_selection(False)[:3], torch.empty(BATCH, COLUMNS, dtype=torch.int32))
        dmap, weight = torch.empty(ROWS, COLUMNS), torch.empty(ROWS, HEADS)
    options = (*selection, None, None, None, over, dim**-0.5, softcap)
    if function == "kl":
        inputs = (q, k, weight, dmap, kind, *options)
        attention_map.kl_forward(*inputs)
        attention_map.kl_backward(dmap[:, 0], *inputs)
    else:
        valued = kind == "value"
        given = (k, q, None) if valued else (None, None, weight)
        inputs = (q, k, *given, valued, *options)
        attention_map.map_forward(*inputs)
        attention_map.map_backward(dmap, *inputs)


def _linear_cross_entropy(dtype: torch.dtype, bias: bool, softcap: float) -> None:
    """Forward and backward, with bags of labels."""
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, HIDDEN, dtype=dtype) for n in (ROWS, VOCABULARY))
        target, index = (torch.empty(ROWS, dtype=torch.int64) for _ in range(2))
        ids, offsets = (torch.empty(n, dtype=torch.int64) for n in (100, BATCH + 1))
        upstream = [torch.empty(ROWS)] * 3
        added = torch.empty(VOCABULARY, dtype=dtype) if bias else None
    inputs = (hidden, weight, added, target, ids, offsets, index, 0.3, -100, softcap, "")
    linear_cross_entropy.forward(*inputs)
    linear_cross_entropy.backward(*upstream, *inputs, True, None)


def launches(subset: bool) -> Iterator[Launch]:
    """Every kernel at every row of its tile table; the subset: bf16 at head dimension 128."""
    dtypes = (torch.bfloat16,) if subset else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for dim in (128,) if subset else (40, 64, 72, 128, 192, 256):
            name = f"{str(dtype).removeprefix('torch.')} D={dim}"
            side = partial(_side_attention, dtype, dim)
            yield from recorded(f"side_attention {name} sets", partial(side, True, False, 0.0))
            if not subset:
                yield from recorded(f"side_attention {name}", partial(side, False, False, 30.0))
            yield from recorded(f"side_attention {name} sets lse", partial(side, True, True, 0.0))
            for call in MAP_CALLS[: 2 if subset else None]:
                maps = partial(_attention_map, dtype, dim, 0.0 if subset else 30.0, *call)
                yield from recorded(f"attention_map {name} {' '.join(call)}", maps)
        for bias, softcap in ((False, 0.0),) if subset else ((False, 0.0), (True, 30.0)):
            name = f"linear_cross_entropy {str(dtype).removeprefix('torch.')} softcap={softcap}"
            loss = partial(_linear_cross_entropy, dtype, bias, softcap)
            yield from recorded(name, loss)


WORK: list[tuple[Launch, str]] = []  # what the worker processes, forked, read by place


def _job(place: int) -> dict[str, object]:
    return compiled(*WORK[place])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="bf16 at head dimension 128 only")
    parser.add_argument("--only", default="", help="launches whose label or kernel contains this")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a --write")
    parser.add_argument(
        "--write", "--json", type=Path, metavar="FILE", help="registers, shared memory, spills"
    )
    options = parser.parse_args()
    if options.only and (options.check or options.write):
        parser.error("--check and --write are for all launches: expected no --only")
    committed = kernels.read(options.check) if options.check else None
    seen: set[str] = set()
    for launch in launches(options.subset):
        for target in options.target or TARGETS:
            key = f"{target} {launch.key(TARGETS[target].gpu)}"
            if key not in seen and options.only in f"{launch.label} {launch.kernel.__name__}":
                seen.add(key)
                WORK.append((launch, target))
    print(f"triton {triton.__version__}: {len(WORK)} kernels; registers and spills per thread")
    print(f"{'target':8}{'kernel':24}{'regs':>5}{'shared':>8}{'spills':>7}  matrix / call")
    failures, table = 0, {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        for (launch, target), got in zip(WORK, pool.map(_job, range(len(WORK)))):
            failures += got["failure"] is not None
            numbers = f"{got['registers']:>5}{got['shared']:>8}{got['spills']:>7}"
            name = launch.kernel.__name__.strip("_")
            print(f"{target:8}{name:24}{numbers}  {got['matrix']} / {launch.label}", flush=True)
            if got["failure"]:
                print(f"  FAIL: {got['failure']}", flush=True)
            facts = {kind: got[kind] for kind in kernels.GROWTH}
            kernels.add(table, target, f"{name} / {launch.label}", launch.tile, facts)
    print(f"{failures} failures")
    if failures:
        return 1
    if options.write:
        kernels.write(options.write, triton.__version__, table)
    return int(committed is not None and kernels.check(committed, triton.__version__, table) > 0)


if __name__ == "__main__":
    sys.exit(main())
