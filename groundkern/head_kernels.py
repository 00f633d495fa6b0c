"""What the Triton kernels of the ops on a head share: logits of a chunk, functions that keep their
digits near 0, and gradients scaled where they stand."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from groundkern.tile_kernels import capped
from groundkern.tiles import helper, kernel


class Logits(NamedTuple):
    x: Tensor  # fp32 [n, V], before bias and softcap
    bias: Tensor | None  # [V]
    softcap: float | None
    V: int


@helper
def load_logits(z, row, columns, mask):
    """The capped logits of one row, -inf outside the mask, and the raw ones."""
    raw = tl.load(z.x + row * z.V + columns, mask=mask, other=0.0)
    if z.bias is not None:
        raw += tl.load(z.bias + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, capped(raw, z.softcap), float("-inf")), raw


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


@kernel
def _scale_kernel(
    x_ptr,  # [rows, columns]
    factor_ptr,  # fp32 scalar, or [rows]
    elements,
    columns,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x times factor, in place; nothing is read or written if a scalar factor is 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    if PER_ROW:
        factor = tl.load(factor_ptr + at // columns, mask=mask, other=0.0)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)
    else:
        factor = tl.load(factor_ptr)
        if factor != 1.0:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def scale_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """x, contiguous, times a scalar or times one number a row of x; without a pass over x where a
    scalar is 1, which the host never learns.

    Args:
        factor: fp32, scalar or [rows].
    """
    if x.numel() == 0:
        return x
    block, factor = 4096, factor.to(torch.float32).contiguous()
    columns = x.numel() // x.shape[0]
    grid = (-(-x.numel() // block),)
    _scale_kernel[grid](x, factor, x.numel(), columns, PER_ROW=factor.dim() == 1, BLOCK=block)
    return x
