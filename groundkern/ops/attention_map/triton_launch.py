"""Tiles, plan, grids and launches of the Triton kernels of attention maps, contributions and their
KL."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from groundkern import plan_kernels, tiles
from groundkern.attention_kernels import merge_counters
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
    like_gradients,
    output_shape,
)
from groundkern.ops.attention_map import triton_kernels as kernels
from groundkern.selection import KeySets, QueryRows, Selection
from groundkern.tile_kernels import Heads, Keys
from groundkern.tiles import Tile

# (4-byte operands, largest head dimension; of contributions the sum of both) -> tile of all kernels
# of this op. Every row is an untuned first guess: compiled by `make aot`, never timed on a device.
# `make gpu` finds better ones.
TILES = {  # of Hopper and later
    (False, 128): Tile(64, 32, 8),
    (False, 256): Tile(16, 32, 8),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 256): Tile(16, 32, 8, 1),
}
SMALL_TILES = {  # of other devices (`tiles.small`)
    (False, 256): Tile(16, 32, 8),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 256): Tile(16, 32, 8, 1),
}


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(inputs.q, inputs.k, inputs.v)


def _tile(inputs: Inputs) -> Tile:
    """The row of the table that serves a call."""
    q, k, v = inputs[:3]
    dims = [q.shape[-1]]
    if v is not None:  # sums of both widths are held at a time
        wide = [tiles.padded(x.shape[-1]) for x in (q, v)]
        odd = wide != [x.shape[-1] for x in (q, v)]
        dims = [min(sum(wide), 256) - odd]
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
    tile, group = _tile(inputs), q.shape[1] // k.shape[1]
    lanes = min(triton.next_power_of_2(group), tile.block_m)
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
        target = kept(rows, of_target, "target", lambda: _target(inputs.target, _own(selection)))
    return MapPlan(*found[:5], *visible, *target, lanes)


def _own(selection: Selection) -> Tensor:
    """bool [N, C]: the columns that are the row's own."""
    at = selection.columns[selection.sequence.long()]  # [N, C]
    own = (at >= 0) & (at >= selection.start[:, None]) & (at < selection.stop[:, None])
    bits, index = selection.bits, selection.set_index
    if bits is None or not len(bits):
        return own
    packed = bits[index.clamp(min=0).long()].gather(1, at.clamp(min=0).long() // 32)
    member = (packed >> (at.clamp(min=0) % 32)) & 1
    return own & ((member != 0) | (index < 0)[:, None])


def _target(target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """P [N, C] fp32, renormalised over own columns, and its sums [N], 1 or 0."""
    mass = torch.where(own, target.float(), 0.0)
    total = mass.sum(-1, keepdim=True)
    target = (mass / torch.where(total > 0, total, 1.0)).contiguous()
    return target, target.sum(-1)


class _Launch(NamedTuple):
    """What the kernels of one call are launched with."""

    inputs: Inputs  # rows contiguous
    selection: Selection  # contiguous
    plan: MapPlan
    options: Options
    norm: Tensor | None  # fp32 [N, Hq], the normaliser; None until it is known
    tile: Tile

    @classmethod
    def of(cls, inputs: Inputs, selection: Selection, plan: MapPlan, options: Options) -> "_Launch":
        operands = (None if x is None else tiles.rows_contiguous(x) for x in inputs[:4])
        others = (None if x is None else x.contiguous() for x in inputs[4:])
        inputs = Inputs(*operands, *others)
        return cls(inputs, selection.contiguous(), plan, options, inputs.lse, _tile(inputs))

    @property
    def group(self) -> int:
        return self.inputs.q.shape[1] // self.inputs.k.shape[1]

    @property
    def parts(self) -> int:
        """Of a KV head's query heads, `lanes` at a time."""
        return triton.cdiv(self.group, self.plan.lanes)

    @property
    def virtual_heads(self) -> int:
        return self.inputs.k.shape[1] * self.parts

    @property
    def reached(self) -> bool:
        """Whether the normaliser's gradient reaches all visible keys."""
        return self.options.over == "visible" and not self.options.lse_grad

    def maps(self, visible: bool = False, **others: object) -> Maps:
        """What kernels read, over the key tiles with own columns or all visible ones."""
        (q, k, v, g, weight, _, _), plan = self.inputs, self.plan
        valued = (None, None) if v is None else (Heads.of(g), Keys.of(v))
        tiles_of = (plan.visible_tiles, None) if visible else (plan.tiles, plan.key_tiles)
        above = (self.norm, weight, plan.own_target, None, None, None)
        scale, softcap = self.options.scale, self.options.softcap or None
        sizes = (q.shape[1], self.group, plan.lanes, self.parts, self.selection.columns.shape[1])
        read = (Heads.of(q), Keys.of(k), *valued, self.selection, *tiles_of, plan.place)
        return Maps(*read, *above, scale, softcap, *sizes)._replace(**others)

    def constants(self) -> dict[str, object]:
        q, _, v = self.inputs[:3]
        dims = {"D": q.shape[2], "DV": q.shape[2] if v is None else v.shape[3]}
        flags = {
            "LANES": self.plan.lanes,
            "KIND": self.options.kind,
            "RECTIFY": self.options.rectify,
        }
        return dims | flags | self.tile.constants

    def splits(self, programs: int, visible: bool = False) -> int:
        """Of the key tiles of so many programs."""
        keys, columns = self.inputs.k.shape[2], self.selection.columns.shape[1]
        key_tiles = triton.cdiv(keys, self.tile.block_n)
        key_tiles = key_tiles if visible else min(key_tiles, columns)
        return tiles.splits(self.inputs.q.device, programs, key_tiles)

    def grid(self, visible: bool = False) -> tuple[int, int, int]:
        """(row tiles, virtual heads, splits)."""
        row_tiles = self.plan.tiles.shape[0]
        splits = self.splits(row_tiles * self.virtual_heads, visible)
        return row_tiles, self.virtual_heads, splits

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
        (rows, heads, dim), visible = self.inputs.q.shape, self.options.over == "visible"
        grid, norm = self.grid(visible), self.new(rows, heads)
        x = self.maps(visible, g=None, v=None, weight=None, target=None)  # one variant for all
        kernels._norm_kernel[grid](
            x,
            self.part(grid[2], rows, heads),
            norm,
            self.counters(grid[0] * grid[1]),
            rows,
            self.inputs.k.shape[2],
            D=dim,
            VISIBLE=visible,
            **self.tile.constants,
        )
        return self._replace(norm=norm)

    def map(self) -> tuple[Tensor, Tensor | None]:
        """[N, C] the map, the contributions, or for KL_MEAN log P - log M; and then the KL [N]."""
        (rows, _, _), mean = self.inputs.q.shape, self.options.kind == KL_MEAN
        out = self.new(rows, self.selection.columns.shape[1]).zero_()
        row_tiles = self.plan.tiles.shape[0]
        splits = self.splits(row_tiles)
        kl = self.new(rows) if mean else None
        kernels._map_kernel[row_tiles, splits](
            self.maps(),
            out,
            kl,
            self.part(splits, rows) if mean else None,
            self.counters(row_tiles),
            rows,
            self.inputs.k.shape[2],
            self.virtual_heads,
            **self.constants(),
        )
        return out, kl

    def sums(self, **others: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N, Hq] sum_c u z and dnorm; KL_EACH: sum_c P (log P - log p), and the KL [N]."""
        rows, heads, _ = self.inputs.q.shape
        grid, each = self.grid(), self.options.kind == KL_EACH
        total = self.new(rows, heads)
        second = self.new(rows) if each else self.new(rows, heads)
        kernels._sums_kernel[grid](
            self.maps(**others),
            self.part(grid[2], rows, heads),
            total,
            None if each else second,
            second if each else None,
            self.counters(grid[0] * (grid[1] + 1)),
            rows,
            self.inputs.k.shape[2],
            **self.constants(),
        )
        return total, second

    def gradients(self, dnorm: Tensor, **others: Tensor) -> Gradients:
        """All but dhead_weight; dnorm [N, Hq] is the normaliser's gradient."""
        q, k, v, g = self.inputs[:4]
        x = self.maps(self.reached, **others)
        if not self.options.lse_grad:
            x = x._replace(dnorm=dnorm)
        constants = self.constants() | {"VISIBLE": self.reached}
        grid, keys = self.grid(self.reached), k.shape[2]
        dq, dk = empty_like(q), empty_like(k)
        dv, dg = (None if y is None else empty_like(y) for y in (v, g))
        kernels._backward_dq_kernel[grid](
            x,
            self.part(grid[2], *q.shape),
            None if g is None else self.part(grid[2], *g.shape),
            dq,
            dg,
            self.counters(merge_counters(grid)),
            q.shape[0],
            keys,
            **constants,
        )
        plan = self.plan
        read_by = (plan.row_tiles, plan.row_spans)
        if self.reached:
            read_by = (None, plan.visible_row_spans)
        wide_tiles = k.shape[0] * triton.cdiv(keys, self.tile.block_n)
        kernels._backward_dkv_kernel[wide_tiles, k.shape[1]](
            x, *read_by, dk, dv, keys, plan.row_tiles.shape[1], **constants
        )
        return Gradients(dq, dk, dv, dg, None, dnorm if self.options.lse_grad else None)


def forward(inputs: Inputs, selection: Selection, plan: MapPlan, options: Options) -> Outputs:
    """fp32 [N, C], of a KL [N], and what the backward need not make again."""
    if plan.tiles is None:
        shape = output_shape(inputs, selection.columns, options)
        empty = (inputs.q.new_empty(0, dtype=torch.float32) for _ in range(2))
        return Outputs(inputs.q.new_zeros(shape, dtype=torch.float32), *empty)
    launch = _Launch.of(inputs, selection, plan, options).normalised()
    norm = launch.new(0) if inputs.lse is not None else launch.norm
    if options.kind == KL_EACH:
        sums, kl = launch.sums()
        return Outputs(kl, norm, sums)
    out, kl = launch.map()
    return Outputs(out, norm, launch.new(0)) if kl is None else Outputs(kl, norm, out)


def backward(
    upstream: Tensor,
    inputs: Inputs,
    saved: Saved,
    selection: Selection,
    plan: MapPlan,
    options: Options,
) -> Gradients:
    """Contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    if plan.tiles is None:
        like = like_gradients(inputs, options)
        return Gradients(*(None if x is None else zeros_like(x) for x in like))
    launch = _Launch.of(inputs, selection, plan, options)
    if inputs.lse is None:
        launch = launch._replace(norm=saved.norm)
    read = {"upstream": upstream.contiguous()}
    if options.kind == KL_EACH:
        dweight = upstream[:, None] * saved.made
        dnorm = launch.inputs.head_weight * (upstream * plan.target_sum)[:, None]
        if options.lse_grad:
            dnorm = torch.where(inputs.lse.isinf(), 0.0, dnorm)
    else:
        if options.kind == KL_MEAN:
            read["made"] = saved.made
        dweight, dnorm = launch.sums(**read)
    gradients = launch.gradients(dnorm, **read)
    return gradients._replace(dhead_weight=None if options.kind == CONTRIBUTION else dweight)
