"""What Triton kernels of several ops share: tiles, masks, dots, statistics, sums of splits."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern.tiles import INTERPRETED, Launcher, helper, kernel, padded

# The interpreter's dot reads 16-bit operands as integers, and its BLAS rounds a @ b and b.T @ a.T
# differently, as no GPU does.
_UPCAST = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """A tensor [N, H, D] as kernels take it, D contiguous."""

    ptr: Tensor
    n: int  # strides
    h: int


class Keys(NamedTuple):
    """A tensor [B, H, S, D] as kernels take it, D contiguous."""

    ptr: Tensor
    b: int  # strides
    h: int
    s: int


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
def stride_of(x, stride, DIM: tl.constexpr):
    """A stride of `Heads` or `Keys`, as one that 16 bytes divide where they divide DIM: so it is
    (`tiles.rows_contiguous`, and 0 is as good as any where a size is 1), but the compiler knows
    only of multiples of 16 elements, and would load heads of 72 element by element."""
    WIDTH: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
    if DIM % WIDTH == 0:
        stride = stride // WIDTH * WIDTH
    return stride


@helper
def store_rows(ptr, at, count, x, DIM: tl.constexpr):
    """x [BLOCK, padded DIM] to rows `at` and on of a contiguous matrix [..., DIM], as many as
    `count`. Where the block begins is added to the pointer, so that what is left to address its
    rows is known to the compiler."""
    i = tl.arange(0, x.shape[0])
    store_tile(ptr + wide(at) * DIM, i, i < count, x, DIM)


@helper
def load_heads(x, n, head, mask, DIM: tl.constexpr):
    """A row tile of `Heads`: [BLOCK_M, padded DIM]."""
    at = n.to(tl.int64) * stride_of(x, x.n, DIM) + head.to(tl.int64) * stride_of(x, x.h, DIM)
    return load_tile(x.ptr, at, 1, mask, DIM)


@helper
def load_keys(x, b, kv_head, j, mask, DIM: tl.constexpr):
    """A key tile of `Keys`: [BLOCK_N, padded DIM]."""
    # The head first, so that a loop over b computes it once.
    head = x.ptr + wide(kv_head) * stride_of(x, x.h, DIM)
    of_sequence = head + wide(b) * stride_of(x, x.b, DIM)
    return load_tile(of_sequence, j, stride_of(x, x.s, DIM), mask, DIM)


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
def log2_scores(raw, scale, softcap):
    """log2 e times the scores of raw = q . k: exp2 is what GPUs have an instruction for."""
    if softcap is None:
        return raw * (scale * _LOG2_E)
    return capped(raw * scale, softcap) * _LOG2_E


@helper
def log_sum2(m, l):
    """log_sum, of m in base 2 and in base e."""
    none = l == 0.0
    return tl.where(none, -float("inf"), (m + tl.log2(tl.where(none, 1.0, l))) / _LOG2_E)


@helper
def log_sum(m, l):
    """m + log l; -inf if l is 0, NaN if it is."""
    none = l == 0.0
    return tl.where(none, -float("inf"), m + tl.log(tl.where(none, 1.0, l)))


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
def visible(start, stop, j0, BLOCK_N: tl.constexpr):
    """The keys that each lane sees: [BLOCK_M, BLOCK_N]."""
    j = j0 + tl.arange(0, BLOCK_N)
    return (j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None])


@helper
def allowed_keys(selection, start, stop, member, j0, keys, BLOCK_N: tl.constexpr):
    """Omega of (S1) on keys j0 .. j0 + BLOCK_N, j0 a multiple of 32: [BLOCK_M, BLOCK_N]."""
    if selection.bits is None:
        allowed = visible(start, stop, j0, BLOCK_N)
    else:
        w = j0 // 32 + tl.arange(0, BLOCK_N // 32)
        bounds = (start[:, None], stop[:, None], member[:, None])
        words = mask_words(selection, bounds[0], bounds[1], bounds[2], w[None, :], keys)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        allowed = tl.reshape(bits, (start.shape[0], BLOCK_N)) != 0
    return allowed


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


@kernel
def _sum_kernel(
    part_ptr,  # fp32 [splits, elements]
    out_ptr,  # [elements]
    splits,
    elements,
    scale,
    AT_A_TIME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = scale * sum over splits of part, always in the same order; loads of AT_A_TIME splits
    wait for one another no more than once."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, AT_A_TIME):
        split = first + tl.arange(0, AT_A_TIME)
        pointers = part_ptr + split.to(tl.int64)[:, None] * elements + i[None, :]
        mask = (split < splits)[:, None] & (i < elements)[None, :]
        total += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
    tl.store(out_ptr + i, (total * scale).to(out_ptr.dtype.element_ty), mask=i < elements)


def sum_parts(part: Tensor, out: Tensor, scale: float, launch: Launcher) -> None:
    """out = scale * part.sum(0), of fp32 [splits, ...]; both contiguous."""
    block, elements = 256, out.numel()
    constants = {"AT_A_TIME": 8, "BLOCK": block, "num_warps": 4}
    arguments = (part, out, part.shape[0], elements, scale)
    launch(_sum_kernel, (-(-elements // block),), arguments, constants)
