"""Tiles, grids and launches of the Triton kernels of attention maps, contributions and their KL."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from groundkern import tiles
from groundkern.op_body import empty_like, zeros_like
from groundkern.ops.attention_map import (
    CONTRIBUTION,
    KL_EACH,
    KL_MEAN,
    Gradients,
    Inputs,
    Options,
    like_gradients,
    output_shape,
)
from groundkern.ops.attention_map import triton_kernels as kernels
from groundkern.ops.attention_map.triton_kernels import Columns
from groundkern.selection import Selection
from groundkern.tile_kernels import Attention, Heads, Keys, LiveTiles, live_tiles, sum_parts
from groundkern.tiles import Tile

# (4-byte operands, largest head dimension[, largest packed rows]) -> tile of every kernel of this
# op; 63, 127, 255 are for dimensions that are padded to the next power of two, whose masks take
# registers. Every row is an untuned first guess: compiled for sm_80, sm_90, sm_100 and gfx942 by
# `make aot`, never timed on a device. `make gpu` finds better ones.
TILES = {
    (False, 63): Tile(32, 32, 8, 2, 255),
    (False, 64): Tile(32, 32, 4, 2, 255),
    (False, 127): Tile(16, 32, 8, 1, 255),
    (False, 128): Tile(32, 32, 4, 2, 255),
    (False, 255): Tile(16, 32, 8, 2, 255),
    (False, 256): Tile(16, 32, 8, 2, 255),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 256): Tile(16, 32, 8, 1),
}
# Of the column kernels: which keys to load is itself loaded; pipelining that chain spills at 128 on
# gfx942, where at 64, 72 and 192 Triton 3.7 cannot compile it.
ONE_STAGE = {"num_stages": 1}


def unsupported(inputs: Inputs) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None if it can."""
    return tiles.unsupported(inputs.q, inputs.k, inputs.v)


class _Launch(NamedTuple):
    """What the kernels of one call are launched with."""

    inputs: Inputs  # rows contiguous
    selection: Selection  # contiguous
    options: Options
    own: Tensor  # uint8 [N, C]
    norm: Tensor | None  # fp32 [N, Hq], the normaliser; None until it is known

    @classmethod
    def of(cls, inputs: Inputs, selection: Selection, options: Options) -> "_Launch | None":
        """None if there is nothing to compute."""
        q, k = inputs[:2]
        if 0 in (q.shape[0], q.shape[1], k.shape[2], selection.columns.shape[1]):
            return None
        operands = (None if x is None else tiles.rows_contiguous(x) for x in inputs[:4])
        weight = None if inputs.head_weight is None else inputs.head_weight.contiguous()
        inputs = Inputs(*operands, weight, *inputs[5:])
        selection = selection.contiguous()
        own = _own(selection).view(torch.uint8)
        launch = cls(inputs, selection, options, own, None)
        norm = launch.normaliser().contiguous()
        if inputs.lse is not None:
            counted = (norm < torch.inf).any(1, keepdim=True)
            own = (own.bool() & counted).view(torch.uint8)
        return launch._replace(norm=norm, own=own)

    @property
    def group(self) -> int:
        return self.inputs.q.shape[1] // self.inputs.k.shape[1]

    @property
    def columns(self) -> int:
        return self.own.shape[1]

    @property
    def valued(self) -> bool:
        return self.options.kind == CONTRIBUTION

    @property
    def visible(self) -> bool:
        return self.options.over == "visible"

    @property
    def keys(self) -> int:
        return self.inputs.k.shape[2]

    def on_columns(
        self, shift: Tensor | None = None, u: Tensor | None = None, dnorm: Tensor | None = None
    ) -> Columns:
        """Of the kernels on the columns."""
        q, k, v, g, weight, _, _ = self.inputs
        operands = (Heads.of(q), Keys.of(k), Heads.of(q if g is None else g))
        operands = (*operands, Keys.of(k if v is None else v), self.norm)
        selected = (self.selection.sequence, self.selection.columns, self.own)
        scale, softcap = self.options[3:5]
        sizes = (q.shape[1], self.group, self.columns)
        above = (weight, dnorm, shift, u)
        return Columns(*operands, *selected, *above, scale, softcap or None, *sizes)

    def on_visible(self, live: LiveTiles | None, **changed: object) -> Attention:
        """Of the kernels on all visible keys."""
        q, k = self.inputs[:2]
        rows = self.selection._replace(bits=None, set_index=None, columns=None)
        scale, softcap = self.options[3:5]
        sizes = (scale, softcap or None, q.shape[1], self.group)
        return Attention(Heads.of(q), Keys.of(k), None, rows, live, *sizes)._replace(**changed)

    def tile(self, q: Tensor, *values: Tensor | None) -> Tile:
        """For head dimensions of q and of the values that are there."""
        packed = q.shape[0] * self.group
        dims = [x.shape[-1] for x in (q, *values) if x is not None]
        return TILES[tiles.tile_key(TILES, (q.dtype == torch.float32,), dims, packed)]

    def columns_tile(self) -> tuple[Tile, dict[str, object]]:
        """Of the kernels on the columns, with their constants."""
        q, k, v = self.inputs[:3]
        tile = self.tile(q, k if v is None else v)
        dims = {"D": q.shape[2], "DV": (k if v is None else v).shape[3]}
        flags = {"KIND": self.options.kind, "RECTIFY": self.options.rectify}
        return tile, dims | flags | tile.constants | ONE_STAGE

    def row_grid(self, tile: Tile, parts: int) -> tuple[int, int, int]:
        """(row tiles, KV heads, splits of `parts` tiles of keys or columns)."""
        q, k = self.inputs[:2]
        row_tiles = triton.cdiv(q.shape[0] * self.group, tile.block_m)
        return row_tiles, k.shape[1], tiles.splits(q.device, row_tiles * k.shape[1], parts)

    def column_grid(self, tile: Tile) -> tuple[int, int, int]:
        return self.row_grid(tile, triton.cdiv(self.columns, tile.block_n))

    def visible_grid(self, tile: Tile) -> tuple[tuple[int, int, int], LiveTiles]:
        batch, _, keys, _ = self.inputs.k.shape
        rows = self.selection._replace(bits=None, set_index=None)
        live = live_tiles(rows, self.group, batch, keys, tile)
        return self.row_grid(tile, triton.cdiv(keys, tile.block_n)), live

    def normaliser(self) -> Tensor:
        """[N, Hq] log-sum-exp over all visible keys or over own columns; 0 if there are none."""
        q, norm = self.inputs.q, self.inputs.lse
        (rows, heads, dim), tile = q.shape, self.tile(q)
        if not self.visible:
            grid = self.column_grid(tile)
            part = q.new_empty(grid[2], rows, heads, dtype=torch.float32)
            constants = tile.constants | ONE_STAGE
            x = self.on_columns()
            columns = x._replace(g=x.q, v=x.k, weight=None)  # one variant for all kinds
            kernels._norm_columns_kernel[grid](columns, part, rows, D=dim, **constants)
            norm = part.logsumexp(0)
        elif norm is None:
            grid, live = self.visible_grid(tile)
            part = q.new_empty(grid[2], rows, heads, dtype=torch.float32)
            sizes = (rows, self.keys, live.entries.shape[1])
            kernels._norm_visible_kernel[grid](
                self.on_visible(live), part, *sizes, D=dim, **tile.constants
            )
            norm = part.logsumexp(0)
        return torch.where(norm.isfinite(), norm, 0.0 if self.inputs.lse is None else torch.inf)

    def map(self) -> Tensor:
        """[N, C]: the map, the contributions, or log M for KL_MEAN."""
        q, k = self.inputs[:2]
        tile, constants = self.columns_tile()
        lanes = min(triton.next_power_of_2(self.group), tile.block_m)
        out = q.new_empty(q.shape[0], self.columns, dtype=torch.float32)
        row_tiles = triton.cdiv(q.shape[0], tile.block_m // lanes)
        kernels._map_kernel[row_tiles, triton.cdiv(self.columns, tile.block_n)](
            self.on_columns(), out, q.shape[0], k.shape[1], LANES=lanes, **constants
        )
        return out

    def sums(self, shift: Tensor | None, u: Tensor) -> Tensor:
        """[N, Hq]: sum_c u z; for KL_EACH sum_c u (log P - log p)."""
        q, (tile, constants) = self.inputs.q, self.columns_tile()
        grid, u = self.column_grid(tile), u.contiguous()
        part = q.new_empty(grid[2], *q.shape[:2], dtype=torch.float32)
        kernels._sums_kernel[grid](self.on_columns(shift, u), part, q.shape[0], **constants)
        return part.sum(0)

    def gradients(self, shift: Tensor | None, u: Tensor, dnorm: Tensor) -> Gradients:
        """All but dhead_weight; dnorm [N, Hq] is the normaliser's gradient."""
        (q, k, v, g, *_), u = self.inputs, u.contiguous()
        dnorm = torch.where(self.norm < torch.inf, dnorm, 0.0).contiguous()
        dlse = dnorm if self.options.lse_grad else None
        tile, constants = self.columns_tile()
        grid, splits = self.column_grid(tile), 0
        reached = self.visible and not self.options.lse_grad  # keys, by the normaliser's gradient
        if reached:
            key_tile = self.tile(q)
            visible_grid, live = self.visible_grid(key_tile)
            splits = visible_grid[2]
        part = q.new_empty(grid[2] + splits, *q.shape, dtype=torch.float32)
        part_g = g.new_empty(grid[2], *g.shape, dtype=torch.float32) if self.valued else None
        columns = self.on_columns(shift, u, None if self.visible else dnorm)
        kernels._backward_dq_columns_kernel[grid](columns, part, part_g, len(q), **constants)
        if reached:
            sizes = (len(q), self.keys, live.entries.shape[1])
            kernels._backward_dq_visible_kernel[visible_grid](
                self.on_visible(live),
                self.norm,
                dnorm,
                part[grid[2] :],
                *sizes,
                D=q.shape[2],
                **key_tile.constants,
            )
        lead = (*k.shape[:2], self.columns)
        on_k = k.new_empty(*lead, k.shape[3], dtype=torch.float32)
        on_v = v.new_empty(*lead, v.shape[3], dtype=torch.float32) if self.valued else None
        column_tiles = triton.cdiv(self.columns, tile.block_n)
        kernels._backward_dkv_columns_kernel[lead[0] * column_tiles, lead[1]](
            columns, on_k, on_v, len(q), **constants
        )
        dq = sum_parts(part, q, self.options.scale)
        dk = self.spread(q, k, dnorm if reached else None, on_k, self.options.scale)
        if not self.valued:
            return Gradients(dq, dk, None, None, None, dlse)
        dv = self.spread(g, v, None, on_v, 1.0)
        return Gradients(dq, dk, dv, sum_parts(part_g, g), None, dlse)

    def spread(
        self, q: Tensor, k: Tensor, dnorm: Tensor | None, part: Tensor, scale: float
    ) -> Tensor:
        """dk over all keys: the columns' part and, with dnorm, the normaliser's."""
        (batch, kv_heads, keys, dim), tile = k.shape, self.tile(q)
        dk = empty_like(k)
        attention = self.on_visible(None, q=Heads.of(q), k=Keys.of(k), scale=scale)
        kernels._backward_dk_kernel[batch * triton.cdiv(keys, tile.block_n), kv_heads](
            attention,
            None if dnorm is None else self.norm,
            dnorm,
            part,
            _column_of(self.selection.columns, keys),
            dk,
            q.shape[0],
            keys,
            part.shape[2],
            D=dim,
            **tile.constants,
        )
        return dk


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


def _column_of(columns: Tensor, keys: int) -> Tensor:
    """int32 [B, S]: the place of each key among the columns, -1 for none."""
    place = torch.arange(columns.shape[1], dtype=torch.int32, device=columns.device)
    spare = torch.where(columns >= 0, columns, keys).long()
    table = place.new_full((columns.shape[0], keys + 1), -1)
    return table.scatter_(1, spare, place.expand_as(spare))[:, :keys].contiguous()


def _target(target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(P, log P) [N, C] fp32, renormalised over own columns; log P is 0 where P is."""
    mass = torch.where(own.bool(), target.float(), 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / torch.where(total > 0, total, 1.0)
    return target, torch.where(target > 0, target, 1.0).log()


def forward(inputs: Inputs, selection: Selection, options: Options) -> Tensor:
    """fp32 [N, C], of a KL [N]."""
    launch = _Launch.of(inputs, selection, options)
    if launch is None:
        shape = output_shape(inputs, selection.columns, options)
        return inputs.q.new_zeros(shape, dtype=torch.float32)
    if options.kind not in (KL_MEAN, KL_EACH):
        return launch.map()
    target, log_target = _target(inputs.target, launch.own)
    if options.kind == KL_EACH:
        return (inputs.head_weight * launch.sums(log_target, target)).sum(1)
    return torch.where(target > 0, target * (log_target - launch.map()), 0.0).sum(1)  # (K3)


def backward(upstream: Tensor, inputs: Inputs, selection: Selection, options: Options) -> Gradients:
    """Contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    launch = _Launch.of(inputs, selection, options)
    if launch is None:
        like = like_gradients(inputs, options)
        return Gradients(*(None if x is None else zeros_like(x) for x in like))
    weight = launch.inputs.head_weight  # contiguous, and so is what it is multiplied with
    if options.kind not in (KL_MEAN, KL_EACH):
        upstream = upstream.contiguous()
        sums = launch.sums(None, upstream)
        if launch.valued:
            return launch.gradients(None, upstream, -sums)
        return launch.gradients(None, upstream, -weight * sums)._replace(dhead_weight=sums)
    target, log_target = _target(inputs.target, launch.own)
    u = -upstream[:, None] * target
    if options.kind == KL_EACH:
        dweight = upstream[:, None] * launch.sums(log_target, target)
        gradients = launch.gradients(log_target, u, -weight * u.sum(1, keepdim=True))
    else:
        log_map = launch.map()
        dweight = launch.sums(log_map, u)
        gradients = launch.gradients(log_map, u, -weight * dweight)
    return gradients._replace(dhead_weight=dweight)
