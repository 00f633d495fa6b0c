"""Triton kernels of attention maps (CUDA, ROCm).

First version: the scores on the columns (and v . g) are stored, [N, Hq, C] in fp32, and what the
equations do with them is torch on that, differentiated by autograd. The scores of all other visible
keys are never stored: their log-sum-exp and its gradient, which reaches every visible key, are
computed tile by tile. No atomics, no sync.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundkern import tiles
from groundkern.row_blocks import vjp
from groundkern.tiles import (
    Tile,
    allowed_keys,
    any_of,
    capped,
    dot,
    load_heads,
    load_tile,
    row_bounds,
    rows_of_sequence,
    store_tile,
    uncapped_gradient,
    wide,
)

# (4-byte operands, largest padded head dimension) -> tile of every kernel here. Every row is an
# untuned first guess: compiled for sm_80, sm_90, sm_100 and gfx942 by `make aot`, never timed.
TILES = {
    (False, 64): Tile(32, 64, 4),
    (False, 128): Tile(32, 32, 8),
    (False, 256): Tile(16, 32, 8),
    (True, 64): Tile(16, 32, 4),
    (True, 128): Tile(16, 32, 8),
    (True, 256): Tile(16, 32, 8, 1),
}


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, sequence_ptr, columns_ptr, s_ptr, scale, N, heads, group, C, q_n, q_h, k_b, k_h,
    k_s, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale q . k on one tile of columns: s [N, Hq, C]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c, kv_head = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    at = wide(heads) * n + head
    first_b = tl.min(tl.where(kept, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        column = tl.load(columns_ptr + wide(b) * C + c, mask=c < C, other=-1)
        k = k_ptr + wide(b) * k_b + wide(kv_head) * k_h
        k = load_tile(k, column, k_s, column >= 0, D, BLOCK_D)
        s = dot(q, tl.trans(k)) * scale
        stored = (sequence == b)[:, None] & (c < C)[None, :]
        tl.store(s_ptr + at[:, None] * C + c[None, :], s, mask=stored)


@triton.jit
def _columns_dq_kernel(
    ds_ptr, k_ptr, sequence_ptr, columns_ptr, part_ptr, N, heads, group, C, k_b, k_h, k_s,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds k over one split of the columns: part [splits, N, Hq, D]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    at = wide(heads) * n + head
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_b = tl.min(tl.where(kept, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        for c0 in range(split * BLOCK_N, C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            column = tl.load(columns_ptr + wide(b) * C + c, mask=c < C, other=-1)
            k = k_ptr + wide(b) * k_b + wide(kv_head) * k_h
            k = load_tile(k, column, k_s, column >= 0, D, BLOCK_D)
            read = (sequence == b)[:, None] & (c < C)[None, :]
            ds = tl.load(ds_ptr + at[:, None] * C + c[None, :], mask=read, other=0.0)
            dq += dot(ds.to(k.dtype), k)
    store_tile(part_ptr, wide(split) * N * heads + at, D, kept, dq, D, BLOCK_D)


@triton.jit
def _columns_dk_kernel(
    ds_ptr, q_ptr, sequence_ptr, dk_ptr, N, heads, group, C, q_n, q_h, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ds^T q of one column tile: fp32 [B, Hkv, C, D]."""
    column_tiles = tl.cdiv(C, BLOCK_N)
    b, kv_head = tl.program_id(0) // column_tiles, tl.program_id(1)
    c = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = rows_of_sequence(sequence_ptr, b, N)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i0 in range(first * group, last * group, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        n, head = i // group, kv_head * group + i % group
        kept = n < last
        q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
        at = wide(heads) * n + head
        read = (c < C)[:, None] & kept[None, :]
        ds = tl.load(ds_ptr + at[None, :] * C + c[:, None], mask=read, other=0.0)
        dk += dot(ds.to(q.dtype), q)
    at = (wide(b) * tl.num_programs(1) + kv_head) * C + c
    store_tile(dk_ptr, at, D, c < C, dk, D, BLOCK_D)


@triton.jit
def _statistics_kernel(
    q_ptr, k_ptr, sequence_ptr, start_ptr, stop_ptr, list_ptr, count_ptr, entries, key_tiles,
    lse_ptr, scale, softcap, N, heads, group, keys, q_n, q_h, k_b, k_h, k_s, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the visible keys of one split: [splits, N, Hq]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, None)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    list_ptr += wide(tl.program_id(0)) * entries
    for e in range(split, tl.load(count_ptr + tl.program_id(0)), tl.num_programs(2)):
        entry = tl.load(list_ptr + e)
        b, j0 = entry // key_tiles, (entry % key_tiles) * BLOCK_N
        end = tl.where(sequence == b, stop, 0)
        j = j0 + tl.arange(0, BLOCK_N)
        k = k_ptr + wide(b) * k_b + wide(kv_head) * k_h
        k = load_tile(k, j, k_s, j < keys, D, BLOCK_D)
        visible = allowed_keys(j0, start, end, member, None, 0, BLOCK_N)
        s = capped(dot(q, tl.trans(k)) * scale, softcap)
        s = tl.where(visible, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.exp(m - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        m = m_new
    lse = tl.where(l > 0.0, m + tl.log(tl.where(l > 0.0, l, 1.0)), -float("inf"))
    tl.store(lse_ptr + (wide(split) * N + n) * heads + head, lse, mask=kept)


@triton.jit
def _visible_dq_kernel(
    q_ptr, k_ptr, norm_ptr, dnorm_ptr, sequence_ptr, start_ptr, stop_ptr, list_ptr, count_ptr,
    entries, key_tiles, part_ptr, scale, softcap, N, heads, group, keys, q_n, q_h, k_b, k_h, k_s,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The normaliser's part of dq / scale over one split of the keys: part [splits, N, Hq, D]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, None)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    norm = tl.load(norm_ptr + n * heads + head, mask=kept, other=0.0)
    dnorm = tl.load(dnorm_ptr + n * heads + head, mask=kept, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    list_ptr += wide(tl.program_id(0)) * entries
    for e in range(split, tl.load(count_ptr + tl.program_id(0)), tl.num_programs(2)):
        entry = tl.load(list_ptr + e)
        b, j0 = entry // key_tiles, (entry % key_tiles) * BLOCK_N
        end = tl.where(sequence == b, stop, 0)
        j = j0 + tl.arange(0, BLOCK_N)
        k = k_ptr + wide(b) * k_b + wide(kv_head) * k_h
        k = load_tile(k, j, k_s, j < keys, D, BLOCK_D)
        visible = allowed_keys(j0, start, end, member, None, 0, BLOCK_N)
        raw = dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N]
        p = tl.where(visible, capped(raw, softcap) - norm[:, None], -float("inf"))
        ds = uncapped_gradient(tl.exp(p) * dnorm[:, None], raw, softcap)
        dq += dot(ds.to(k.dtype), k)
    at = (wide(split) * N + n) * heads + head
    store_tile(part_ptr, at, D, kept, dq, D, BLOCK_D)


@triton.jit
def _dk_kernel(
    q_ptr, k_ptr, norm_ptr, dnorm_ptr, sequence_ptr, start_ptr, stop_ptr, column_dk_ptr,
    column_of_ptr, dk_ptr, scale, softcap, N, heads, group, keys, C, q_n, q_h, k_b, k_h, k_s,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk of one key tile: its columns' part and, with norm, the normaliser's; zeros elsewhere."""
    key_tiles = tl.cdiv(keys, BLOCK_N)
    b, kv_head = tl.program_id(0) // key_tiles, tl.program_id(1)
    j0 = (tl.program_id(0) % key_tiles) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    column = tl.load(column_of_ptr + wide(b) * keys + j, mask=j < keys, other=-1)
    at = (wide(b) * tl.num_programs(1) + kv_head) * C + column
    dk = load_tile(column_dk_ptr, at, D, column >= 0, D, BLOCK_D)
    if norm_ptr is not None:
        first, last = rows_of_sequence(sequence_ptr, b, N)
        k = k_ptr + wide(b) * k_b + wide(kv_head) * k_h
        k = load_tile(k, j, k_s, (j < keys) & (last > first), D, BLOCK_D)
        for i0 in range(first * group, last * group, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            n, head = i // group, kv_head * group + i % group
            kept = n < last
            start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, None)
            visible = allowed_keys(j0, start, stop, member, None, 0, BLOCK_N)
            if any_of(visible):
                q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
                norm = tl.load(norm_ptr + n * heads + head, mask=kept, other=0.0)
                dnorm = tl.load(dnorm_ptr + n * heads + head, mask=kept, other=0.0)
                raw = dot(k, tl.trans(q)) * scale  # [BLOCK_N, BLOCK_M]
                p = capped(raw, softcap) - norm[None, :]
                p = tl.exp(tl.where(tl.trans(visible), p, -float("inf")))
                ds = uncapped_gradient(p * dnorm[None, :], raw, softcap)
                dk += dot(ds.to(q.dtype), q)
    at = (wide(b) * tl.num_programs(1) + kv_head) * keys + j
    store_tile(dk_ptr, at, D, j < keys, dk * scale, D, BLOCK_D)


def unsupported(q: Tensor, k: Tensor, v: Tensor | None) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None when it can."""
    return tiles.unsupported(q, k, v)


def _tile(q: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """(constexprs, launch options) for operands [..., D] like q."""
    block = tiles.padded(q.shape[-1])
    row = next(d for d in (64, 128, 256) if d >= block)
    tile = TILES[q.dtype == torch.float32, row]
    blocks = {"D": q.shape[-1], "BLOCK_D": block}
    blocks |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return blocks, {"num_warps": tile.warps, "num_stages": tile.stages}


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


def _grid(q: Tensor, k: Tensor, block_m: int) -> tuple[int, int]:
    return triton.cdiv(q.shape[0] * (q.shape[1] // k.shape[1]), block_m), k.shape[1]


def _scores(q: Tensor, k: Tensor, a: _Attention, scale: float) -> Tensor:
    """scale q . k on the columns, fp32 [N, Hq, C]."""
    (n, heads, _), c = q.shape, a.columns.shape[1]
    s = q.new_empty(n, heads, c, dtype=torch.float32)
    blocks, options = _tile(q)
    _scores_kernel[(*_grid(q, k, blocks["BLOCK_M"]), triton.cdiv(c, blocks["BLOCK_N"]))](
        q, k, a.sequence, a.columns, s, scale, n, heads, heads // k.shape[1], c, *q.stride()[:2],
        *k.stride()[:3], **blocks, **options,
    )  # fmt: skip
    return s


def _live(q: Tensor, k: Tensor, a: _Attention) -> tuple[tuple[int, int, int], tuple]:
    """(grid over rows, KV heads and key splits, live key tiles) for the visible keys."""
    blocks, _ = _tile(q)
    m, n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    group = q.shape[1] // k.shape[1]
    selection = (a.sequence, a.start, a.stop, None, None)
    live = tiles.live_tiles(selection, group, k.shape[0], k.shape[2], m, n)
    grid = _grid(q, k, m)
    return (*grid, tiles.splits(q.device, grid[0] * grid[1], live[3])), live


def _normaliser(q: Tensor, k: Tensor, a: _Attention) -> Tensor | None:
    """[N, Hq] log-sum-exp over all visible keys, 0 where there are none; None over columns."""
    if a.over == "columns":
        return None
    norm = a.lse
    if norm is None:
        grid, live = _live(q, k, a)
        (n, heads, _), (blocks, options) = q.shape, _tile(q)
        part = q.new_empty(grid[2], n, heads, dtype=torch.float32)
        _statistics_kernel[grid](
            q, k, a.sequence, a.start, a.stop, *live, part, a.scale, a.softcap or None, n, heads,
            heads // k.shape[1], k.shape[2], *q.stride()[:2], *k.stride()[:3], **blocks, **options,
        )  # fmt: skip
        norm = part.logsumexp(0)
    return torch.where(norm.isfinite(), norm, 0.0).contiguous()


def _gradients(
    ds: Tensor, dnorm: Tensor | None, norm: Tensor | None, q: Tensor, k: Tensor, a: _Attention,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, dk of scale q . k from ds [N, Hq, C] and, where given, dnorm [N, Hq]."""
    (n, heads, dim), (batch, kv_heads, keys, _), c = q.shape, k.shape, a.columns.shape[1]
    blocks, options = _tile(q)
    group, tile = heads // kv_heads, blocks["BLOCK_N"]
    rows, column_tiles = _grid(q, k, blocks["BLOCK_M"]), triton.cdiv(c, tile)
    column_splits = tiles.splits(q.device, rows[0] * rows[1], column_tiles)
    grid, live = ((*rows, 0), ()) if norm is None else _live(q, k, a)
    part = q.new_empty(column_splits + grid[2], n, heads, dim, dtype=torch.float32)
    q_strides, k_strides = q.stride()[:2], k.stride()[:3]
    _columns_dq_kernel[(*rows, column_splits)](
        ds, k, a.sequence, a.columns, part, n, heads, group, c, *k_strides, **blocks, **options
    )
    visible = (norm, None if norm is None else dnorm.contiguous(), a.sequence, a.start, a.stop)
    softcap = a.softcap or None
    if norm is not None:
        _visible_dq_kernel[grid](
            q, k, *visible, *live, part[column_splits:], scale, softcap, n, heads, group, keys,
            *q_strides, *k_strides, **blocks, **options,
        )  # fmt: skip
    column_dk = q.new_empty(batch, kv_heads, c, dim, dtype=torch.float32)
    _columns_dk_kernel[batch * column_tiles, kv_heads](
        ds, q, a.sequence, column_dk, n, heads, group, c, *q_strides, **blocks, **options
    )
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _dk_kernel[batch * triton.cdiv(keys, tile), kv_heads](
        q, k, *visible, column_dk, a.column_of(keys), dk, scale, softcap, n, heads, group, keys, c,
        *q_strides, *k_strides, **blocks, **options,
    )  # fmt: skip
    return tiles.sum_parts(part, q, scale), dk


def _log_p(s: Tensor, norm: Tensor | None, own: Tensor, softcap: float) -> Tensor:
    """log p [N, Hq, C] of (K1), meaningful on own columns only."""
    s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
    if norm is None:
        kept = own | ~own.any(-1, keepdim=True)
        norm = s.masked_fill(~kept[:, None], -torch.inf).logsumexp(-1)
    return s - norm[..., None]


def _map(s, norm, value, weight, *, own: Tensor, rectify: bool, softcap: float) -> Tensor:
    """(K2) or, with value, (C1)."""
    log_p = _log_p(s, norm, own, softcap).masked_fill(~own[:, None], -torch.inf)
    if value is None:
        return (weight[..., None] * log_p.exp()).sum(1)
    return (log_p.exp() * (value.relu() if rectify else value)).sum(1)


def _kl(s, norm, weight, *, target: Tensor, own: Tensor, heads: str, softcap: float) -> Tensor:
    """(K3)."""
    mass = torch.where(own, target, 0.0)
    total = mass.sum(-1, keepdim=True)
    target = mass / torch.where(total > 0, total, 1.0)
    log_p = _log_p(s, norm, own, softcap).masked_fill(~own[:, None], 0.0)
    log_target = torch.where(target > 0, target, 1.0).log()
    if heads == "each":
        return (weight * (target[:, None] * (log_target[:, None] - log_p)).sum(-1)).sum(1)
    shift = (log_p + torch.where(weight > 0, 0.0, -torch.inf)[..., None]).amax(1).detach()
    shift = torch.where(shift.isfinite(), shift, 0.0)
    relative = (log_p - shift[:, None]).clamp(max=80.0).exp()  # weight 0 may lie far above
    mixture = (weight[..., None] * relative).sum(1)  # M_tc exp(-shift)
    log_map = shift + torch.where(target > 0, mixture, 1.0).log()
    return (target * (log_target - log_map)).sum(-1)


def _prepared(q: Tensor, k: Tensor, attention: tuple) -> tuple[Tensor, Tensor, _Attention]:
    whole = (x.contiguous() if isinstance(x, Tensor) else x for x in attention)
    return tiles.rows_contiguous(q), tiles.rows_contiguous(k), _Attention(*whole)


def _nothing(q: Tensor, k: Tensor, a: _Attention) -> bool:
    return 0 in (q.shape[0], q.shape[1], k.shape[2], a.columns.shape[1])


def map_forward(q, k, v, g, head_weight, rectify: bool, *attention) -> Tensor:
    """[N, C]; either head_weight [N, Hq] or v and g are given."""
    q, k, a = _prepared(q, k, attention)
    if _nothing(q, k, a):
        return q.new_zeros(q.shape[0], a.columns.shape[1], dtype=torch.float32)
    s, norm, value = _scores(q, k, a, a.scale), _normaliser(q, k, a), _values(v, g, a)
    return _map(s, norm, value, head_weight, own=a.own(), rectify=rectify, softcap=a.softcap)


def map_backward(dmap: Tensor, q, k, v, g, head_weight, rectify: bool, *attention):
    """dq, dk, dv, dg, dhead_weight; None for the inputs that are absent."""
    q, k, a = _prepared(q, k, attention)
    if _nothing(q, k, a):
        return _zeros(q, k, v, g, head_weight)
    s, norm, value = _scores(q, k, a, a.scale), _normaliser(q, k, a), _values(v, g, a)
    block = partial(_map, own=a.own(), rectify=rectify, softcap=a.softcap)
    ds, dnorm, dvalue, dweight = vjp(block, (s, norm, value, head_weight), (dmap,))
    dq, dk = _gradients(ds.contiguous(), dnorm, norm, q, k, a, a.scale)
    if value is None:
        return dq, dk, None, None, dweight
    g, v = tiles.rows_contiguous(g), tiles.rows_contiguous(v)
    dg, dv = _gradients(dvalue.contiguous(), None, None, g, v, a, 1.0)
    return dq, dk, dv, dg, dweight


def kl_forward(q, k, head_weight, target: Tensor, heads: str, *attention) -> Tensor:
    """[N]."""
    q, k, a = _prepared(q, k, attention)
    if _nothing(q, k, a):
        return q.new_zeros(q.shape[0], dtype=torch.float32)
    s, norm, target = _scores(q, k, a, a.scale), _normaliser(q, k, a), target.float()
    return _kl(s, norm, head_weight, target=target, own=a.own(), heads=heads, softcap=a.softcap)


def kl_backward(dkl: Tensor, q, k, head_weight, target: Tensor, heads: str, *attention):
    """dq, dk, dhead_weight."""
    q, k, a = _prepared(q, k, attention)
    if _nothing(q, k, a):
        return _zeros(q, k, head_weight)
    s, norm = _scores(q, k, a, a.scale), _normaliser(q, k, a)
    block = partial(_kl, target=target.float(), own=a.own(), heads=heads, softcap=a.softcap)
    ds, dnorm, dweight = vjp(block, (s, norm, head_weight), (dkl,))
    return *_gradients(ds.contiguous(), dnorm, norm, q, k, a, a.scale), dweight


def _values(v: Tensor | None, g: Tensor | None, a: _Attention) -> Tensor | None:
    """v . g on the columns, [N, Hq, C]; None without them."""
    return None if v is None else _scores(*map(tiles.rows_contiguous, (g, v)), a, 1.0)


def _zeros(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    like = torch.zeros
    return tuple(
        None if x is None else like(x.shape, dtype=x.dtype, device=x.device) for x in inputs
    )
