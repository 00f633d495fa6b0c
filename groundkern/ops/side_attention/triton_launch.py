"""Tiles, plan, grids and launches of the Triton kernels of side attention."""

from functools import partial

import torch
from torch import Tensor

from groundkern import plan_kernels, tiles
from groundkern.attention_kernels import Attention, merge_counters, row_grid
from groundkern.calls import Call, signature
from groundkern.kept import kept
from groundkern.op_body import empty_like, zeros_like
from groundkern.ops.side_attention import Inputs, Outputs, Upstream
from groundkern.ops.side_attention import triton_kernels as kernels
from groundkern.plan import NO_PLAN, Plan
from groundkern.selection import KeySets, QueryRows, Selection
from groundkern.tile_kernels import Heads, Keys, sum_parts
from groundkern.tiles import Tile

# (kernel, 4-byte operands, largest head dimension[, most lanes of a sequence]) -> tile. "backward"
# serves sequences of so many lanes, "dq" and "dkv" all others. What a call uses of "forward" holds
# all lanes where it uses "backward", and its key tiles are those of "dq" and a multiple of those of
# "backward". Every row is an untuned first guess: compiled by `make aot`, never timed on a device.
# `make gpu` finds better ones.
TILES = {  # of Hopper and later
    ("forward", False, 128, 16): Tile(16, 64, 4, 4, 255),
    ("forward", False, 128, 64): Tile(64, 64, 4, 3, 232),
    ("forward", False, 128): Tile(128, 64, 8, 3, 255),
    ("forward", False, 256, 16): Tile(16, 32, 4, 3, 255),
    ("forward", False, 256): Tile(64, 32, 8, 3),
    ("forward", True, 128): Tile(16, 32, 8, 2),
    ("forward", True, 256): Tile(16, 32, 8, 1),
    ("backward", False, 128, 16): Tile(16, 64, 4, 3),
    ("backward", False, 128, 64): Tile(64, 32, 4, 3),
    ("backward", False, 128, 128): Tile(128, 32, 8, 3),
    ("backward", False, 256, 16): Tile(16, 32, 4, 2),
    ("backward", False, 256, 64): Tile(64, 32, 8, 2),
    ("backward", True, 128, 16): Tile(16, 32, 8, 1),
    ("backward", True, 256, 16): Tile(16, 32, 8, 1),
    ("dq", False, 128): Tile(128, 64, 8, 3),
    ("dq", False, 256): Tile(64, 32, 8, 2),
    ("dq", True, 128): Tile(16, 32, 8, 1),
    ("dq", True, 256): Tile(16, 32, 8, 1),
    ("dkv", False, 128): Tile(32, 128, 8, 3),
    ("dkv", False, 256): Tile(16, 32, 8, 2),
    ("dkv", True, 128): Tile(16, 32, 8, 1),
    ("dkv", True, 256): Tile(16, 32, 8, 1),
}
SMALL_TILES = {  # of other devices (`tiles.small`)
    ("forward", False, 128, 16): Tile(16, 32, 4, 4, 255),
    ("forward", False, 128): Tile(64, 32, 8, 4, 255),
    ("forward", False, 256): Tile(16, 32, 8, 3, 255),
    ("forward", True, 128): Tile(16, 32, 8),
    ("forward", True, 256): Tile(16, 32, 8, 1),
    ("backward", False, 128, 16): Tile(16, 32, 8, 4, 168),
    ("backward", False, 256, 16): Tile(16, 32, 8, 3, 255),
    ("backward", True, 128, 16): Tile(16, 32, 8, 1),
    ("backward", True, 256, 16): Tile(16, 32, 8, 1),
    ("dq", False, 128): Tile(64, 32, 8, 4, 168),
    ("dq", False, 256): Tile(16, 32, 8, 3, 255),
    ("dq", True, 128): Tile(16, 32, 8, 1),
    ("dq", True, 256): Tile(16, 32, 8, 1),
    ("dkv", False, 128): Tile(16, 64, 8, 4, 255),
    ("dkv", False, 256): Tile(16, 32, 8, 3, 255),
    ("dkv", True, 128): Tile(16, 32, 8, 1),
    ("dkv", True, 256): Tile(16, 32, 8, 1),
}


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(*inputs[:3])


def _tile(name: str, inputs: Inputs, lanes: int) -> Tile | None:
    """The row of the table that serves a call; None if there is none for so many lanes."""
    table = SMALL_TILES if tiles.small(inputs.q.device) else TILES
    kind = (name, inputs.q.dtype == torch.float32)
    return table.get(tiles.tile_key(table, kind, [inputs.q.shape[2], inputs.v.shape[3]], lanes))


def plan(inputs: Inputs, rows: QueryRows, allowed: KeySets | None) -> Plan:
    """The row tiles of a call and the key tiles that they read."""
    q, k = inputs[:2]
    if 0 in (len(rows), q.shape[1], *k.shape[:3]):
        return NO_PLAN
    group = q.shape[1] // k.shape[1]
    lanes = group * (len(rows) if rows.most is None else min(rows.most, len(rows)))
    tile = _tile("forward", inputs, lanes)
    wide = 0 if _tile("backward", inputs, lanes) else _tile("dkv", inputs, lanes).block_n
    sizes = {"lanes": group, "batch": k.shape[0], "keys": k.shape[2], "wide": wide}
    sizes |= {"block_m": tile.block_m, "block_n": tile.block_n}

    def make() -> Plan:
        return plan_kernels.plan(Selection.of(rows, allowed), **sizes)

    return kept(rows, (allowed,), ("side_attention", *sizes.values()), make)


class _Launch:
    """What the kernels over rows and keys are launched with: found once for inputs of a signature.

    Args:
        call: made for inputs like these.
        inputs: rows contiguous.
    """

    def __init__(self, call: Call, inputs: Inputs) -> None:
        q, k, v, _ = inputs
        self.plan, self.selection, self.launcher = call.plan, call.selection, tiles.Launcher()
        (_, heads, dim), (_, kv_heads, self.keys, _) = q.shape, k.shape
        group, (scale, softcap) = heads // kv_heads, call.options
        self.sizes = (scale, softcap or None, heads, group, group, 1)
        one = self.plan.one_tile
        lanes = self.plan.block_m if one else 2**31
        names = ("forward", "backward") if one else ("forward", "dq", "dkv")
        dims = {"D": dim, "DV": v.shape[3]}
        self.tiles = {name: _tile(name, inputs, lanes) for name in names}
        self.constants = {name: dims | tile.constants for name, tile in self.tiles.items()}
        over = self.plan, kv_heads, self.keys
        self.grids = {name: row_grid(*over, tile, q.device) for name, tile in self.tiles.items()}

    def attention(self, inputs: Inputs) -> Attention:
        q, k, v, _ = inputs
        operands = (Heads.of(q), Keys.of(k), Keys.of(v), self.selection)
        return Attention(*operands, self.plan.tiles, self.plan.key_tiles, *self.sizes)

    def __call__(self, name: str, kernel, *arguments, grid=None, **constants) -> None:
        """Launch a kernel with the tile of a row of the table."""
        grid = grid or self.grids[name]
        self.launcher(kernel, grid, arguments, self.constants[name] | constants)


def _launch(inputs: Inputs, call: Call, signed: tuple) -> tuple[_Launch, Inputs]:
    """`signed` is what the launch depends on besides the call."""
    return tiles.prepared(call.prepared, signed, inputs, 3, partial(_Launch, call))


def forward(inputs: Inputs, call: Call) -> Outputs:
    """With fp16 values the given lse is not used: p = exp(s - lse) of a small region would lose its
    bits in fp16."""
    q, _, v, _ = inputs
    (rows, heads, _), dim = q.shape, v.shape[3]
    out, rounded = q.new_empty(rows, heads, dim), q.dtype != torch.float32
    own_lse = q.new_empty(rows, heads, dtype=torch.float32)
    outputs = Outputs(out, own_lse, empty_like(out) if rounded else q.new_empty(0))
    if call.plan.tiles is None:
        outputs.out.zero_()
        outputs.lse.fill_(-torch.inf)
        outputs.rest.zero_()
        return outputs
    if q.dtype == torch.float16:
        inputs = inputs._replace(lse=None)
    launch, inputs = _launch(inputs, call, ())
    grid = launch.grids["forward"]
    parts = grid[2] if grid[2] > 1 else 0
    sums = (q.new_empty(parts, rows, heads, dtype=torch.float32) for _ in range(2))
    acc = q.new_empty(parts, rows, heads, dim, dtype=torch.float32)
    launch(
        "forward",
        kernels._forward_kernel,
        launch.attention(inputs),
        inputs.lse,
        (*sums, acc),
        (out, outputs.rest if rounded else None),
        own_lse,
        tiles.arrival_counters(q.device, merge_counters(grid)),
        rows,
        launch.keys,
    )
    return outputs


def backward(
    upstream: Upstream, inputs: Inputs, outputs: Outputs, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    (q, k, v, _), plan = inputs, call.plan
    if plan.tiles is None:
        return tuple(zeros_like(x) for x in (q, k, v))
    signed = signature((*upstream, *inputs[:3], *outputs))
    launch, inputs = _launch(inputs._replace(lse=None), call, signed)
    dout, out = (tiles.rows_contiguous(x.out) for x in (upstream, outputs))
    rest = outputs.rest if outputs.rest.numel() else None
    read = (launch.attention(inputs), dout, outputs.lse.contiguous())
    made = (out, rest, upstream.lse)
    (rows, heads, _), keys = q.shape, launch.keys
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    grid = launch.grids["backward" if plan.one_tile else "dq"]
    part = q.new_empty(grid[2], *q.shape, dtype=torch.float32)
    if plan.one_tile:
        arguments = (*read, made, dk, dv, part, rows, keys)
        launch("backward", kernels._backward_kernel, *arguments, TILE_N=plan.block_n)
    else:
        delta = q.new_empty(rows, heads, dtype=torch.float32)
        launch("dq", kernels._backward_dq_kernel, *read, made, delta, part, rows, keys)
        read_by = (plan.row_tiles, plan.row_spans)
        parts = 0 if plan.row_tiles is None else plan.row_tiles.shape[1]
        launch(
            "dkv",
            kernels._backward_dkv_kernel,
            *(read[0], *read_by, *read[1:], delta, dk, dv, keys, parts),
            grid=(k.shape[0] * -(-keys // launch.tiles["dkv"].block_n), k.shape[1]),
            TILE_M=plan.block_m,
        )
    sum_parts(part, dq, call.options.scale, launch.launcher)
    return dq, dk, dv
