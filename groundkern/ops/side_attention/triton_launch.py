"""Tiles, plan, grids and launches of the Triton kernels of side attention."""

from functools import partial

import torch
from torch import Tensor

from groundkern import plan_kernels, tiles
from groundkern.attention_kernels import Attention, merge_counters, row_grid
from groundkern.calls import Call
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
TILES = {  # of Hopper and the Blackwell of data centres
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
    ("dq", False, 256): Tile(64, 32, 8, 2, 255),
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
    """What the kernels over rows and keys are launched with in calls that are alike
    (`tiles.prepared`).

    Args:
        call: one of them.
        inputs: rows contiguous.
    """

    def __init__(self, call: Call, inputs: Inputs) -> None:
        q, k, v, _ = inputs
        plan, self.launcher = call.plan, tiles.Launcher()
        (self.rows, heads, dim), (batch, kv_heads, self.keys, _) = q.shape, k.shape
        self.device, self.scale, self.strides = q.device, call.options.scale, _strides(q, k, v)
        group, softcap = heads // kv_heads, call.options.softcap or None
        self.sizes = (self.scale, softcap, heads, group, group, 1)
        self.q_shape, self.lse_shape = tuple(q.shape), (self.rows, heads)
        self.shape = (*self.lse_shape, v.shape[3])
        one = plan.one_tile
        lanes = plan.block_m if one else 2**31
        names = ("forward", "backward") if one else ("forward", "dq", "dkv")
        dims, over = {"D": dim, "DV": v.shape[3]}, (plan, kv_heads, self.keys)
        found = {name: _tile(name, inputs, lanes) for name in names}
        self.constants = {name: dims | tile.constants for name, tile in found.items()}
        self.grids = {name: row_grid(*over, tile, q.device) for name, tile in found.items()}
        if one:
            self.constants["backward"]["TILE_N"] = plan.block_n
        else:
            self.constants["dkv"]["TILE_M"] = plan.block_m
            self.grids["dkv"] = batch * -(-self.keys // found["dkv"].block_n), kv_heads
        self.dq_splits = self.grids["backward" if one else "dq"][2]

    def attention(self, call: Call, inputs: Inputs) -> Attention:
        q, k, v, _ = inputs
        of_q, of_k, of_v = self.strides
        others = call.selection, call.plan.tiles, call.plan.key_tiles, *self.sizes
        return Attention(Heads(q, *of_q), Keys(k, *of_k), Keys(v, *of_v), *others)

    def __call__(self, name: str, kernel, *arguments) -> None:
        """Launch a kernel with the tile of a row of the table."""
        self.launcher(kernel, self.grids[name], arguments, self.constants[name])

    def merged(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """What the splits of the forward leave, and the counters of their merge."""
        grid = self.grids["forward"]
        parts, counters = grid[2] if grid[2] > 1 else 0, merge_counters(grid)
        new = partial(torch.empty, dtype=torch.float32, device=self.device)
        sums = new((parts, *self.lse_shape)), new((parts, *self.lse_shape))
        return (*sums, new((parts, *self.shape))), tiles.arrival_counters(self.device, counters)

    def summed(self) -> tuple[Tensor, Tensor | None]:
        """dq of the splits of a backward and, where dk and dv are a launch of their own, what that
        reads of it."""
        new = partial(torch.empty, dtype=torch.float32, device=self.device)
        delta = None if "backward" in self.grids else new(self.lse_shape)
        return new((self.dq_splits, *self.q_shape)), delta


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[int, ...], ...]:
    """As `Heads` and `Keys` have them."""
    return q.stride()[:2], k.stride()[:3], v.stride()[:3]


def _launch(inputs: Inputs, call: Call, *, checked: bool = False) -> tuple[_Launch, Inputs]:
    """The launch of a call, and its inputs with contiguous rows."""
    return tiles.prepared(call, inputs, 3, _Launch, checked=checked)


def forward(inputs: Inputs, call: Call) -> Outputs:
    """With fp16 values the given lse is not used: p = exp(s - lse) of a small region would lose its
    bits in fp16."""
    q, _, v, _ = inputs
    rounded = q.dtype != torch.float32
    if call.plan.tiles is None:
        out = q.new_zeros(*q.shape[:2], v.shape[3])
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        return Outputs(out, lse, zeros_like(out) if rounded else q.new_empty(0))
    if q.dtype == torch.float16:
        inputs = inputs._replace(lse=None)
    launch, inputs = _launch(inputs, call, checked=True)
    q, lse = inputs.q, inputs.lse
    out, own_lse = q.new_empty(launch.shape), q.new_empty(launch.lse_shape, dtype=torch.float32)
    rest = empty_like(out) if rounded else call.once("no rest", lambda: q.new_empty(0))
    scratch = call.once("scratch", tiles.Scratch)
    parts, counters = scratch("forward", launch.device, launch.merged)
    launch(
        "forward",
        kernels._forward_kernel,
        launch.attention(call, inputs),
        lse,
        parts,
        (out, rest if rounded else None),
        own_lse,
        counters,
        launch.rows,
        launch.keys,
    )
    return Outputs(out, own_lse, rest)


def backward(
    upstream: Upstream, inputs: Inputs, outputs: Outputs, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    plan = call.plan
    if plan.tiles is None:
        return tuple(zeros_like(x) for x in inputs[:3])
    launch, inputs = _launch(inputs._replace(lse=None), call)
    q, k, v, _ = inputs
    dout, dlse, out, own_lse, rest = map(tiles.aligned, (*upstream, *outputs))
    made = (out, rest if rest.numel() else None, dlse)
    read, rows, keys = (launch.attention(call, inputs), dout, own_lse), launch.rows, launch.keys
    dq, dk, dv = empty_like(q), empty_like(k), empty_like(v)
    part, delta = call.once("scratch", tiles.Scratch)("backward", launch.device, launch.summed)
    if plan.one_tile:
        launch("backward", kernels._backward_kernel, *read, made, dk, dv, part, rows, keys)
    else:
        launch("dq", kernels._backward_dq_kernel, *read, made, delta, part, rows, keys)
        read_by = (plan.row_tiles, plan.row_spans)
        parts = 0 if plan.row_tiles is None else plan.row_tiles.shape[1]
        arguments = (read[0], *read_by, *read[1:], delta, dk, dv, keys, parts)
        launch("dkv", kernels._backward_dkv_kernel, *arguments)
    sum_parts(part, dq, launch.scale, launch.launcher)
    return dq, dk, dv
