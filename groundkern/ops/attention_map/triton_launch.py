"""Tiles, plan, grids and launches of the Triton kernels of attention maps, contributions and their
KL."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern import plan_kernels, tiles
from groundkern.attention_kernels import merge_counters
from groundkern.calls import Call, signature
from groundkern.kept import kept
from groundkern.map_kernels import Maps
from groundkern.op_body import empty_like, zeros_like
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    KL_MEAN,
    NO_MAP_PLAN,
    Gradients,
    Inputs,
    MapPlan,
    Options,
    Outputs,
    Saved,
    Upstream,
    like_gradients,
    output_shape,
)
from groundkern.ops.attention_map import triton_kernels as kernels
from groundkern.selection import KeySets, QueryRows, Selection
from groundkern.tile_kernels import Heads, Keys
from groundkern.tiles import Launcher, Tile

# (4-byte operands, largest sum of head dimensions: of q, with a softcap twice, and of values; one
# less where 16 does not divide them and loads are of 16 bits) -> tile of all kernels of this op.
# 4 warps on 64 lanes: of 8, each half computes all scores again for the second product. Every row
# is an untuned first guess: compiled by `make aot`, never timed on a device. `make gpu` finds
# better ones.
TILES = {  # of Hopper and later
    (False, 63): Tile(16, 64, 8, 4, 255),
    (False, 64): Tile(64, 64, 4, 4, 255),
    (False, 127): Tile(16, 64, 8, 4, 255),
    (False, 128): Tile(64, 64, 4, 4, 255),
    (False, 255): Tile(16, 32, 8, 4, 255),
    (False, 256): Tile(64, 32, 4, 4, 255),
    (False, 511): Tile(16, 32, 8, 4, 255),
    (False, 512): Tile(16, 64, 8, 4, 255),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 512): Tile(16, 32, 8, 1),
}
SMALL_TILES = {  # of other devices (`tiles.small`)
    (False, 512): Tile(16, 32, 8, 4, 168),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 512): Tile(16, 32, 8, 1),
}
# At most, where a loop loads more than keys: rows, or values too. Of two operands two copies are in
# flight at the wait, as of keys alone with a stage more.
SEVERAL_STAGES = 3


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(inputs.q, inputs.k, inputs.v)


def _tile(inputs: Inputs, options: Options) -> Tile:
    """The row of the table that serves a call."""
    q, k, v = inputs[:3]
    # Sums of both widths are held at a time, and with a softcap slopes of scores.
    held = [x.shape[-1] for x in (q, v, q if options.softcap else None) if x is not None]
    odd = any(dim % 16 for dim in held)
    dims = [min(tiles.padded(sum(map(tiles.padded, held))), 512) - odd]
    packed = q.shape[0] * (q.shape[1] // k.shape[1])
    table = SMALL_TILES if tiles.small(q.device) else TILES
    return table[tiles.tile_key(table, (q.dtype == torch.float32,), dims, packed)]


def plan(
    inputs: Inputs, rows: QueryRows, allowed: KeySets | None, columns: Tensor, options: Options
) -> MapPlan:
    """The row tiles of a call, the key tiles that they read, and the target on own columns."""
    q, k = inputs[:2]
    if 0 in (len(rows), q.shape[1], *k.shape[:3], columns.shape[1]):
        return NO_MAP_PLAN
    tile, group = _tile(inputs, options), q.shape[1] // k.shape[1]
    lanes = min(1 << (group - 1).bit_length(), tile.block_m)
    sizes = {"lanes": lanes, "batch": k.shape[0], "keys": k.shape[2], "wide": tile.block_n}
    sizes |= {"block_m": tile.block_m, "block_n": tile.block_n}
    selection, names = Selection.of(rows, allowed, columns), tuple(sizes.values())
    found = kept(
        rows, (allowed, columns), ("map", *names), lambda: plan_kernels.plan(selection, **sizes)
    )
    visible = (None, None)
    if options.over == "visible" and not options.lse_grad:
        every = Selection.of(rows, None)
        of = kept(rows, (), ("visible", *names), lambda: plan_kernels.plan(every, **sizes))
        visible = (of.tiles, of.row_spans)
    target = (None, None)
    if inputs.target is not None:
        of_target = (allowed, columns, inputs.target)
        target = kept(
            rows, of_target, "target", lambda: _target(inputs.target, selection.own_columns())
        )
    return MapPlan(*found[:5], *visible, *target, lanes)


def _target(target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """P [N, C] fp32, renormalised over own columns, and its sums [N], 1 or 0."""
    mass = torch.where(own, target.float(), 0.0)
    total = mass.sum(-1, keepdim=True)
    target = (mass / torch.where(total > 0, total, 1.0)).contiguous()
    return target, target.sum(-1)


class _Known:
    """What the kernels are launched with: found once for inputs of a signature.

    Args:
        call: made for inputs like these.
        inputs: rows contiguous.
    """

    def __init__(self, call: Call, inputs: Inputs) -> None:
        q, k, v = inputs[:3]
        plan, options = call.plan, call.options
        self.launcher, self.tile = Launcher(), _tile(inputs, options)
        (_, heads, dim), (batch, kv_heads, self.keys, _) = q.shape, k.shape
        group, self.columns = heads // kv_heads, call.selection.columns.shape[1]
        parts = -(-group // plan.lanes)  # of a KV head's query heads, `lanes` at a time
        self.virtual_heads = kv_heads * parts
        # Whether the normaliser's gradient reaches all visible keys.
        self.reached = options.over == "visible" and not options.lse_grad
        sizes = (heads, group, plan.lanes, parts, self.columns)
        self.numbers = (options.scale, options.softcap or None, *sizes)
        dims = {"D": dim, "DV": dim if v is None else v.shape[3]}
        flags = {"LANES": plan.lanes, "KIND": options.kind, "RECTIFY": options.rectify}
        self.constants = dims | flags | self.tile.constants
        self.several = {"num_stages": min(self.tile.stages, SEVERAL_STAGES)}
        # There is no second product in it, and with 4 warps it spills.
        self.of_map = self.several | ({"num_warps": 8} if self.tile.block_m == 64 else {})
        self.of_keys = self.several if options.kind == CONTRIBUTION else {}
        row_tiles, key_tiles = plan.tiles.shape[0], -(-self.keys // self.tile.block_n)
        self.wide_grid = (batch * key_tiles, kv_heads)

        def splits(programs: int, most: int) -> int:
            return tiles.splits(q.device, programs, most)

        own, of_heads = min(key_tiles, self.columns), row_tiles * self.virtual_heads
        self.map_grid = (row_tiles, splits(row_tiles, own))
        # (row tiles, virtual heads, splits) over own columns and, if True, over all visible keys
        self.grids = {
            visible: (row_tiles, self.virtual_heads, splits(of_heads, most))
            for visible, most in ((False, own), (True, key_tiles))
        }


class _Launch(NamedTuple):
    """The kernels of one call."""

    inputs: Inputs  # rows contiguous
    call: Call
    norm: Tensor | None  # fp32 [N, Hq], the normaliser; None until it is known
    known: _Known

    @classmethod
    def of(cls, inputs: Inputs, call: Call, signed: tuple) -> "_Launch":
        """`signed` is what the launch depends on besides the call."""
        known, inputs = tiles.prepared(call.prepared, signed, inputs, 4, partial(_Known, call))
        return cls(inputs, call, inputs.lse, known)

    def maps(self, visible: bool = False, **others: object) -> Maps:
        """What kernels read, over the key tiles with own columns or all visible ones."""
        (q, k, v, g, weight, _, _), plan = self.inputs, self.call.plan
        valued = (None, None) if v is None else (Heads.of(g), Keys.of(v))
        tiles_of = (plan.visible_tiles, None) if visible else (plan.tiles, plan.key_tiles)
        above = (self.norm, weight, plan.own_target, None, None, None)
        read = (Heads.of(q), Keys.of(k), *valued, self.call.selection, *tiles_of, plan.place)
        maps = Maps(*read, *above, *self.known.numbers)
        return maps._replace(**others) if others else maps

    def launch(self, kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
        self.known.launcher(kernel, grid, arguments, self.known.constants | constants)

    def new(self, *shape: int) -> Tensor:
        return self.inputs.q.new_empty(shape, dtype=torch.float32)

    def part(self, splits: int, *shape: int) -> Tensor:
        """Of every split; of none if there is one."""
        return self.new(splits if splits > 1 else 0, *shape)

    def counters(self, size: int) -> Tensor:
        return tiles.arrival_counters(self.inputs.q.device, size)

    def normalised(self) -> "_Launch":
        """With log-sum-exp over all visible keys or over own columns; 0 if there are none."""
        if self.norm is not None:
            return self
        (rows, heads, dim), visible = self.inputs.q.shape, self.call.options.over == "visible"
        grid, norm = self.known.grids[visible], self.new(rows, heads)
        x = self.maps(visible, g=None, v=None, weight=None, target=None)  # one variant for all
        part, counters = self.part(grid[2], rows, heads), self.counters(grid[0] * grid[1])
        arguments = (x, part, norm, counters, rows, self.known.keys)
        constants = {"D": dim, "VISIBLE": visible} | self.known.tile.constants
        self.known.launcher(kernels._norm_kernel, grid, arguments, constants)
        return self._replace(norm=norm)

    def map(self) -> tuple[Tensor, Tensor | None]:
        """[N, C] the map, the contributions, or for KL_MEAN log P - log M; and then the KL [N]."""
        rows, mean = self.inputs.q.shape[0], self.call.options.kind == KL_MEAN
        out, known = self.new(rows, self.known.columns).zero_(), self.known
        row_tiles, splits = grid = known.map_grid
        kl = self.new(rows) if mean else None
        part = self.part(splits, rows) if mean else None
        arguments = (self.maps(), out, kl, part, self.counters(row_tiles), rows, known.keys)
        self.launch(kernels._map_kernel, grid, *arguments, known.virtual_heads, **known.of_map)
        return out, kl

    def sums(self, **others: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N, Hq] sum_c u z and dnorm; KL_EACH: sum_c P (log P - log p), and the KL [N]."""
        (rows, heads, _), each = self.inputs.q.shape, self.call.options.kind == KL_EACH
        grid, total = self.known.grids[False], self.new(rows, heads)
        second = self.new(rows) if each else self.new(rows, heads)
        made = (None, second) if each else (second, None)
        part, counters = self.part(grid[2], rows, heads), self.counters(grid[0] * (grid[1] + 1))
        arguments = (self.maps(**others), part, total, *made, counters, rows, self.known.keys)
        self.launch(kernels._sums_kernel, grid, *arguments, **self.known.of_keys)
        return total, second

    def gradients(self, dnorm: Tensor, **others: Tensor) -> Gradients:
        """All but dhead_weight; dnorm [N, Hq] is the normaliser's gradient."""
        (q, k, v, g, *_), known, plan = self.inputs, self.known, self.call.plan
        lse_grad = self.call.options.lse_grad
        x = self.maps(known.reached, **others)
        if not lse_grad:
            x = x._replace(dnorm=dnorm)
        dq, dk = empty_like(q), empty_like(k)
        dv, dg = (None if y is None else empty_like(y) for y in (v, g))
        grid = known.grids[known.reached]
        parts = (self.part(grid[2], *y.shape) if y is not None else None for y in (q, g))
        counters = self.counters(merge_counters(grid))
        arguments = (x, *parts, dq, dg, counters, q.shape[0], known.keys)
        constants = {"VISIBLE": known.reached} | known.of_keys
        self.launch(kernels._backward_dq_kernel, grid, *arguments, **constants)
        spans = (None, plan.visible_row_spans) if known.reached else plan[2:4]
        arguments = (x, *spans, dk, dv, known.keys, plan.row_tiles.shape[1])
        constants = {"VISIBLE": known.reached} | known.several
        self.launch(kernels._backward_dkv_kernel, known.wide_grid, *arguments, **constants)
        return Gradients(dq, dk, dv, dg, None, dnorm if lse_grad else None)


def forward(inputs: Inputs, call: Call) -> Outputs:
    """fp32 [N, C], of a KL [N], and what the backward need not make again."""
    if call.plan.tiles is None:
        shape = output_shape(inputs, call.selection.columns, call.options)
        empty = (inputs.q.new_empty(0, dtype=torch.float32) for _ in range(2))
        return Outputs(inputs.q.new_zeros(shape, dtype=torch.float32), *empty)
    launch = _Launch.of(inputs, call, ()).normalised()
    norm = launch.new(0) if inputs.lse is not None else launch.norm
    if call.options.kind == KL_EACH:
        sums, kl = launch.sums()
        return Outputs(kl, norm, sums)
    out, kl = launch.map()
    return Outputs(out, norm, launch.new(0)) if kl is None else Outputs(kl, norm, out)


def backward(above: Upstream, inputs: Inputs, saved: Saved, call: Call) -> Gradients:
    """Contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    (upstream,), options = above, call.options
    if call.plan.tiles is None:
        like = like_gradients(inputs, options)
        return Gradients(*(None if x is None else zeros_like(x) for x in like))
    launch = _Launch.of(inputs, call, signature((upstream, *inputs, *saved)))
    if inputs.lse is None:
        launch = launch._replace(norm=saved.norm)
    read = {"upstream": upstream}
    if options.kind == KL_EACH:
        dweight = upstream[:, None] * saved.made
        dnorm = launch.inputs.head_weight * (upstream * call.plan.target_sum)[:, None]
        if options.lse_grad:
            dnorm = torch.where(inputs.lse.isinf(), 0.0, dnorm)
    else:
        if options.kind == KL_MEAN:
            read["made"] = saved.made
        dweight, dnorm = launch.sums(**read)
    gradients = launch.gradients(dnorm, **read)
    return gradients._replace(dhead_weight=None if options.kind == CONTRIBUTION else dweight)
