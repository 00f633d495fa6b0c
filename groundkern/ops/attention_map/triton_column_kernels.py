"""Triton kernels on the key columns of attention maps.

Scores are made again wherever they are needed, so that nothing of size [N, Hq, C] is ever stored.
With own columns c of row n, and u [N, C] what arrives from above, every gradient here is

    ds_hc = w_h z_hc u_c  [- p_hc sum_c' w_h z_hc' u_c'  where p is normalised over the columns]
    MAP    z = p                       u = dmap                        (K2)
    MEAN   z = p / M                   u = -dkl P                      (K3), heads="mean"
    EACH   z = 1                       u = -dkl P                      (K3), heads="each"
    VALUE  z = p f(v . g), w = 1       u = dmap                        (C1)

`level` [N, C] is log M for MEAN and log P for EACH.
"""

import triton.language as tl

from groundkern.tiles import (
    capped,
    dot,
    helper,
    kernel,
    load_heads,
    load_tile,
    rows_of_sequence,
    store_tile,
    uncapped_gradient,
    wide,
)

MAP, MEAN, EACH, VALUE = (tl.constexpr(i) for i in range(4))


@helper
def _columns(columns_ptr, b, c, C):
    """Key columns of a tile, -1 outside: [BLOCK_N]."""
    return tl.load(columns_ptr + wide(b) * C + c, mask=c < C, other=-1)


@helper
def _keys(
    ptr, column, b, kv_head, stride_b, stride_h, stride_s, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """The columns' rows of k or v: [BLOCK_N, BLOCK]."""
    ptr += wide(b) * stride_b + wide(kv_head) * stride_h
    return load_tile(ptr, column, stride_s, column >= 0, DIM, BLOCK)


@helper
def _log_p(raw, softcap, norm, own):
    """(K1) log p on own columns, -inf elsewhere."""
    return tl.where(own, capped(raw, softcap) - norm, -float("inf"))


@helper
def _z(log_p, own, level_ptr, value, at, KIND: tl.constexpr, RECTIFY: tl.constexpr):
    """z of the table above on own columns, 0 elsewhere."""
    if KIND == EACH:
        z = tl.full(log_p.shape, 1.0, tl.float32)
    elif KIND == MEAN:
        level = tl.load(level_ptr + at, mask=own, other=0.0)
        z = tl.exp(tl.minimum(log_p - level, 80.0))  # a head of weight 0 may lie far above
    else:
        z = tl.exp(log_p)
        if KIND == VALUE:
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
def column_statistics_kernel(
    q_ptr, k_ptr, sequence_ptr, columns_ptr, own_ptr, lse_ptr, scale, softcap, N, heads, group, C,
    q_n, q_h, k_b, k_h, k_s, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the own columns of one split: [splits, N, Hq]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    first_b = tl.min(tl.where(kept, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        for c0 in range(split * BLOCK_N, C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            k = _keys(k_ptr, _columns(columns_ptr, b, c, C), b, kv_head, k_b, k_h, k_s, D, BLOCK_D)
            here = (sequence == b)[:, None] & (c < C)[None, :]
            own = tl.load(own_ptr + wide(C) * n[:, None] + c[None, :], mask=here, other=0) != 0
            s = tl.where(own, capped(dot(q, tl.trans(k)) * scale, softcap), -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            l = l * tl.exp(m - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
            m = m_new
    lse = tl.where(l > 0.0, m + tl.log(tl.where(l > 0.0, l, 1.0)), -float("inf"))
    tl.store(lse_ptr + (wide(split) * N + n) * heads + head, lse, mask=kept)


@kernel
def map_kernel(
    q_ptr, k_ptr, g_ptr, v_ptr, norm_ptr, weight_ptr, sequence_ptr, columns_ptr, own_ptr, map_ptr,
    scale, softcap, N, heads, group, kv_heads, C, q_n, q_h, k_b, k_h, k_s, g_n, g_h, v_b, v_h, v_s,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LANES: tl.constexpr, KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):  # fmt: skip
    """(K2), (C1) or log M of (K3) on BLOCK_M / LANES rows and one column tile: all heads, LANES of
    a group at a time."""
    ROWS: tl.constexpr = BLOCK_M // LANES
    i, row = tl.arange(0, BLOCK_M), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n, lane = tl.program_id(0) * ROWS + i // LANES, i % LANES
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence = tl.load(sequence_ptr + n, mask=n < N, other=-1)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    top = tl.full((ROWS, BLOCK_N), -float("inf"), tl.float32)
    parts = tl.cdiv(group, LANES)
    first_b = tl.min(tl.where(n < N, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        column = _columns(columns_ptr, b, c, C)
        here = (sequence == b)[:, None] & (c < C)[None, :]
        own = tl.load(own_ptr + wide(C) * n[:, None] + c[None, :], mask=here, other=0) != 0
        for part in range(kv_heads * parts):
            kv_head, member = part // parts, (part % parts) * LANES + lane
            head, kept = kv_head * group + member, (sequence == b) & (member < group)
            q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
            k = _keys(k_ptr, column, b, kv_head, k_b, k_h, k_s, D, BLOCK_D)
            norm = tl.load(norm_ptr + n * heads + head, mask=kept, other=0.0)
            raw = dot(q, tl.trans(k)) * scale
            log_p = _log_p(raw, softcap, norm[:, None], own & kept[:, None])
            if KIND == VALUE:
                g = load_heads(g_ptr, n, head, g_n, g_h, kept, DV, BLOCK_DV)
                v = _keys(v_ptr, column, b, kv_head, v_b, v_h, v_s, DV, BLOCK_DV)
                value = dot(g, tl.trans(v))
                x = tl.exp(log_p) * (tl.maximum(value, 0.0) if RECTIFY else value)
                total += tl.sum(tl.reshape(x, (ROWS, LANES, BLOCK_N)), 1)
            else:
                w = tl.load(weight_ptr + n * heads + head, mask=kept, other=0.0)
                if KIND == MAP:
                    x = tl.exp(log_p) * w[:, None]
                    total += tl.sum(tl.reshape(x, (ROWS, LANES, BLOCK_N)), 1)
                else:
                    log_w = tl.where(w > 0.0, tl.log(tl.where(w > 0.0, w, 1.0)), -float("inf"))
                    x = tl.reshape(log_p + log_w[:, None], (ROWS, LANES, BLOCK_N))
                    new = tl.maximum(top, tl.max(x, 1))
                    shift = tl.where(new == -float("inf"), 0.0, new)
                    part_sum = tl.sum(tl.exp(x - shift[:, None, :]), 1)
                    total = total * tl.exp(top - shift) + part_sum
                    top = new
    if KIND == MEAN:
        some = total > 0.0
        total = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), -float("inf"))
    stored = (row < N)[:, None] & (c < C)[None, :]
    tl.store(map_ptr + wide(C) * row[:, None] + c[None, :], total, mask=stored)


@kernel
def sums_kernel(
    q_ptr, k_ptr, g_ptr, v_ptr, norm_ptr, sequence_ptr, columns_ptr, own_ptr, level_ptr, u_ptr,
    part_ptr, scale, softcap, N, heads, group, C, q_n, q_h, k_b, k_h, k_s, g_n, g_h, v_b, v_h, v_s,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr, RECTIFY: tl.constexpr,
):  # fmt: skip
    """sum_c u_c z_hc over the own columns of one split, for EACH sum_c u_c (log P_c - log p_hc):
    [splits, N, Hq]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    norm = tl.load(norm_ptr + n * heads + head, mask=kept, other=0.0)
    if KIND == VALUE:
        g = load_heads(g_ptr, n, head, g_n, g_h, kept, DV, BLOCK_DV)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first_b = tl.min(tl.where(kept, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        for c0 in range(split * BLOCK_N, C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            column = _columns(columns_ptr, b, c, C)
            k = _keys(k_ptr, column, b, kv_head, k_b, k_h, k_s, D, BLOCK_D)
            at, here = wide(C) * n[:, None] + c[None, :], (sequence == b)[:, None] & (c < C)[None]
            own = tl.load(own_ptr + at, mask=here, other=0) != 0
            log_p = _log_p(dot(q, tl.trans(k)) * scale, softcap, norm[:, None], own)
            value = log_p
            if KIND == VALUE:
                v = _keys(v_ptr, column, b, kv_head, v_b, v_h, v_s, DV, BLOCK_DV)
                value = dot(g, tl.trans(v))
            u = tl.load(u_ptr + at, mask=own, other=0.0)
            if KIND == EACH:
                level = tl.load(level_ptr + at, mask=own, other=0.0)
                z = tl.where(own, level - log_p, 0.0)
            else:
                z = _z(log_p, own, level_ptr, value, at, KIND, RECTIFY)
            total += tl.sum(u * z, 1)
    tl.store(part_ptr + (wide(split) * N + n) * heads + head, total, mask=kept)


@kernel
def columns_dq_kernel(
    q_ptr, k_ptr, g_ptr, v_ptr, norm_ptr, dnorm_ptr, weight_ptr, sequence_ptr, columns_ptr, own_ptr,
    level_ptr, u_ptr, dq_ptr, dg_ptr, scale, softcap, N, heads, group, C, q_n, q_h, k_b, k_h, k_s,
    g_n, g_h, v_b, v_h, v_s, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):  # fmt: skip
    """ds k / scale, and for VALUE dvalue v, over one split of the columns: [splits, N, Hq, D].

    dnorm: minus the row's sum of w z u where p is normalised over the columns, else absent.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept, stat = n < N, n * heads + head
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    norm = tl.load(norm_ptr + stat, mask=kept, other=0.0)
    w = tl.full((BLOCK_M,), 1.0, tl.float32)
    if KIND != VALUE:
        w = tl.load(weight_ptr + stat, mask=kept, other=0.0)
    else:
        g = load_heads(g_ptr, n, head, g_n, g_h, kept, DV, BLOCK_DV)
        dg = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first_b = tl.min(tl.where(kept, sequence, 2147483647), 0)
    for b in range(first_b, tl.max(sequence, 0) + 1):
        for c0 in range(split * BLOCK_N, C, tl.num_programs(2) * BLOCK_N):
            c = c0 + tl.arange(0, BLOCK_N)
            column = _columns(columns_ptr, b, c, C)
            k = _keys(k_ptr, column, b, kv_head, k_b, k_h, k_s, D, BLOCK_D)
            at, here = wide(C) * n[:, None] + c[None, :], (sequence == b)[:, None] & (c < C)[None]
            own = tl.load(own_ptr + at, mask=here, other=0) != 0
            u = tl.load(u_ptr + at, mask=own, other=0.0)
            raw = dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N]
            log_p = _log_p(raw, softcap, norm[:, None], own)
            value = log_p
            if KIND == VALUE:
                v = _keys(v_ptr, column, b, kv_head, v_b, v_h, v_s, DV, BLOCK_DV)
                value = dot(g, tl.trans(v))
                dg += dot(_value_gradient(log_p, u, value, RECTIFY).to(v.dtype), v)
            ds = w[:, None] * u * _z(log_p, own, level_ptr, value, at, KIND, RECTIFY)
            if dnorm_ptr is not None:
                dnorm = tl.load(dnorm_ptr + stat, mask=kept, other=0.0)
                ds += tl.exp(log_p) * dnorm[:, None]
            dq += dot(uncapped_gradient(ds, raw, softcap).to(k.dtype), k)
    at = (wide(split) * N + n) * heads + head
    store_tile(dq_ptr, at, D, kept, dq, D, BLOCK_D)
    if KIND == VALUE:
        store_tile(dg_ptr, at, DV, kept, dg, DV, BLOCK_DV)


@kernel
def columns_dk_kernel(
    q_ptr, k_ptr, g_ptr, v_ptr, norm_ptr, dnorm_ptr, weight_ptr, sequence_ptr, columns_ptr, own_ptr,
    level_ptr, u_ptr, dk_ptr, dv_ptr, scale, softcap, N, heads, group, C, q_n, q_h, k_b, k_h, k_s,
    g_n, g_h, v_b, v_h, v_s, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):  # fmt: skip
    """ds^T q / scale, and for VALUE dvalue^T g, of one column tile: fp32 [B, Hkv, C, D]."""
    column_tiles = tl.cdiv(C, BLOCK_N)
    b, kv_head = tl.program_id(0) // column_tiles, tl.program_id(1)
    c = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = rows_of_sequence(sequence_ptr, b, N)
    column = _columns(columns_ptr, b, c, C)
    k = _keys(k_ptr, column, b, kv_head, k_b, k_h, k_s, D, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if KIND == VALUE:
        v = _keys(v_ptr, column, b, kv_head, v_b, v_h, v_s, DV, BLOCK_DV)
        dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for i0 in range(first * group, last * group, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        n, head = i // group, kv_head * group + i % group
        kept, stat = n < last, n * heads + head
        q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
        norm = tl.load(norm_ptr + stat, mask=kept, other=0.0)
        at = wide(C) * n[None, :] + c[:, None]
        own = tl.load(own_ptr + at, mask=kept[None, :] & (c < C)[:, None], other=0) != 0
        u = tl.load(u_ptr + at, mask=own, other=0.0)
        raw = dot(k, tl.trans(q)) * scale  # [BLOCK_N, BLOCK_M]
        log_p = _log_p(raw, softcap, norm[None, :], own)
        value = log_p
        if KIND == VALUE:
            g = load_heads(g_ptr, n, head, g_n, g_h, kept, DV, BLOCK_DV)
            value = dot(v, tl.trans(g))
            dv += dot(_value_gradient(log_p, u, value, RECTIFY).to(g.dtype), g)
        ds = u * _z(log_p, own, level_ptr, value, at, KIND, RECTIFY)
        if KIND != VALUE:
            ds *= tl.load(weight_ptr + stat, mask=kept, other=0.0)[None, :]
        if dnorm_ptr is not None:
            ds += tl.exp(log_p) * tl.load(dnorm_ptr + stat, mask=kept, other=0.0)[None, :]
        dk += dot(uncapped_gradient(ds, raw, softcap).to(q.dtype), q)
    at = (wide(b) * tl.num_programs(1) + kv_head) * C + c
    store_tile(dk_ptr, at, D, c < C, dk, D, BLOCK_D)
    if KIND == VALUE:
        store_tile(dv_ptr, at, DV, c < C, dv, DV, BLOCK_DV)
