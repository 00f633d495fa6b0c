"""Triton kernels of attention maps (CUDA, ROCm).

The launchers; what happens on the columns is in `triton_column_kernels`, over all visible keys in
`triton_visible_kernels`. Between kernels only [N, C] (maps, targets, which columns are own) and
[N, Hq] (normalisers, head weights) are stored. No atomics, no sync.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from groundkern import tiles
from groundkern.ops.attention_map import triton_column_kernels as on_columns
from groundkern.ops.attention_map import triton_visible_kernels as on_visible
from groundkern.ops.attention_map.triton_column_kernels import EACH, MAP, MEAN, VALUE
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


def unsupported(q: Tensor, k: Tensor, v: Tensor | None) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None when it can."""
    return tiles.unsupported(q, k, v)


def _tile(
    q: Tensor, k: Tensor, value_dim: int | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, launch options) for q [N, Hq, D], k [B, Hkv, S, D] and values of `value_dim`."""
    dims = {"D": q.shape[-1]} | ({} if value_dim is None else {"DV": value_dim})
    packed = q.shape[0] * (q.shape[1] // k.shape[1])
    kind = (q.dtype == torch.float32,)
    tile = TILES[tiles.tile_key(TILES, kind, list(dims.values()), packed)]
    blocks = dims | {f"BLOCK_{name}": tiles.padded(dim) for name, dim in dims.items()}
    blocks |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return blocks, tile.options


class _Attention(NamedTuple):
    """What both functions end in, as op.py orders it."""

    sequence: Tensor
    start: Tensor
    stop: Tensor
    columns: Tensor
    words: Tensor | None
    set_index: Tensor | None
    lse: Tensor | None
    over: str
    scale: float
    softcap: float

    def own(self) -> Tensor:
        """bool [N, C]: the columns that are the row's own."""
        at = self.columns[self.sequence.long()]  # [N, C]
        own = (at >= 0) & (at >= self.start[:, None]) & (at < self.stop[:, None])
        if self.words is None or not len(self.words):
            return own
        word = self.words[self.set_index.clamp(min=0).long()].gather(
            1, at.clamp(min=0).long() // 32
        )
        member = (word >> (at.clamp(min=0) % 32)) & 1
        return own & ((member != 0) | (self.set_index < 0)[:, None])

    def column_of(self, keys: int) -> Tensor:
        """int32 [B, S]: the place of each key among the columns, -1 for none."""
        place = torch.arange(self.columns.shape[1], dtype=torch.int32, device=self.columns.device)
        spare = torch.where(self.columns >= 0, self.columns, keys).long()
        table = place.new_full((self.columns.shape[0], keys + 1), -1)
        return table.scatter_(1, spare, place.expand_as(spare))[:, :keys].contiguous()


class _Call(NamedTuple):
    """What the column kernels are launched with."""

    kind: triton.language.constexpr
    q: Tensor
    k: Tensor
    g: Tensor  # q where there are no values
    v: Tensor  # k where there are no values
    norm: Tensor  # [N, Hq]
    weight: Tensor | None  # [N, Hq]
    own: Tensor  # uint8 [N, C]
    attention: _Attention
    rectify: bool = False

    @property
    def columns(self) -> int:
        return self.own.shape[1]

    @property
    def tile(self) -> tuple[dict[str, int], dict[str, int]]:
        """(constexprs, launch options)."""
        blocks, options = _tile(self.q, self.k, self.v.shape[3])
        flags = {"KIND": self.kind, "RECTIFY": self.rectify}
        return blocks | flags, options | ONE_STAGE

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.g, self.v, self.norm

    @property
    def selected(self) -> tuple[Tensor, ...]:
        return self.attention.sequence, self.attention.columns, self.own

    @property
    def sizes(self) -> tuple[float | int | None, ...]:
        """scale, softcap, N, heads, group."""
        (n, heads, _), a = self.q.shape, self.attention
        return a.scale, a.softcap or None, n, heads, heads // self.k.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        return (
            *self.q.stride()[:2], *self.k.stride()[:3], *self.g.stride()[:2], *self.v.stride()[:3],
        )  # fmt: skip

    def grid(self) -> tuple[int, int, int]:
        """(row tiles, KV heads, column splits)."""
        blocks, _ = self.tile
        grid = _grid(self.q, self.k, blocks["BLOCK_M"])
        column_tiles = triton.cdiv(self.columns, blocks["BLOCK_N"])
        return *grid, tiles.splits(self.q.device, grid[0] * grid[1], column_tiles)

    def map(self) -> Tensor:
        """[N, C]: the map, the contributions, or log M for MEAN."""
        blocks, options = self.tile
        n, kv_heads = self.q.shape[0], self.k.shape[1]
        lanes = min(triton.next_power_of_2(self.sizes[-1]), blocks["BLOCK_M"])
        out = self.q.new_empty(n, self.columns, dtype=torch.float32)
        rows = triton.cdiv(n, blocks["BLOCK_M"] // lanes)
        on_columns.map_kernel[rows, triton.cdiv(self.columns, blocks["BLOCK_N"])](
            *self.operands, self.weight, *self.selected, out, *self.sizes, kv_heads, self.columns,
            *self.strides, LANES=lanes, **blocks, **options,
        )  # fmt: skip
        return out

    def sums(self, level: Tensor | None, u: Tensor) -> Tensor:
        """[N, Hq]: sum_c u z; for EACH sum_c u (log P - log p)."""
        grid, (blocks, options) = self.grid(), self.tile
        part = self.q.new_empty(grid[2], *self.q.shape[:2], dtype=torch.float32)
        on_columns.sums_kernel[grid](
            *self.operands, *self.selected, level, u, part, *self.sizes, self.columns,
            *self.strides, **blocks, **options,
        )  # fmt: skip
        return part.sum(0)

    def gradients(
        self, level: Tensor | None, u: Tensor, dnorm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """dq, dk, dg, dv; dnorm [N, Hq] is the normaliser's gradient."""
        q, k, g, v, a = self.q, self.k, self.g, self.v, self.attention
        valued, visible = self.kind == VALUE, a.over == "visible"
        grid, (blocks, options) = self.grid(), self.tile
        live_grid, live = _live(q, k, a) if visible else ((*grid[:2], 0), ())
        splits = grid[2] + live_grid[2]
        part = q.new_empty(splits, *q.shape, dtype=torch.float32)
        part_g = g.new_empty(grid[2], *g.shape, dtype=torch.float32) if valued else None
        shared = (
            *self.operands, None if visible else dnorm, self.weight, *self.selected, level, u,
        )  # fmt: skip
        sizes = (*self.sizes, self.columns, *self.strides)
        on_columns.columns_dq_kernel[grid](*shared, part, part_g, *sizes, **blocks, **options)
        if visible:
            _visible_dq(q, k, self.norm, dnorm, a, live_grid, live, part[grid[2] :])
        column_tiles = triton.cdiv(self.columns, blocks["BLOCK_N"])
        lead = (*k.shape[:2], self.columns)
        on_k = k.new_empty(*lead, k.shape[3], dtype=torch.float32)
        on_v = v.new_empty(*lead, v.shape[3], dtype=torch.float32) if valued else None
        on_columns.columns_dk_kernel[lead[0] * column_tiles, lead[1]](
            *shared, on_k, on_v, *sizes, **blocks, **options
        )
        dq = tiles.sum_parts(part, q, a.scale)
        dk = _spread(q, k, (self.norm, dnorm) if visible else (None, None), on_k, a, a.scale)
        if not valued:
            return dq, dk, None, None
        return dq, dk, tiles.sum_parts(part_g, g), _spread(g, v, (None, None), on_v, a, 1.0)


def _grid(q: Tensor, k: Tensor, block_m: int) -> tuple[int, int]:
    return triton.cdiv(q.shape[0] * (q.shape[1] // k.shape[1]), block_m), k.shape[1]


def _live(q: Tensor, k: Tensor, a: _Attention) -> tuple[tuple[int, int, int], tuple]:
    """(grid over rows, KV heads and key splits, live key tiles) for the visible keys."""
    blocks, _ = _tile(q, k)
    m, n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    group = q.shape[1] // k.shape[1]
    selection = (a.sequence, a.start, a.stop, None, None)
    live = tiles.live_tiles(selection, group, k.shape[0], k.shape[2], m, n)
    grid = _grid(q, k, m)
    return (*grid, tiles.splits(q.device, grid[0] * grid[1], live[3])), live


def _normaliser(q: Tensor, k: Tensor, a: _Attention, own: Tensor) -> Tensor:
    """[N, Hq] log-sum-exp over all visible keys, or over own columns; 0 where there are none."""
    (n, heads, _), (blocks, options), norm = q.shape, _tile(q, k), a.lse
    sizes, strides = (n, heads, heads // k.shape[1]), (*q.stride()[:2], *k.stride()[:3])
    if a.over == "columns":
        columns = a.columns.shape[1]
        grid = _grid(q, k, blocks["BLOCK_M"])
        column_tiles = triton.cdiv(columns, blocks["BLOCK_N"])
        grid = (*grid, tiles.splits(q.device, grid[0] * grid[1], column_tiles))
        part = q.new_empty(grid[2], n, heads, dtype=torch.float32)
        on_columns.column_statistics_kernel[grid](
            q, k, a.sequence, a.columns, own, part, a.scale, a.softcap or None, *sizes, columns,
            *strides, **blocks, **options | ONE_STAGE,
        )  # fmt: skip
        norm = part.logsumexp(0)
    elif norm is None:
        grid, live = _live(q, k, a)
        part = q.new_empty(grid[2], n, heads, dtype=torch.float32)
        on_visible.statistics_kernel[grid](
            q, k, a.sequence, a.start, a.stop, *live, part, a.scale, a.softcap or None, *sizes,
            k.shape[2], *strides, **blocks, **options,
        )  # fmt: skip
        norm = part.logsumexp(0)
    return torch.where(norm.isfinite(), norm, 0.0).contiguous()


def _visible_dq(
    q: Tensor, k: Tensor, norm: Tensor, dnorm: Tensor, a: _Attention, grid: tuple, live: tuple,
    part: Tensor,
) -> None:  # fmt: skip
    blocks, options = _tile(q, k)
    heads, kv_heads = q.shape[1], k.shape[1]
    on_visible.visible_dq_kernel[grid](
        q, k, norm, dnorm, a.sequence, a.start, a.stop, *live, part, a.scale, a.softcap or None,
        len(q), heads, heads // kv_heads, k.shape[2], *q.stride()[:2], *k.stride()[:3], **blocks,
        **options,
    )  # fmt: skip


def _spread(
    q: Tensor, k: Tensor, statistics: tuple, part: Tensor, a: _Attention, scale: float
) -> Tensor:
    """dk over all keys: the columns' part and, with (norm, dnorm), the normaliser's."""
    (n, heads, _), (batch, kv_heads, keys, _) = q.shape, k.shape
    blocks, options = _tile(q, k)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    on_visible.dk_kernel[batch * triton.cdiv(keys, blocks["BLOCK_N"]), kv_heads](
        q, k, *statistics, a.sequence, a.start, a.stop, part, a.column_of(keys), dk, scale,
        a.softcap or None, n, heads, heads // kv_heads, keys, part.shape[2],
        *q.stride()[:2], *k.stride()[:3], **blocks, **options,
    )  # fmt: skip
    return dk


def _call(kind, q, k, g, v, weight, attention: tuple, rectify: bool = False) -> _Call | None:
    """None where there is nothing to compute."""
    a = _Attention(*(x.contiguous() if isinstance(x, Tensor) else x for x in attention))
    if 0 in (q.shape[0], q.shape[1], k.shape[2], a.columns.shape[1]):
        return None
    operands = (q, k, q if g is None else g, k if v is None else v)
    q, k, g, v = (tiles.rows_contiguous(x) for x in operands)
    own = a.own().view(torch.uint8)
    weight = None if weight is None else weight.contiguous()
    return _Call(kind, q, k, g, v, _normaliser(q, k, a, own), weight, own, a, rectify)


def map_forward(q, k, v, g, head_weight, rectify: bool, *attention) -> Tensor:
    """[N, C]; either head_weight [N, Hq] or v and g are given."""
    call = _call(MAP if v is None else VALUE, q, k, g, v, head_weight, attention, rectify)
    if call is None:
        return q.new_zeros(q.shape[0], attention[3].shape[1], dtype=torch.float32)
    return call.map()


def map_backward(dmap: Tensor, q, k, v, g, head_weight, rectify: bool, *attention):
    """dq, dk, dv, dg, dhead_weight; None for the inputs that are absent."""
    call = _call(MAP if v is None else VALUE, q, k, g, v, head_weight, attention, rectify)
    if call is None:
        return _zeros(q, k, v, g, head_weight)
    dmap = dmap.contiguous()
    sums = call.sums(None, dmap)
    if v is None:
        dq, dk, _, _ = call.gradients(None, dmap, -head_weight * sums)
        return dq, dk, None, None, sums
    dq, dk, dg, dv = call.gradients(None, dmap, -sums)
    return dq, dk, dv, dg, None


def _target(target: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """(P, log P) [N, C] fp32, renormalised over own columns; log P is 0 where P is."""
    mass = torch.where(own.bool(), target.float(), 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / torch.where(total > 0, total, 1.0)
    return target, torch.where(target > 0, target, 1.0).log()


def kl_forward(q, k, head_weight, target: Tensor, heads: str, *attention) -> Tensor:
    """[N]."""
    call = _call(MEAN if heads == "mean" else EACH, q, k, None, None, head_weight, attention)
    if call is None:
        return q.new_zeros(q.shape[0], dtype=torch.float32)
    target, log_target = _target(target, call.own)
    if heads == "each":
        return (head_weight * call.sums(log_target, target)).sum(1)
    return torch.where(target > 0, target * (log_target - call.map()), 0.0).sum(1)  # (K3)


def kl_backward(dkl: Tensor, q, k, head_weight, target: Tensor, heads: str, *attention):
    """dq, dk, dhead_weight."""
    call = _call(MEAN if heads == "mean" else EACH, q, k, None, None, head_weight, attention)
    if call is None:
        return _zeros(q, k, head_weight)
    target, log_target = _target(target, call.own)
    u = -dkl[:, None] * target
    if heads == "each":
        dweight = dkl[:, None] * call.sums(log_target, target)
        dq, dk, _, _ = call.gradients(log_target, u, -head_weight * u.sum(1, keepdim=True))
    else:
        log_map = call.map()
        dweight = call.sums(log_map, u)
        dq, dk, _, _ = call.gradients(log_map, u, -head_weight * dweight)
    return dq, dk, dweight


def _zeros(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    like = torch.zeros
    return tuple(
        None if x is None else like(x.shape, dtype=x.dtype, device=x.device) for x in inputs
    )
