"""How Triton kernels are declared and launched: what is specialised, tile tables, splits."""

import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from groundkern.calls import Call, signature
from groundkern.kept import kept_by

Inputs = TypeVar("Inputs", bound=tuple)
Made = TypeVar("Made")

AMD_STAGES = 2
MOST_SPLITS = 128  # programs among which the keys of a row tile are divided; a power of two

# Kernels imported under TRITON_INTERPRET=1 run on CPU tensors, and only on those.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Decorates what is launched. Triton compiles a kernel again for an integer of 1, for one divisible
# by 16 and for any other. These sizes differ from batch to batch and only steer loops and masks or
# place single numbers, so that nothing is gained by it. Strides, head counts, C and V stay
# specialised: wide loads need to know what divides them.
kernel = triton.jit(
    do_not_specialize=("N", "keys", "entries", "splits", "size", "rows", "blocks", "parts"),
    # One number a program is read from these; a chunk of rows begins anywhere in them.
    do_not_specialize_on_alignment=(
        *("target_ptr", "index_ptr", "dloss_ptr", "dlog_prob_ptr", "dlse_ptr"),
        *("counted_ptr", "kl_ptr"),
    ),
)


def helper(function: Callable):
    """Decorates what kernels call.

    The key of a compiled kernel includes the globals that its helpers read, but only of helpers
    that Triton has hashed before. Hashing them where they are defined gives a kernel the same key
    whichever kernel a process launches first, so that the next process finds it in the cache.
    """
    jitted = triton.jit(function)
    if not INTERPRETED:
        _ = jitted.cache_key
    return jitted


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot serve these operands, in one sentence; None if it can.

    Args:
        tensors: operands whose last dimension is a head dimension.
    """
    present = [x for x in tensors if x is not None]
    device, dtype = present[0].device, present[0].dtype
    if INTERPRETED and device.type != "cpu":
        return f"under TRITON_INTERPRET=1 the Triton kernels run on CPU tensors, not on {device}"
    if not INTERPRETED and device.type != "cuda":
        return (
            "the Triton kernels run on CUDA or ROCm tensors (on CPU tensors only under "
            f"TRITON_INTERPRET=1) and these are on {device}"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 or float16 and not {dtype}"
    if not all(1 <= x.shape[-1] <= 256 for x in present):
        dims = [x.shape[-1] for x in present]
        return f"the Triton kernels take head dimensions 1 to 256, not {dims}"
    return None


def amd() -> bool:
    """Whether devices are AMD's."""
    return torch.version.hip is not None


def at_most(registers: int) -> dict[str, int]:
    """The launch option for so many registers a thread, told to NVIDIA's assembler, which otherwise
    spills a few bytes for the sake of occupancy."""
    return {} if amd() or INTERPRETED else {"maxnreg": registers}


def at_most_stages(stages: int) -> int:
    """How many stages a loop is pipelined in. On AMD at most two: nothing is copied ahead there but
    through registers, and more buffers would not fit its 64 KiB of shared memory."""
    return min(stages, AMD_STAGES) if amd() else stages


class Tile(NamedTuple):
    """block_m flat (row, head) pairs by block_n keys.

    stages: as in `at_most_stages`.
    registers: as in `at_most`; None: the assembler's choice.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int = 2
    registers: int | None = None

    @property
    def constants(self) -> dict[str, int]:
        """Block sizes and launch options."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        options = {"num_warps": self.warps, "num_stages": at_most_stages(self.stages)}
        return blocks | options | ({} if self.registers is None else at_most(self.registers))


class Launcher:
    """Launches kernels again and again with arguments that differ only in which tensors they hold.

    Triton looks at every argument of every launch to find the compiled kernel. Here each kernel is
    looked up once. So one launcher serves one `groundkern.calls.signature` and no other: the same
    dtypes, alignments, integers and absent arguments.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[Callable, list]] = {}

    def __call__(
        self, kernel, grid: tuple[int, ...], arguments: tuple, constants: dict[str, object]
    ) -> None:
        """kernel[grid](*arguments, **constants); arguments come in the kernel's order."""
        found = self._found.get(id(kernel))  # its own hash is slow, and it lives for ever
        if found is not None:
            run, values = found
            run(*arguments, *values)
        elif (compiled := kernel[grid](*arguments, **constants)) is not None:  # interpreted: None
            values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
            self._found[id(kernel)] = compiled[(*grid, 1, 1)[:3]], values


class Scratch:
    """Memory that a kernel needs while it runs, used again by its next launch on the stream."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], tuple] = {}

    def __call__(self, name: str, device: torch.device, make: Callable[[], Made]) -> Made:
        """What `make` returns, or returned before.

        Args:
            name: of the kernel.
        """
        key = name, current_stream(device)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = make()
        return found


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that kernels are launched on."""
    if device.type != "cuda":
        return 0
    if _raw_stream is not None and device.index is not None:
        return _raw_stream(device.index)
    return torch.cuda.current_stream(device).cuda_stream


def aligned(x: Tensor) -> Tensor:
    """x itself, or a copy that is contiguous and begins at a multiple of 16 bytes."""
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself, or a copy if its last dimension is not contiguous or if the rows of a view do not
    begin at multiples of 16 bytes: those would be loaded element by element, which needs so many
    registers that they spill."""
    contiguous = x.stride(-1) == 1 or x.shape[-1] <= 1
    off = any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    if contiguous and x.data_ptr() % 16 == 0 and (x.is_contiguous() or not off):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def prepared(
    call: Call,
    inputs: Inputs,
    operands: int,
    make: Callable[[Call, Inputs], Made],
    *,
    checked: bool = False,
) -> tuple[Made, Inputs]:
    """What `make` makes of a call and of inputs that kernels can read, and these inputs: copies
    only where their signature needs them.

    Made once for all calls that are alike, in this step and in later ones, eager or compiled. So it
    may keep no tensor: `call` and inputs have those.

    Args:
        inputs: a NamedTuple of tensors and None.
        operands: how many of them are read in rows (`rows_contiguous`); the others are contiguous.
        checked: these are what the call was checked with. A backward may be given others, by hooks
            on saved tensors.
    """
    checked = checked and call.of_one_signature
    if checked and (ready := call.prepared.get("launch")) is not None:
        return ready, inputs
    known = call.once("launches", lambda: _launches_like(call, inputs[0].device))
    signed = signature(inputs)
    made, copied = known.get(signed, (None, True))
    if copied:
        ready = [None if x is None else rows_contiguous(x) for x in inputs[:operands]]
        ready += [None if x is None else x.contiguous() for x in inputs[operands:]]
        before, inputs = inputs, type(inputs)(*ready)
        if made is None:
            made = make(call, inputs)
            copied = any(x is not y for x, y in zip(before, inputs, strict=True))
            known[signed] = made, copied
    if checked and not copied:
        call.prepared["launch"] = made
    return made, inputs


def _launches_like(call: Call, device: torch.device) -> dict[Hashable, Any]:
    """What is known of calls that differ from this one in the numbers of their tensors alone."""
    sizes = tuple([x for x in call.plan if isinstance(x, int)])
    of_plan = signature([x for x in call.plan if not isinstance(x, int)])
    options = type(call.options), call.options, call.whole, sizes
    return kept_by(
        (*options, signature(call.selection), of_plan, processors(device), small(device))
    )


@triton.constexpr_function
def padded(dim: int) -> int:
    """The power of two a head dimension is padded to; a dot needs at least 16."""
    return max(16, triton.next_power_of_2(dim))


def width(dim: int) -> int:
    """`padded`, at most 512, for the host: Triton makes that slow to call there, and torch.compile
    takes minutes over a power of two of a size that it does not know."""
    return next((size for size in (16, 32, 64, 128, 256) if dim <= size), 512)


def tile_key(table: dict[tuple, Tile], kind: tuple, dims: Sequence[int], packed: int) -> tuple:
    """The key of the row of a tile table that serves a call.

    Keys are (*kind, largest head dimension), or (*kind, largest head dimension, largest packed
    rows), which is preferred if it serves. A dimension below its padded size counts as one less
    than that, so that the table can have rows for those alone.

    Args:
        dims: the call's head dimensions.
        packed: query rows times query heads of one KV head: what row tiles are cut from.
    """
    need = max(map(width, dims)) - any(dim != width(dim) for dim in dims)
    at = len(kind)
    dim = min(key[at] for key in table if key[:at] == kind and key[at] >= need)
    buckets = [key[-1] for key in table if key[:-1] == (*kind, dim) and key[-1] >= packed]
    return (*kind, dim, min(buckets)) if buckets else (*kind, dim)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU, an H100's where there is none; 2 of a CPU."""
    if device.type != "cuda":
        return 2 if device.type == "cpu" else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def small(device: torch.device) -> bool:
    """Whether a device needs the smaller tiles of the tables: before Hopper, of the Blackwell cards
    that are no data centre's (12.x), and AMD's, with less shared memory (99 KiB for a program on
    12.x) and without a matrix instruction that reads it."""
    if device.type != "cuda":
        return False
    hopper, cards = (9, 0), (12, 0)
    capability = torch.cuda.get_device_capability(device)
    return amd() or not hopper <= capability < cards


def splits(device: torch.device, programs: int, tiles: int) -> int:
    """Into how many programs to split `tiles` so that `programs` times as many fill the device, two
    to a processor, but no more than the longest of them needs: each leaves a part to be merged.
    From shapes and never from values, so that a launch needs no sync."""
    wanted = 2 * processors(device) // max(1, programs)
    most = max(1, min(wanted, tiles, MOST_SPLITS))
    longest = max(1, -(-tiles // most))
    return max(1, -(-tiles // longest))


_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counters(device: torch.device, size: int) -> Tensor:
    """At least `size` int32 zeros for a kernel that leaves them zero.

    Launches on one stream follow each other and share them; other streams have their own, and so
    has every launch that a CUDA graph captures, because graphs may be replayed on any stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    stream = current_stream(device)
    known = _counters.get((device, stream))
    if known is None or known.shape[0] < size:
        known = torch.zeros(max(size, 4096), dtype=torch.int32, device=device)
        _counters[device, stream] = known
    return known
