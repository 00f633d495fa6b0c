"""Tiles, grids and launches of the skeleton's Triton kernels."""

import torch
import triton
from torch import Tensor

from groundkern import tiles
from groundkern.op_body import empty_like
from tests.skeleton import Gradients, Inputs, Options, Upstream
from tests.skeleton import triton_kernels as kernels

BLOCK_M = 16  # an untuned first guess; a real op has a table, read with `tiles.tile_key`


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(inputs.x)


def forward(inputs: Inputs, options: Options) -> Tensor:
    x, factor = (tensor.contiguous() for tensor in inputs)
    y, (rows, dim) = empty_like(x), x.shape
    if rows > 0:
        grid = (triton.cdiv(rows, BLOCK_M),)
        kernels._forward_kernel[grid](
            x, factor, y, options.scale, rows, D=dim, BLOCK_M=BLOCK_M, num_warps=1
        )
    return y


def backward(upstream: Upstream, inputs: Inputs, options: Options) -> Gradients:
    """Contiguous; the same bits on every run."""
    dy, x, factor = (tensor.contiguous() for tensor in (*upstream, *inputs))
    dx, dfactor = empty_like(x), torch.empty_like(factor)
    rows, dim = x.shape
    if rows > 0:
        grid = (triton.cdiv(rows, BLOCK_M),)
        operands = (dy, x, factor, dx, dfactor)
        kernels._backward_kernel[grid](
            *operands, options.scale, rows, D=dim, BLOCK_M=BLOCK_M, num_warps=1
        )
    return Gradients(dx, dfactor)
