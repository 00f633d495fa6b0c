"""Triton kernels of the skeleton: one program owns a tile of rows. No atomics."""

import triton.language as tl

from groundkern import tile_kernels as tk
from groundkern.tiles import kernel


@kernel
def _forward_kernel(
    x_ptr,  # [N, D]
    factor_ptr,  # fp32 [N]
    y_ptr,  # [N, D]
    scale,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y = scale factor x."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = tk.load_tile(x_ptr, n, D, n < N, D)
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    tk.store_tile(y_ptr, n, n < N, x * (factor * scale)[:, None], D)


@kernel
def _backward_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    factor_ptr,  # fp32 [N]
    dx_ptr,  # [N, D]
    dfactor_ptr,  # fp32 [N]
    scale,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dx = scale factor dy, dfactor = scale sum_d x dy."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dy = tk.load_tile(dy_ptr, n, D, n < N, D).to(tl.float32)
    x = tk.load_tile(x_ptr, n, D, n < N, D).to(tl.float32)
    factor = tl.load(factor_ptr + n, mask=n < N, other=0.0)
    tk.store_tile(dx_ptr, n, n < N, dy * (factor * scale)[:, None], D)
    tl.store(dfactor_ptr + n, tl.sum(x * dy, 1) * scale, mask=n < N)
