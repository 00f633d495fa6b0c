"""What the Triton kernels of the ops on an output head share: one chunk of logits in memory, how it
is loaded and ranked; functions that keep their digits near 0; gradients scaled where they stand."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundkern.tile_kernels import capped, wide
from groundkern.tiles import INTERPRETED, helper, kernel, processors

LOWEST = tl.constexpr(-(2**63))
RANKED = 1024  # vocabulary entries per step of `_top_kernel`
SCALED = 4096  # numbers per step of `_scale_kernel`


def unsupported(*hidden: Tensor) -> str | None:
    """Why Triton cannot serve heads of these states, in one sentence; None if it can."""
    kind = hidden[0].device.type
    if any(x.dtype == torch.float64 for x in hidden):
        return "the kernels sum in fp32, which is too narrow for fp64"
    if kind == "cpu" and not INTERPRETED:
        return "on CPU tensors the kernels run only under TRITON_INTERPRET=1"
    return None if kind in ("cpu", "cuda") else f"there is no kernel for {kind} tensors"


class Logits(NamedTuple):
    x: Tensor  # [n, stride] of which V columns are used: before bias, softcap and temperature
    bias: Tensor | None  # [V]
    softcap: float | None
    sharpness: float  # 1 / temperature
    stride: int  # a multiple of 64, so that a row is loaded in wide pieces whatever V is
    V: int


@helper
def load_logits(z, row, columns, mask):
    """Some logits of one row, capped and before temperature (-inf outside the mask), and raw."""
    raw = tl.load(z.x + row * z.stride + columns, mask=mask, other=0.0).to(tl.float32)
    if z.bias is not None:
        raw += tl.load(z.bias + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, capped(raw, z.softcap), float("-inf")), raw


@helper
def load_row(z, row, at, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """A piece of one row: logits, capped and before temperature, and raw, and their columns.

    A blanked logit is -inf. ENDS: the piece may go beyond V, where logits are -inf too.
    """
    columns = at + tl.arange(0, BLOCK)
    of_row = z.x + row * z.stride + columns
    if ENDS:
        # Read to the stride: a mask that ends at an odd V would have every number read by itself.
        raw = tl.load(of_row, mask=columns < z.stride, other=0.0).to(tl.float32)
    else:
        raw = tl.load(of_row).to(tl.float32)
    if z.bias is not None:
        raw += tl.load(z.bias + columns, mask=columns < z.V, other=0.0).to(tl.float32)
    x = capped(raw, z.softcap)
    if z.softcap is not None:
        x = tl.where(raw == float("-inf"), raw, x)
    if ENDS:
        x = tl.where(columns < z.V, x, float("-inf"))
    return x, raw, columns


@helper
def blank(z, row, column, inside):
    """Take one logit out of a row: what it is (as `load_logits`), raw, and as it was in memory; in
    its place comes -inf. Nothing happens unless `inside`."""
    at_ptr = z.x + row * z.stride + column
    before = tl.load(at_ptr, mask=inside, other=0.0)
    x, raw = load_logits(z, row, column, inside)
    tl.debug_barrier()  # all have read before any writes
    tl.store(at_ptr, tl.where(inside, float("-inf"), raw).to(before.dtype), mask=inside)
    tl.debug_barrier()
    return x, raw, before


@helper
def exponential(x, top, sharpness):
    """exp((x - top) sharpness): the difference first, so that nothing common to both is rounded."""
    return tl.exp2((x - top) * (sharpness * 1.4426950408889634))


@helper
def log1p(x):
    """log(1 + x): log(y) x / (y - 1) of the rounded y = 1 + x, which is x where y is 1."""
    y = 1.0 + x
    one = y == 1.0
    return tl.where(one, x, tl.log(y) * (x / tl.where(one, 1.0, y - 1.0)))


@helper
def expm1(x):
    """exp(x) - 1; for |x| < 1/2 by its series, where the difference would cancel."""
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    t = 1 / 720 + near * (1 / 5040 + near * (1 / 40320))
    t = 1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near * t)))
    return tl.where(tl.abs(x) < 0.5, near + near * near * t, tl.exp(x) - 1.0)


@helper
def _ranked(z, row, columns, mask):
    """Integers in the order of the logits, and among equal ones of descending columns."""
    x = load_logits(z, row, columns, mask)[0]
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 as 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return tl.where(mask, ordered * 2**32 + (0x7FFFFFFF - columns.to(tl.int64)), LOWEST)


@kernel
def _top_kernel(
    z,  # `Logits`
    values_ptr,  # fp32 [n, K]
    ids_ptr,  # int64 [n, K]
    K,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The K largest logits of a row: the largest of each block, and after each one that is taken
    the next largest of its block."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    tops = tl.full((BLOCKS,), LOWEST, tl.int64)
    for at in range(0, z.V, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        highest = tl.max(_ranked(z, row, columns, columns < z.V), 0)
        tops = tl.where(block == at // BLOCK, highest, tops)
    for k in range(K):
        best = tl.max(tops, 0)
        column = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        some = best != LOWEST
        column = tl.where(some, column, 0)
        x = load_logits(z, row, column, some)[0]
        tl.store(values_ptr + row * K + k, x * z.sharpness)
        tl.store(ids_ptr + row * K + k, tl.where(some, column, -1))
        columns = column // BLOCK * BLOCK + tl.arange(0, BLOCK)
        ranked = _ranked(z, row, columns, columns < z.V)
        below = tl.max(tl.where(ranked < best, ranked, LOWEST), 0)
        tops = tl.where(block == column // BLOCK, tl.where(some, below, LOWEST), tops)


@kernel
def _scale_kernel(
    x_ptr,  # [rows, columns]
    factor_ptr,  # a number, or [rows]
    count,  # specialised: a mask that ends anywhere would have numbers loaded one by one
    columns,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x times the factor, in place; nothing is moved if one number is 1."""
    of_all = 0.0
    if not PER_ROW:
        of_all = tl.load(factor_ptr).to(tl.float32)
    if of_all != 1.0:
        step = wide(tl.num_programs(0)) * BLOCK
        for at in tl.range(wide(tl.program_id(0)) * BLOCK, wide(count), step):
            i = tl.multiple_of(at, BLOCK) + tl.arange(0, BLOCK)
            factor = of_all
            if PER_ROW:
                factor = tl.load(factor_ptr + i // columns, mask=i < count, other=0.0)
            x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
            tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), mask=i < count)


def largest(z: Logits, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits over the temperature, fp32 [rows, count], of each row, descending, and
    their columns, among equal ones the smallest first; -inf and -1 beyond the vocabulary."""
    values = z.x.new_empty(rows, count, dtype=torch.float32)
    ids = z.x.new_empty(rows, count, dtype=torch.int64)
    blocks = triton.next_power_of_2(triton.cdiv(z.V, RANKED))
    _top_kernel[rows,](z, values, ids, count, BLOCKS=blocks, BLOCK=RANKED)
    return values, ids


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous, times a number or times one number a row, in place. Nothing is moved where one
    number is 1, which only the device sees.

    Args:
        factor: fp32, scalar or [rows], on x's device.
    """
    programs = min(8 * processors(x.device), triton.cdiv(x.numel(), SCALED))
    if programs > 0:
        per_row, columns = factor.dim() == 1, x.numel() // x.shape[0]
        factor = factor.to(torch.float32).contiguous()
        _scale_kernel[programs,](x, factor, x.numel(), columns, PER_ROW=per_row, BLOCK=SCALED)
    return x
