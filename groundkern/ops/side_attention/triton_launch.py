"""Tiles, grids and launches of the Triton kernels of side attention."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from groundkern import tiles
from groundkern.op_body import empty_like, zeros_like
from groundkern.ops.side_attention import Inputs, Options, Outputs
from groundkern.ops.side_attention import triton_kernels as kernels
from groundkern.selection import Selection
from groundkern.tile_kernels import Attention, Heads, Keys, LiveTiles, live_tiles, sum_parts
from groundkern.tiles import Tile

# (kernel, 4-byte operands, largest head dimension[, largest packed rows]) -> tile; 63, 127 and 255
# are for dimensions that are padded to the next power of two, whose masks take registers. Every row
# is an untuned first guess: compiled for sm_80, sm_90, sm_100 and gfx942 by `make aot`, never timed
# on a device. `make gpu` finds better ones.
TILES = {
    ("forward", False, 63): Tile(64, 32, 8),
    ("forward", False, 64): Tile(64, 32, 8),
    ("forward", False, 127): Tile(32, 32, 8),
    ("forward", False, 128): Tile(64, 32, 8),
    ("forward", False, 255): Tile(16, 32, 8),
    ("forward", False, 256): Tile(32, 32, 8),
    ("forward", True, 64): Tile(16, 32, 8),
    ("forward", True, 128): Tile(16, 32, 8),
    ("forward", True, 256): Tile(16, 32, 8, 1),
    ("dkv", False, 63): Tile(16, 64, 8),
    ("dkv", False, 64): Tile(32, 64, 4),
    ("dkv", False, 127): Tile(32, 32, 4, 2, 255),
    ("dkv", False, 128): Tile(16, 64, 8),
    ("dkv", False, 255): Tile(16, 32, 8),
    ("dkv", False, 256): Tile(16, 32, 8),
    ("dkv", True, 64): Tile(16, 32, 4),
    ("dkv", True, 128): Tile(16, 32, 8, 1),
    ("dkv", True, 256): Tile(16, 32, 8, 1),
    ("dq", False, 63): Tile(64, 32, 4),
    ("dq", False, 64): Tile(64, 64, 4),
    ("dq", False, 127): Tile(16, 32, 8, 2, 255),
    ("dq", False, 128): Tile(64, 32, 4),
    ("dq", False, 255): Tile(16, 32, 4),
    ("dq", False, 256): Tile(16, 32, 8),
    ("dq", True, 64): Tile(16, 32, 4),
    ("dq", True, 128): Tile(16, 32, 8, 1),
    ("dq", True, 256): Tile(16, 32, 8, 1),
}


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(*inputs[:3])


class _Launch(NamedTuple):
    """What the kernels over rows and keys are launched with, for one row of the table."""

    inputs: Inputs  # rows contiguous
    selection: Selection  # contiguous
    options: Options
    tile: Tile

    @classmethod
    def of(cls, name: str, inputs: Inputs, selection: Selection, options: Options) -> "_Launch":
        q, k, v, _ = inputs
        packed = q.shape[0] * (q.shape[1] // k.shape[1])
        kind = (name, q.dtype == torch.float32)
        key = tiles.tile_key(TILES, kind, [q.shape[2], v.shape[3]], packed)
        return cls(inputs, selection, options, TILES[key])

    @property
    def group(self) -> int:
        return self.inputs.q.shape[1] // self.inputs.k.shape[1]

    def attention(self, live: LiveTiles | None) -> Attention:
        q, k, v, _ = self.inputs
        operands = (Heads.of(q), Keys.of(k), Keys.of(v), self.selection, live)
        scale, softcap = self.options
        return Attention(*operands, scale, softcap or None, q.shape[1], self.group)

    @property
    def constants(self) -> dict[str, int]:
        dims = {"D": self.inputs.q.shape[2], "DV": self.inputs.v.shape[3]}
        return dims | self.tile.constants

    def rows_grid(self) -> tuple[int, int, int]:
        """(row tiles, KV heads, key splits)."""
        q, k = self.inputs[:2]
        row_tiles = triton.cdiv(q.shape[0] * self.group, self.tile.block_m)
        key_tiles = triton.cdiv(k.shape[2], self.tile.block_n)
        splits = tiles.splits(q.device, row_tiles * k.shape[1], key_tiles)
        return row_tiles, k.shape[1], splits

    def live(self) -> LiveTiles:
        batch, _, keys, _ = self.inputs.k.shape
        return live_tiles(self.selection, self.group, batch, keys, self.tile)


def forward(inputs: Inputs, selection: Selection, options: Options) -> Outputs:
    """With fp16 values the given lse is not used: p = exp(s - lse) of a small region would lose its
    bits in fp16."""
    q, k, v = (tiles.rows_contiguous(x) for x in inputs[:3])
    lse = None if inputs.lse is None or q.dtype == torch.float16 else inputs.lse.contiguous()
    (rows, heads, _), dim = q.shape, v.shape[3]
    outputs = Outputs(q.new_empty(rows, heads, dim), q.new_empty(rows, heads, dtype=torch.float32))
    if outputs.lse.numel() == 0:
        return outputs
    launch = _Launch.of("forward", Inputs(q, k, v, lse), selection.contiguous(), options)
    grid = launch.rows_grid()
    m, l = (q.new_empty(grid[2], rows, heads, dtype=torch.float32) for _ in range(2))
    acc = q.new_empty(grid[2], rows, heads, dim, dtype=torch.float32)
    live = launch.live()
    kernels._forward_kernel[grid](
        launch.attention(live),
        lse,
        m,
        l,
        acc,
        rows,
        k.shape[2],
        live.entries.shape[1],
        **launch.constants,
    )
    kernels._reduce_kernel[rows * heads,](
        m,
        l,
        acc,
        *outputs,
        grid[2],
        rows * heads,
        DV=dim,
        num_warps=1,
    )
    return outputs


def backward(
    upstream: Outputs, inputs: Inputs, outputs: Outputs, selection: Selection, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    q, k, v = (tiles.rows_contiguous(x) for x in inputs[:3])
    if outputs.lse.numel() == 0 or k.numel() == 0:
        return tuple(zeros_like(x) for x in (q, k, v))
    inputs, selection = Inputs(q, k, v, None), selection.contiguous()
    dout, out = (tiles.rows_contiguous(x.out) for x in (upstream, outputs))
    (rows, heads, _), (batch, kv_heads, keys, _) = q.shape, k.shape
    delta = q.new_empty(rows, heads, dtype=torch.float32)
    launch = _Launch.of("dkv", inputs, selection, options)
    kernels._delta_kernel[triton.cdiv(rows * heads, 16),](
        out,
        dout,
        upstream.lse,
        delta,
        rows * heads,
        DV=v.shape[3],
        BLOCK_M=16,
        num_warps=4,
    )
    read = (dout, outputs.lse.contiguous(), delta)
    dk, dv = empty_like(k), empty_like(v)
    key_tiles = triton.cdiv(keys, launch.tile.block_n)
    kernels._backward_dkv_kernel[batch * key_tiles, kv_heads](
        launch.attention(None), *read, dk, dv, rows, keys, **launch.constants
    )
    launch = _Launch.of("dq", inputs, selection, options)
    grid, live = launch.rows_grid(), launch.live()
    part = q.new_empty(grid[2], *q.shape, dtype=torch.float32)
    kernels._backward_dq_kernel[grid](
        launch.attention(live), *read, part, rows, keys, live.entries.shape[1], **launch.constants
    )
    return sum_parts(part, q, options.scale), dk, dv
