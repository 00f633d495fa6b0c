"""What Triton kernels of several ops share: tiles of rows and keys, masks, dots, sums of splits.

A row tile holds consecutive (row, head of one KV head's group) pairs: flat index i is row
i // group and query head kv_head * group + i % group, so that every K and V tile is read once for
the whole group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundkern.selection import Selection
from groundkern.tiles import INTERPRETED, Tile, helper, kernel, padded

# The interpreter's dot reads 16-bit operands as integers, and its BLAS rounds a @ b and b.T @ a.T
# differently, as no GPU does.
_UPCAST = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """A tensor [N, H, D] as kernels take it, D contiguous."""

    ptr: Tensor
    n: int  # strides
    h: int

    @classmethod
    def of(cls, x: Tensor) -> "Heads":
        return cls(x, *x.stride()[:2])


class Keys(NamedTuple):
    """A tensor [B, H, S, D] as kernels take it, D contiguous."""

    ptr: Tensor
    b: int  # strides
    h: int
    s: int

    @classmethod
    def of(cls, x: Tensor) -> "Keys":
        return cls(x, *x.stride()[:3])


class LiveTiles(NamedTuple):
    """The key tiles that each row tile has to read, so that loops over them need no branch.

    An entry is sequence * key tiles + key tile.
    """

    entries: Tensor  # int32 [row tiles, B * key tiles], of which the first `count` are set
    count: Tensor  # int32 [row tiles]


class Attention(NamedTuple):
    """What kernels over rows and their keys read; the sizes that say how wide loads may be."""

    q: Heads  # [N, Hq, D]
    k: Keys  # [B, Hkv, S, D]
    v: Keys | None  # [B, Hkv, S, Dv]
    selection: Selection  # contiguous
    live: LiveTiles | None  # of kernels over row tiles
    scale: float
    softcap: float | None
    heads: int  # Hq
    group: int  # Hq / Hkv


@helper
def wide(x):
    """An integer as int64, before it is multiplied by a stride."""
    return tl.full((), x, tl.int64)


@helper
def dot(a, b):
    """a [M, K] @ b [K, N] in fp32; fp32 operands are not rounded to tf32."""
    if _UPCAST:
        return tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@helper
def dot_vector(a, b, AXIS: tl.constexpr):
    """The sum over AXIS of a * b in fp32, without matrix instructions; b broadcasts to a."""
    if _UPCAST:
        return tl.sum(a.to(tl.float64) * b.to(tl.float64), AXIS).to(tl.float32)
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), AXIS)


@helper
def _tanh(x):
    """tanh x and its slope 1 - tanh^2 x."""
    near = tl.abs(x) < 0.5
    s = x * x  # the series, where 1 - e would cancel
    t = -17 / 315 + s * (62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075)))
    t = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * t)))
    e = tl.exp(-2.0 * tl.abs(x))
    tail = (1.0 - e) / (1.0 + e)
    slope = tl.where(near, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return tl.where(near, t, tl.where(x < 0, -tail, tail)), slope


@helper
def capped(x, softcap):
    """softcap tanh(x / softcap); x itself if softcap is None."""
    if softcap is not None:
        t, _ = _tanh(x / softcap)
        x = t * softcap
    return x


@helper
def uncapped_gradient(dx, raw, softcap):
    """The gradient at the raw value from dx, the one at the capped value: dx (1 - tanh^2)."""
    if softcap is not None:
        _, slope = _tanh(raw / softcap)
        dx = dx * slope
    return dx


@helper
def load_tile(ptr, at, stride, mask, DIM: tl.constexpr):
    """Rows `at` of a matrix with contiguous columns, 0 outside the mask: [BLOCK, padded DIM]."""
    d = tl.arange(0, padded(DIM))
    pointers = ptr + at.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=mask[:, None] & (d < DIM)[None, :], other=0.0)


@helper
def store_tile(ptr, at, mask, x, DIM: tl.constexpr):
    """x [BLOCK, padded DIM] to rows `at` of a contiguous matrix [..., DIM]."""
    d = tl.arange(0, padded(DIM))
    pointers = ptr + at.to(tl.int64)[:, None] * DIM + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < DIM)[None, :])


@helper
def load_heads(x, n, head, mask, DIM: tl.constexpr):
    """A row tile of `Heads`: [BLOCK_M, padded DIM]."""
    return load_tile(x.ptr, n.to(tl.int64) * x.n + head.to(tl.int64) * x.h, 1, mask, DIM)


@helper
def load_keys(x, b, kv_head, j, mask, DIM: tl.constexpr):
    """A key tile of `Keys`: [BLOCK_N, padded DIM]."""
    head = x.ptr + wide(kv_head) * x.h  # first, so that a loop over b computes it once
    return load_tile(head + wide(b) * x.b, j, x.s, mask, DIM)


@helper
def online_max(m, s):
    """The running maximum after scores s [M, N], and the shift to use with it: 0 for -inf."""
    m_new = tl.maximum(m, tl.max(s, 1))
    return m_new, tl.where(m_new == -float("inf"), 0.0, m_new)


@helper
def online_sum(m, l, s):
    """The running maximum m and sum l of exp(s - m), after scores s [M, N]."""
    m_new, shift = online_max(m, s)
    return m_new, l * tl.exp(m - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)


@helper
def partial_at(x, n, head, N):
    """Where [splits, N, Hq] tensors have the row tile of program (row tile, KV head, split)."""
    return (wide(tl.program_id(2)) * N + n) * x.heads + head


@helper
def log2_scores(raw, scale, softcap):
    """log2 e times the scores of raw = q . k: exp2 is what GPUs have an instruction for."""
    if softcap is None:
        return raw * (scale * _LOG2_E)
    return capped(raw * scale, softcap) * _LOG2_E


@helper
def log_sum2(m, l):
    """log_sum, of m in base 2 and in base e."""
    some = l > 0.0
    return tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) / _LOG2_E, -float("inf"))


@helper
def log_sum(m, l):
    """m + log l; -inf if l is 0."""
    some = l > 0.0
    return tl.where(some, m + tl.log(tl.where(some, l, 1.0)), -float("inf"))


@helper
def row_tile(N, group, BLOCK_M: tl.constexpr):
    """Row, query head and whether it is in range, of the row tile of program (row tile, KV head):
    [BLOCK_M] each."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = i // group
    return n, tl.program_id(1) * group + i % group, n < N


@helper
def rows_from(x, i0, last, BLOCK_M: tl.constexpr):
    """Row, query head and whether it is before row `last`, of the row tile that begins at flat
    index i0, of program (key tile, KV head): [BLOCK_M] each."""
    i = i0 + tl.arange(0, BLOCK_M)
    n = i // x.group
    return n, tl.program_id(1) * x.group + i % x.group, n < last


@helper
def key_tile(size, BLOCK_N: tl.constexpr):
    """Sequence, first key and keys [BLOCK_N] of program (key tile of all sequences, KV head)."""
    tiles = tl.cdiv(size, BLOCK_N)
    b, j0 = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N
    return b, j0, j0 + tl.arange(0, BLOCK_N)


@helper
def row_bounds(selection, n, mask):
    """start, stop and set of each row; start = stop = 0 outside the mask, set -1 without sets."""
    start = tl.load(selection.start + n, mask=mask, other=0)
    stop = tl.load(selection.stop + n, mask=mask, other=0)
    member = tl.full(n.shape, -1, tl.int32)
    if selection.set_index is not None:
        member = tl.load(selection.set_index + n, mask=mask, other=-1)
    return start, stop, member


@helper
def mask_words(selection, start, stop, member, w, keys):
    """Omega of (S1) on 32 keys at a time, as the bits of an int32: those of word w of each row.

    start, stop, member and w broadcast to one another.
    """
    low = tl.minimum(tl.maximum(start - w * 32, 0), 32)
    high = tl.minimum(tl.maximum(stop - w * 32, 0), 32)
    ones = tl.full(low.shape, -1, tl.int32)
    words = tl.where(low < 32, ones << (low % 32), 0)  # a shift by 32 is not defined
    words = words & tl.where(high < 32, ~(ones << (high % 32)), -1)
    if selection.bits is not None:
        width = tl.cdiv(keys, 32)
        pointers = selection.bits + member.to(tl.int64) * width + w
        words = words & tl.load(pointers, mask=(member >= 0) & (w < width), other=-1)
    return words


@helper
def allowed_keys(selection, start, stop, member, j0, keys, BLOCK_N: tl.constexpr):
    """Omega of (S1) on keys j0 .. j0 + BLOCK_N, j0 a multiple of 32: [BLOCK_M, BLOCK_N]."""
    w = j0 // 32 + tl.arange(0, BLOCK_N // 32)
    bounds = (start[:, None], stop[:, None], member[:, None])
    words = mask_words(selection, bounds[0], bounds[1], bounds[2], w[None, :], keys)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (start.shape[0], BLOCK_N)) != 0


@helper
def allowed_rows(selection, start, stop, member, j0, keys, BLOCK_N: tl.constexpr):
    """The same, keys first: [BLOCK_N, BLOCK_M]."""
    w = j0 // 32 + tl.arange(0, BLOCK_N // 32)
    bounds = (start[None, :], stop[None, :], member[None, :])
    words = mask_words(selection, bounds[0], bounds[1], bounds[2], w[:, None], keys)
    bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.reshape(bits, (BLOCK_N, start.shape[0])) != 0


@helper
def any_of(mask):
    """Whether anything in a [M, N] mask is set."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0


@helper
def load_rows(x, N, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the row tile of program (row tile, KV head): row, query head, whether it is in range,
    (sequence, (start, stop, set)) [BLOCK_M], and q [BLOCK_M, padded D]."""
    n, head, mask = row_tile(N, x.group, BLOCK_M)
    sequence = tl.load(x.selection.sequence + n, mask=mask, other=-1)
    bounds = row_bounds(x.selection, n, mask)
    return n, head, mask, (sequence, bounds), load_heads(x.q, n, head, mask, D)


@helper
def load_live_tile(
    x,  # `Attention`
    e,
    rows,  # of `load_rows`
    keys,
    entries,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of entry e of a row tile's live tiles: sequence, keys [BLOCK_N], k [BLOCK_N, padded D] and
    which keys each row may use [BLOCK_M, BLOCK_N]."""
    entry = tl.load(x.live.entries + wide(tl.program_id(0)) * entries + e)
    key_tiles = tl.cdiv(keys, BLOCK_N)
    b, j0 = entry // key_tiles, (entry % key_tiles) * BLOCK_N
    sequence, bounds = rows
    start, stop, member = bounds
    end = tl.where(sequence == b, stop, 0)
    allowed = allowed_keys(x.selection, start, end, member, j0, keys, BLOCK_N)
    j = j0 + tl.arange(0, BLOCK_N)
    return b, j, load_keys(x.k, b, tl.program_id(1), j, j < keys, D), allowed


@kernel
def _live_kernel(
    selection,  # `Selection`
    live_ptr,  # int32 [row tiles, entries]
    N,
    group,
    keys,
    entries,
    CHUNK: tl.constexpr,  # entries of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a row of the tile may use a key of tile e % key tiles, sequence e // key tiles."""
    n = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)) // group
    sequence = tl.load(selection.sequence + n, mask=n < N, other=-1)
    start, stop, member = row_bounds(selection, n, n < N)
    live_ptr += wide(tl.program_id(0)) * entries
    key_tiles = tl.cdiv(keys, BLOCK_N)
    first = tl.program_id(1) * CHUNK
    for e in range(first, tl.minimum(first + CHUNK, entries)):
        here = sequence == e // key_tiles
        end, index = tl.where(here, stop, 0), tl.where(here, member, -1)
        j0 = (e % key_tiles) * BLOCK_N
        allowed = allowed_keys(selection, start, end, index, j0, keys, BLOCK_N)
        tl.store(live_ptr + e, any_of(allowed).to(tl.int32))


@kernel
def _compact_kernel(
    live_ptr,  # int32 [row tiles, entries]
    live,  # `LiveTiles`, written
    entries,
    BLOCK: tl.constexpr,
):
    """The live entries of one row tile, in order, and how many they are."""
    live_ptr += wide(tl.program_id(0)) * entries
    entries_ptr = live.entries + wide(tl.program_id(0)) * entries
    count = 0
    for e0 in range(0, entries, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        alive = tl.load(live_ptr + e, mask=e < entries, other=0)
        place = count + tl.cumsum(alive, 0) - 1
        tl.store(entries_ptr + place, e, mask=alive > 0)
        count += tl.sum(alive, 0)
    tl.store(live.count + tl.program_id(0), count)


def live_tiles(selection: Selection, group: int, batch: int, keys: int, tile: Tile) -> LiveTiles:
    """The key tiles that each row tile of `tile.block_m` rows and heads has to read.

    Args:
        selection: contiguous.
        group: query heads of one KV head.
    """
    rows = len(selection.sequence)
    row_tiles, key_tiles = triton.cdiv(rows * group, tile.block_m), triton.cdiv(keys, tile.block_n)
    entries, chunk = batch * key_tiles, 8
    alive, listed = (selection.sequence.new_empty(row_tiles, entries) for _ in range(2))
    live = LiveTiles(listed, selection.sequence.new_empty(row_tiles))
    _live_kernel[row_tiles, triton.cdiv(entries, chunk)](
        selection,
        alive,
        rows,
        group,
        keys,
        entries,
        CHUNK=chunk,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=4,
    )
    _compact_kernel[row_tiles,](alive, live, entries, BLOCK=1024, num_warps=4)
    return live


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
def _sum_kernel(
    part_ptr,  # fp32 [splits, elements]
    out_ptr,  # [elements]
    splits,
    elements,
    scale,
    BLOCK: tl.constexpr,
):
    """out = scale * sum over splits of part, in split order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(part_ptr + wide(split) * elements + i, mask=i < elements, other=0.0)
    tl.store(out_ptr + i, (total * scale).to(out_ptr.dtype.element_ty), mask=i < elements)


def sum_parts(part: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """scale * part.sum(0), fp32 [splits, ...], contiguous, in the dtype of `like`."""
    out = torch.empty(part.shape[1:], dtype=like.dtype, device=part.device)
    grid = (triton.cdiv(out.numel(), 1024),)
    _sum_kernel[grid](part, out, part.shape[0], out.numel(), scale, BLOCK=1024, num_warps=4)
    return out
