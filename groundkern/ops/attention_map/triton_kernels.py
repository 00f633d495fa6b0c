"""Triton kernels of attention maps, contributions and their KL (CUDA, ROCm).

Scores are recomputed wherever they are needed, so that nothing of size [N, Hq, C] is ever stored:
between kernels there are only [N, C] (maps, targets, which columns are own) and [N, Hq]
(normalisers, head weights). With own columns c of row n, and u [N, C] the gradient that arrives
from above, every gradient on the columns is

    ds_hc = w_h z_hc u_c  [- p_hc sum_c' w_h z_hc' u_c'  if p is normalised over the columns]
    MAP           z = p                  u = dmap                          (K2)
    CONTRIBUTION  z = p f(v . g), w = 1  u = dmap                          (C1)
    KL_MEAN       z = p / M              u = -dkl P                        (K3)
    KL_EACH       z = 1                  u = -dkl P                        (K3)

`shift` [N, C] is log M for KL_MEAN and log P for KL_EACH. If p is normalised over all visible keys,
the normaliser's gradient reaches every one of them: the `_visible` kernels. No atomics.
"""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern import tile_kernels as tk
from groundkern.ops import attention_map
from groundkern.tile_kernels import Heads, Keys
from groundkern.tiles import helper, kernel, padded

MAP = tl.constexpr(attention_map.MAP)
CONTRIBUTION = tl.constexpr(attention_map.CONTRIBUTION)
KL_MEAN = tl.constexpr(attention_map.KL_MEAN)
KL_EACH = tl.constexpr(attention_map.KL_EACH)


class Columns(NamedTuple):
    """What the kernels on the columns read."""

    q: Heads  # [N, Hq, D]
    k: Keys  # [B, Hkv, S, D]
    g: Heads  # [N, Hq, Dv]; q if there are no values
    v: Keys  # [B, Hkv, S, Dv]; k if there are no values
    norm: (
        Tensor | None
    )  # fp32 [N, Hq]: log-sum-exp of the scores, 0 if there are none; inf: left out
    sequence: Tensor  # int32 [N]
    columns: Tensor  # int32 [B, C]
    own: Tensor  # uint8 [N, C]
    weight: Tensor | None  # fp32 [N, Hq]
    dnorm: Tensor | None  # fp32 [N, Hq], if p is normalised over the columns
    shift: Tensor | None  # fp32 [N, C]
    u: Tensor | None  # fp32 [N, C]
    scale: float
    softcap: float | None
    heads: int
    group: int
    C: int


@helper
def _column_tile(x, b, c):
    """Key columns of a tile, -1 outside: [BLOCK_N]."""
    return tl.load(x.columns + tk.wide(b) * x.C + c, mask=c < x.C, other=-1)


@helper
def _own_columns(x, n, sequence, b, c):
    """Where [N, C] tensors have a tile, and the columns that are own: [BLOCK_M, BLOCK_N]."""
    at = tk.wide(x.C) * n[:, None] + c[None, :]
    here = (sequence == b)[:, None] & (c < x.C)[None, :]
    return at, tl.load(x.own + at, mask=here, other=0) != 0


@helper
def _sequences(sequence, mask):
    """(first, last + 1) of the sequences of a row tile."""
    return tl.min(tl.where(mask, sequence, 2147483647), 0), tl.max(sequence, 0) + 1


@helper
def _load_rows(x, N, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row, query head, whether it is in range, and sequence [BLOCK_M], q [BLOCK_M, padded D]."""
    n, head, mask = tk.row_tile(N, x.group, BLOCK_M)
    sequence = tl.load(x.sequence + n, mask=mask, other=-1)
    return n, head, mask, sequence, tk.load_heads(x.q, n, head, mask, D)


@helper
def _load_columns(x, n, sequence, b, c, D: tl.constexpr):
    """Key columns and k of a tile, where [N, C] tensors have it, and which columns are own."""
    column = _column_tile(x, b, c)
    k = tk.load_keys(x.k, b, tl.program_id(1), column, column >= 0, D)
    at, own = _own_columns(x, n, sequence, b, c)
    return column, k, at, own


@helper
def _log_p(raw, softcap, norm, own):
    """(K1) log p on own columns, -inf elsewhere, and where that is."""
    own = own & (norm < float("inf"))
    return tl.where(own, tk.capped(raw, softcap) - norm, -float("inf")), own


@helper
def _z(x, log_p, own, value, at, KIND: tl.constexpr, RECTIFY: tl.constexpr):
    """z of the table above on own columns, 0 elsewhere."""
    if KIND == KL_EACH:
        z = tl.full(log_p.shape, 1.0, tl.float32)
    elif KIND == KL_MEAN:
        shift = tl.load(x.shift + at, mask=own, other=0.0)
        z = tl.exp(tl.minimum(log_p - shift, 80.0))  # a head of weight 0 may lie far above
    else:
        z = tl.exp(log_p)
        if KIND == CONTRIBUTION:
            z *= tl.maximum(value, 0.0) if RECTIFY else value
    return tl.where(own, z, 0.0)


@helper
def _value_gradient(log_p, u, value, RECTIFY: tl.constexpr):
    """The gradient at v . g: p f' u."""
    dvalue = tl.exp(log_p) * u
    if RECTIFY:
        dvalue = tl.where(value > 0.0, dvalue, 0.0)
    return dvalue


@kernel
def _norm_columns_kernel(
    x,  # `Columns`
    lse_ptr,  # fp32 [splits, N, Hq]
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Log-sum-exp over the own columns of one split."""
    n, head, mask, sequence, q = _load_rows(x, N, D, BLOCK_M)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    first_b, last_b = _sequences(sequence, mask)
    for b in range(first_b, last_b):
        for c0 in range(tl.program_id(2) * BLOCK_N, x.C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            _, k, _, own = _load_columns(x, n, sequence, b, c, D)
            s = tl.where(own, tk.capped(tk.dot(q, tl.trans(k)) * x.scale, x.softcap), -float("inf"))
            m, l = tk.online_sum(m, l, s)
    tl.store(lse_ptr + tk.partial_at(x, n, head, N), tk.log_sum(m, l), mask=mask)


@kernel
def _norm_visible_kernel(
    x,  # `Attention` without sets and v
    lse_ptr,  # fp32 [splits, N, Hq]
    N,
    keys,
    entries,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Log-sum-exp over the visible keys of one split."""
    n, head, mask, rows, q = tk.load_rows(x, N, D, BLOCK_M)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for e in range(tl.program_id(2), tl.load(x.live.count + tl.program_id(0)), tl.num_programs(2)):
        _, _, k, visible = tk.load_live_tile(x, e, rows, keys, entries, D, BLOCK_N)
        s = tk.capped(tk.dot(q, tl.trans(k)) * x.scale, x.softcap)
        s = tl.where(visible, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        m, l = tk.online_sum(m, l, s)
    tl.store(lse_ptr + tk.partial_at(x, n, head, N), tk.log_sum(m, l), mask=mask)


@kernel
def _map_kernel(
    x,  # `Columns`
    map_ptr,  # fp32 [N, C]
    N,
    kv_heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """(K2), (C1) or log M of (K3) on BLOCK_M / LANES rows and one column tile: all heads, LANES of
    a group at a time."""
    ROWS: tl.constexpr = BLOCK_M // LANES
    i, row = tl.arange(0, BLOCK_M), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n, lane = tl.program_id(0) * ROWS + i // LANES, i % LANES
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence = tl.load(x.sequence + n, mask=n < N, other=-1)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    top = tl.full((ROWS, BLOCK_N), -float("inf"), tl.float32)
    parts = tl.cdiv(x.group, LANES)
    first_b, last_b = _sequences(sequence, n < N)
    for b in range(first_b, last_b):
        column = _column_tile(x, b, c)
        _, own = _own_columns(x, n, sequence, b, c)
        for part in range(kv_heads * parts):
            kv_head, member = part // parts, (part % parts) * LANES + lane
            head, mask = kv_head * x.group + member, (sequence == b) & (member < x.group)
            q = tk.load_heads(x.q, n, head, mask, D)
            k = tk.load_keys(x.k, b, kv_head, column, column >= 0, D)
            norm = tl.load(x.norm + n * x.heads + head, mask=mask, other=0.0)
            raw = tk.dot(q, tl.trans(k)) * x.scale
            log_p, _ = _log_p(raw, x.softcap, norm[:, None], own & mask[:, None])
            if KIND == CONTRIBUTION:
                g = tk.load_heads(x.g, n, head, mask, DV)
                v = tk.load_keys(x.v, b, kv_head, column, column >= 0, DV)
                value = tk.dot(g, tl.trans(v))
                y = tl.exp(log_p) * (tl.maximum(value, 0.0) if RECTIFY else value)
                total += tl.sum(tl.reshape(y, (ROWS, LANES, BLOCK_N)), 1)
            else:
                w = tl.load(x.weight + n * x.heads + head, mask=mask, other=0.0)
                if KIND == MAP:
                    y = tl.exp(log_p) * w[:, None]
                    total += tl.sum(tl.reshape(y, (ROWS, LANES, BLOCK_N)), 1)
                else:
                    log_w = tl.where(w > 0.0, tl.log(tl.where(w > 0.0, w, 1.0)), -float("inf"))
                    y = tl.reshape(log_p + log_w[:, None], (ROWS, LANES, BLOCK_N))
                    new, shift = tk.online_max(top, y)
                    part_sum = tl.sum(tl.exp(y - shift[:, None, :]), 1)
                    total = total * tl.exp(top - shift) + part_sum
                    top = new
    if KIND == KL_MEAN:
        total = tk.log_sum(top, total)
    stored = (row < N)[:, None] & (c < x.C)[None, :]
    tl.store(map_ptr + tk.wide(x.C) * row[:, None] + c[None, :], total, mask=stored)


@kernel
def _sums_kernel(
    x,  # `Columns`
    part_ptr,  # fp32 [splits, N, Hq]
    N,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """sum_c u_c z_hc over the own columns of one split; KL_EACH: sum_c u_c (log P_c - log p_hc)."""
    n, head, mask, sequence, q = _load_rows(x, N, D, BLOCK_M)
    norm = tl.load(x.norm + n * x.heads + head, mask=mask, other=0.0)
    if KIND == CONTRIBUTION:
        g = tk.load_heads(x.g, n, head, mask, DV)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first_b, last_b = _sequences(sequence, mask)
    for b in range(first_b, last_b):
        for c0 in range(tl.program_id(2) * BLOCK_N, x.C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            column, k, at, own = _load_columns(x, n, sequence, b, c, D)
            raw = tk.dot(q, tl.trans(k)) * x.scale
            log_p, own = _log_p(raw, x.softcap, norm[:, None], own)
            value = log_p
            if KIND == CONTRIBUTION:
                v = tk.load_keys(x.v, b, tl.program_id(1), column, column >= 0, DV)
                value = tk.dot(g, tl.trans(v))
            u = tl.load(x.u + at, mask=own, other=0.0)
            if KIND == KL_EACH:
                shift = tl.load(x.shift + at, mask=own, other=0.0)
                z = tl.where(own, shift - log_p, 0.0)
            else:
                z = _z(x, log_p, own, value, at, KIND, RECTIFY)
            total += tl.sum(u * z, 1)
    tl.store(part_ptr + tk.partial_at(x, n, head, N), total, mask=mask)


@kernel
def _backward_dq_columns_kernel(
    x,  # `Columns`
    dq_ptr,  # fp32 [splits, N, Hq, D]
    dg_ptr,  # fp32 [splits, N, Hq, Dv] or None
    N,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """ds k / scale, and for CONTRIBUTION dvalue v, over one split of the columns."""
    n, head, mask, sequence, q = _load_rows(x, N, D, BLOCK_M)
    stat = n * x.heads + head
    norm = tl.load(x.norm + stat, mask=mask, other=0.0)
    w = tl.full((BLOCK_M,), 1.0, tl.float32)
    if KIND != CONTRIBUTION:
        w = tl.load(x.weight + stat, mask=mask, other=0.0)
    else:
        g = tk.load_heads(x.g, n, head, mask, DV)
        dg = tl.zeros((BLOCK_M, padded(DV)), tl.float32)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    first_b, last_b = _sequences(sequence, mask)
    for b in range(first_b, last_b):
        for c0 in range(tl.program_id(2) * BLOCK_N, x.C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            column, k, at, own = _load_columns(x, n, sequence, b, c, D)
            u = tl.load(x.u + at, mask=own, other=0.0)
            raw = tk.dot(q, tl.trans(k)) * x.scale  # [BLOCK_M, BLOCK_N]
            log_p, own = _log_p(raw, x.softcap, norm[:, None], own)
            value = log_p
            if KIND == CONTRIBUTION:
                v = tk.load_keys(x.v, b, tl.program_id(1), column, column >= 0, DV)
                value = tk.dot(g, tl.trans(v))
                dg += tk.dot(_value_gradient(log_p, u, value, RECTIFY).to(v.dtype), v)
            ds = w[:, None] * u * _z(x, log_p, own, value, at, KIND, RECTIFY)
            if x.dnorm is not None:
                dnorm = tl.load(x.dnorm + stat, mask=mask, other=0.0)
                ds += tl.exp(log_p) * dnorm[:, None]
            dq += tk.dot(tk.uncapped_gradient(ds, raw, x.softcap).to(k.dtype), k)
    at = tk.partial_at(x, n, head, N)
    tk.store_tile(dq_ptr, at, mask, dq, D)
    if KIND == CONTRIBUTION:
        tk.store_tile(dg_ptr, at, mask, dg, DV)


@kernel
def _backward_dkv_columns_kernel(
    x,  # `Columns`
    dk_ptr,  # fp32 [B, Hkv, C, D]
    dv_ptr,  # fp32 [B, Hkv, C, Dv] or None
    N,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """ds^T q / scale, and for CONTRIBUTION dvalue^T g, of one column tile."""
    b, _, c = tk.key_tile(x.C, BLOCK_N)
    kv_head = tl.program_id(1)
    first, last = tk.rows_of_sequence(x.sequence, b, N)
    column = _column_tile(x, b, c)
    k = tk.load_keys(x.k, b, kv_head, column, column >= 0, D)
    dk = tl.zeros((BLOCK_N, padded(D)), tl.float32)
    if KIND == CONTRIBUTION:
        v = tk.load_keys(x.v, b, kv_head, column, column >= 0, DV)
        dv = tl.zeros((BLOCK_N, padded(DV)), tl.float32)
    for i0 in range(first * x.group, last * x.group, BLOCK_M):
        n, head, mask = tk.rows_from(x, i0, last, BLOCK_M)
        stat = n * x.heads + head
        q = tk.load_heads(x.q, n, head, mask, D)
        norm = tl.load(x.norm + stat, mask=mask, other=0.0)
        at = tk.wide(x.C) * n[None, :] + c[:, None]
        own = tl.load(x.own + at, mask=mask[None, :] & (c < x.C)[:, None], other=0) != 0
        u = tl.load(x.u + at, mask=own, other=0.0)
        raw = tk.dot(k, tl.trans(q)) * x.scale  # [BLOCK_N, BLOCK_M]
        log_p, own = _log_p(raw, x.softcap, norm[None, :], own)
        value = log_p
        if KIND == CONTRIBUTION:
            g = tk.load_heads(x.g, n, head, mask, DV)
            value = tk.dot(v, tl.trans(g))
            dv += tk.dot(_value_gradient(log_p, u, value, RECTIFY).to(g.dtype), g)
        ds = u * _z(x, log_p, own, value, at, KIND, RECTIFY)
        if KIND != CONTRIBUTION:
            ds *= tl.load(x.weight + stat, mask=mask, other=0.0)[None, :]
        if x.dnorm is not None:
            ds += tl.exp(log_p) * tl.load(x.dnorm + stat, mask=mask, other=0.0)[None, :]
        dk += tk.dot(tk.uncapped_gradient(ds, raw, x.softcap).to(q.dtype), q)
    at = (tk.wide(b) * tl.num_programs(1) + kv_head) * x.C + c
    tk.store_tile(dk_ptr, at, c < x.C, dk, D)
    if KIND == CONTRIBUTION:
        tk.store_tile(dv_ptr, at, c < x.C, dv, DV)


@kernel
def _backward_dk_kernel(
    x,  # `Attention` without sets and v
    norm_ptr,  # fp32 [N, Hq], or None if p is not normalised over the visible keys
    dnorm_ptr,  # fp32 [N, Hq] or None
    column_dk_ptr,  # fp32 [B, Hkv, C, D]
    column_of_ptr,  # int32 [B, S]: each key's place among the columns, or -1
    dk_ptr,  # [B, Hkv, S, D]
    N,
    keys,
    C,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk of one key tile: its columns' part and, with norm, the normaliser's; zeros elsewhere."""
    b, j0, j = tk.key_tile(keys, BLOCK_N)
    kv_head = tl.program_id(1)
    column = tl.load(column_of_ptr + tk.wide(b) * keys + j, mask=j < keys, other=-1)
    at = (tk.wide(b) * tl.num_programs(1) + kv_head) * C + column
    dk = tk.load_tile(column_dk_ptr, at, D, column >= 0, D)
    if norm_ptr is not None:
        first, last = tk.rows_of_sequence(x.selection.sequence, b, N)
        k = tk.load_keys(x.k, b, kv_head, j, (j < keys) & (last > first), D)
        for i0 in range(first * x.group, last * x.group, BLOCK_M):
            n, head, mask = tk.rows_from(x, i0, last, BLOCK_M)
            start, stop, member = tk.row_bounds(x.selection, n, mask)
            visible = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
            if tk.any_of(visible):
                q = tk.load_heads(x.q, n, head, mask, D)
                norm = tl.load(norm_ptr + n * x.heads + head, mask=mask, other=0.0)
                dnorm = tl.load(dnorm_ptr + n * x.heads + head, mask=mask, other=0.0)
                raw = tk.dot(k, tl.trans(q)) * x.scale  # [BLOCK_N, BLOCK_M]
                p = tk.capped(raw, x.softcap) - norm[None, :]
                p = tl.exp(tl.where(tl.trans(visible), p, -float("inf")))
                ds = tk.uncapped_gradient(p * dnorm[None, :], raw, x.softcap)
                dk += tk.dot(ds.to(q.dtype), q)
    at = (tk.wide(b) * tl.num_programs(1) + kv_head) * keys + j
    tk.store_tile(dk_ptr, at, j < keys, dk * x.scale, D)


@kernel
def _backward_dq_visible_kernel(
    x,  # `Attention` without sets and v
    norm_ptr,  # fp32 [N, Hq]
    dnorm_ptr,  # fp32 [N, Hq]
    part_ptr,  # fp32 [splits, N, Hq, D]
    N,
    keys,
    entries,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The normaliser's part of dq / scale over one split of the keys."""
    n, head, mask, rows, q = tk.load_rows(x, N, D, BLOCK_M)
    norm = tl.load(norm_ptr + n * x.heads + head, mask=mask, other=0.0)
    dnorm = tl.load(dnorm_ptr + n * x.heads + head, mask=mask, other=0.0)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    for e in range(tl.program_id(2), tl.load(x.live.count + tl.program_id(0)), tl.num_programs(2)):
        _, _, k, visible = tk.load_live_tile(x, e, rows, keys, entries, D, BLOCK_N)
        raw = tk.dot(q, tl.trans(k)) * x.scale  # [BLOCK_M, BLOCK_N]
        p = tl.where(visible, tk.capped(raw, x.softcap) - norm[:, None], -float("inf"))
        ds = tk.uncapped_gradient(tl.exp(p) * dnorm[:, None], raw, x.softcap)
        dq += tk.dot(ds.to(k.dtype), k)
    tk.store_tile(part_ptr, tk.partial_at(x, n, head, N), mask, dq, D)
