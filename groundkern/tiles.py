"""What the Triton kernels share: tiles of rows and keys, masks, dots, launch sizes.

A row tile holds consecutive (row, head of one KV head's group) pairs: flat index i is row
i // group and query head kv_head * group + i % group, so that every K and V tile is read once for
the whole group.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Kernels imported under TRITON_INTERPRET=1 run on CPU tensors, and only on those.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's dot reads 16-bit operands as integers, and its BLAS rounds a @ b and b.T @ a.T
# differently, as no GPU does.
_UPCAST = tl.constexpr(INTERPRETED)

# Decorates what is launched. Triton compiles a kernel anew for an integer of 1, for one divisible
# by 16 and for any other. These sizes differ from batch to batch and steer loops and masks or place
# single numbers, which gain nothing by it. Strides, head counts, C and V stay specialised: wide
# loads need to know what divides them.
kernel = triton.jit(
    do_not_specialize=(
        *("N", "keys", "n_words", "entries", "key_tiles", "splits", "size"),
        *("rows", "spans", "parts"),
    ),
    # Read one number a program; a chunk of rows begins anywhere in them.
    do_not_specialize_on_alignment=(
        *("target_ptr", "index_ptr", "dloss_ptr", "dlog_prob_ptr", "dlse_ptr"),
    ),
)


def helper(function: Callable):
    """Decorates what kernels call.

    Triton keys a compiled kernel by the globals that its helpers read as well, as far as those
    helpers have been looked at before. Looked at where they are defined, a kernel has one key,
    whichever kernel a process launches first, and another process finds it in the cache.
    """
    jitted = triton.jit(function)
    if not INTERPRETED:
        _ = jitted.cache_key
    return jitted


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why Triton cannot serve these operands, in one sentence; None when it can.

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


class Tile(NamedTuple):
    """block_m flat (row, head) pairs by block_n keys.

    registers: of a thread, for NVIDIA's assembler, which otherwise spills a few bytes here and
    there for the sake of occupancy; None: its choice.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and torch.version.hip is None and not INTERPRETED:
            options["maxnreg"] = self.registers
        return options


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself, or a copy: where its last dimension is not contiguous, or where rows of a view
    begin elsewhere than at multiples of 16 bytes. Those would be loaded element by element, which
    takes so many registers that they spill."""
    contiguous = x.stride(-1) == 1 or x.shape[-1] <= 1
    off = any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    if contiguous and x.data_ptr() % 16 == 0 and (x.is_contiguous() or not off):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def padded(dim: int) -> int:
    """The power of two a head dimension is padded to; a dot needs at least 16."""
    return max(16, triton.next_power_of_2(dim))


def tile_key(table: dict[tuple, Tile], kind: tuple, dims: Sequence[int], packed: int) -> tuple:
    """The key of the row of a tile table that serves a call.

    Keys are (*kind, largest head dimension), or (*kind, largest head dimension, largest packed
    rows), which is preferred where it serves. A dimension below its padded size counts as one less
    than that: rows may stand for these alone.

    Args:
        dims: the call's head dimensions.
        packed: query rows times query heads of one KV head: what row tiles are cut from.
    """
    need = max(padded(dim) for dim in dims) - any(dim != padded(dim) for dim in dims)
    at = len(kind)
    dim = min(key[at] for key in table if key[:at] == kind and key[at] >= need)
    buckets = [key[-1] for key in table if key[:-1] == (*kind, dim) and key[-1] >= packed]
    return (*kind, dim, min(buckets)) if buckets else (*kind, dim)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2 if device.type == "cpu" else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(device: torch.device, programs: int, tiles: int) -> int:
    """Over how many programs to split `tiles` so that `programs` of them fill the device: read off
    shapes, never off values, so that a launch needs no sync."""
    wanted = 4 * _processors(device) // max(1, programs)
    return max(1, min(wanted, tiles, 64))


@helper
def wide(x):
    """A loop counter as int64, before it is multiplied by a stride."""
    return tl.full((), x, tl.int64)


@helper
def dot(a, b):
    """a [M, K] @ b [K, N] in fp32; fp32 operands are not rounded to tf32."""
    if _UPCAST:
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@helper
def capped(s, softcap):
    """softcap tanh(s / softcap); s itself where softcap is None."""
    if softcap is not None:
        x = s / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        large = tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
        x2 = x * x  # near 0 the difference 1 - e would cancel: the series instead
        small = x * (1.0 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835)))))
        s = softcap * tl.where(tl.abs(x) < 0.25, small, large)
    return s


@helper
def uncapped_gradient(ds, raw, softcap):
    """The gradient at the raw score from the one at the capped score: ds (1 - tanh^2)."""
    if softcap is not None:
        e = tl.exp(tl.abs(raw) * (-2.0 / softcap))
        ds = ds * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return ds


@helper
def load_tile(ptr, at, stride, kept, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows `at` of a matrix with contiguous columns, zeros elsewhere: [BLOCK, BLOCK_DIM]."""
    d = tl.arange(0, BLOCK_DIM)
    pointers = ptr + at.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=kept[:, None] & (d < DIM)[None, :], other=0.0)


@helper
def store_tile(ptr, at, stride, kept, x, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The counterpart of `load_tile`."""
    d = tl.arange(0, BLOCK_DIM)
    pointers = ptr + at.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=kept[:, None] & (d < DIM)[None, :])


@helper
def load_heads(ptr, n, head, stride_n, stride_h, kept, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A row tile of [N, Hq, DIM]: [BLOCK_M, BLOCK_DIM]."""
    at = n.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
    return load_tile(ptr, at, 1, kept, DIM, BLOCK_DIM)


@helper
def row_bounds(n, kept, start_ptr, stop_ptr, set_ptr):
    """start, stop and set of each row; start = stop = 0 outside, set -1 without sets."""
    start = tl.load(start_ptr + n, mask=kept, other=0)
    stop = tl.load(stop_ptr + n, mask=kept, other=0)
    member = tl.full(n.shape, -1, tl.int32)
    if set_ptr is not None:
        member = tl.load(set_ptr + n, mask=kept, other=-1)
    return start, stop, member


@helper
def bits_of(words_ptr, index, n_words, j0, BLOCK_N: tl.constexpr):
    """Bits j0 .. j0 + BLOCK_N of bit set `index`, by whole words; all set where index < 0."""
    w = j0 // 32 + tl.arange(0, BLOCK_N // 32)
    pointers = words_ptr + index.to(tl.int64)[:, None] * n_words + w[None, :]
    kept = (index >= 0)[:, None] & (w < n_words)[None, :]
    words = tl.load(pointers, mask=kept, other=-1)  # [BLOCK_M, BLOCK_N / 32]
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (index.shape[0], BLOCK_N)) != 0


@helper
def allowed_keys(j0, start, stop, member, words_ptr, n_words, BLOCK_N: tl.constexpr):
    """Omega of (S1) on keys j0 .. j0 + BLOCK_N: [BLOCK_M, BLOCK_N]."""
    j = j0 + tl.arange(0, BLOCK_N)
    allowed = (j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None])
    if words_ptr is not None:
        allowed = allowed & bits_of(words_ptr, member, n_words, j0, BLOCK_N)
    return allowed


@helper
def any_of(mask):
    """Whether anything in a [M, N] mask is set."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@kernel
def _live_kernel(
    sequence_ptr, start_ptr, stop_ptr, words_ptr, set_ptr, live_ptr, N, group, n_words, key_tiles,
    entries, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a row of the tile may use a key of tile e % key_tiles, sequence e // key_tiles."""
    n = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)) // group
    sequence = tl.load(sequence_ptr + n, mask=n < N, other=-1)
    start, stop, member = row_bounds(n, n < N, start_ptr, stop_ptr, set_ptr)
    live_ptr += tl.program_id(0).to(tl.int64) * entries
    first = tl.program_id(1) * CHUNK
    for e in range(first, tl.minimum(first + CHUNK, entries)):
        here = sequence == e // key_tiles
        end, index = tl.where(here, stop, 0), tl.where(here, member, -1)
        j0 = (e % key_tiles) * BLOCK_N
        allowed = allowed_keys(j0, start, end, index, words_ptr, n_words, BLOCK_N)
        tl.store(live_ptr + e, any_of(allowed).to(tl.int32))


@kernel
def _compact_kernel(live_ptr, list_ptr, count_ptr, entries, BLOCK: tl.constexpr):
    """The live entries of one row tile, in order, and how many they are."""
    live_ptr += tl.program_id(0).to(tl.int64) * entries
    list_ptr += tl.program_id(0).to(tl.int64) * entries
    count = 0
    for e0 in range(0, entries, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        live = tl.load(live_ptr + e, mask=e < entries, other=0)
        place = count + tl.cumsum(live, 0) - 1
        tl.store(list_ptr + place, e, mask=live > 0)
        count += tl.sum(live, 0)
    tl.store(count_ptr + tl.program_id(0), count)


def live_tiles(
    selection: tuple[Tensor | None, ...],
    group: int,
    batch: int,
    keys: int,
    block_m: int,
    block_n: int,
) -> tuple[Tensor, Tensor, int, int]:
    """The key tiles each row tile has to read, so that loops over them need no branch.

    Args:
        selection: sequence, start, stop [N], words, set_index, contiguous.

    Returns:
        (list int32 [row tiles, entries], count int32 [row tiles], entries, key tiles); an entry is
        sequence * key tiles + key tile.
    """
    sequence, *_, words, _ = selection
    row_tiles, key_tiles = triton.cdiv(len(sequence) * group, block_m), triton.cdiv(keys, block_n)
    entries, chunk = batch * key_tiles, 8
    live, listed = (sequence.new_empty(row_tiles, entries) for _ in range(2))
    count = sequence.new_empty(row_tiles)
    n_words = 0 if words is None else words.shape[1]
    _live_kernel[(row_tiles, triton.cdiv(entries, chunk))](
        *selection, live, len(sequence), group, n_words, key_tiles, entries, CHUNK=chunk,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    _compact_kernel[(row_tiles,)](live, listed, count, entries, BLOCK=1024, num_warps=4)
    return listed, count, entries, key_tiles


@helper
def rows_of_sequence(sequence_ptr, b, N):
    """(first, last + 1) of the rows of sequence b, by counting: `sequence` is sorted."""
    before, upto = 0, 0
    for n0 in range(0, N, 512):
        n = n0 + tl.arange(0, 512)
        sequence = tl.load(sequence_ptr + n, mask=n < N, other=2147483647)
        before += tl.sum((sequence < b).to(tl.int32), 0)
        upto += tl.sum((sequence <= b).to(tl.int32), 0)
    return before, upto


@kernel
def sum_kernel(part_ptr, out_ptr, splits, elements, scale, BLOCK: tl.constexpr):
    """out = scale * sum over splits of part [splits, elements], in split order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + wide(split) * elements + i, mask=i < elements, other=0.0)
    tl.store(out_ptr + i, (total * scale).to(out_ptr.dtype.element_ty), mask=i < elements)


def sum_parts(part: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """scale * part.sum(0), fp32 [splits, ...], contiguous, in the dtype of `like`."""
    out = torch.empty(part.shape[1:], dtype=like.dtype, device=part.device)
    grid = (triton.cdiv(out.numel(), 1024),)
    sum_kernel[grid](part, out, part.shape[0], out.numel(), scale, BLOCK=1024, num_warps=4)
    return out
