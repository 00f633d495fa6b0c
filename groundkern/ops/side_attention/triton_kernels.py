"""Triton kernels of side attention (CUDA, ROCm).

Forward: programs (row tile, KV head, key split) leave (m, l, acc); `_reduce_kernel` merges the
splits in order. Backward: `_backward_dkv_kernel` owns a key tile and loops over the rows of its
sequence, `_backward_dq_kernel` owns a row tile and leaves one partial sum per key split. Row tiles
read the key tiles that `tile_kernels.live_tiles` lists, and no others. No atomics, no sync.
"""

import triton.language as tl

from groundkern import tile_kernels as tk
from groundkern.tiles import helper, kernel, padded


@helper
def _sum_split(
    x,  # `Attention`
    q,  # [BLOCK_M, padded D]
    m,  # [BLOCK_M]: where the running maximum starts, or the fixed shift
    rows,  # sequence and (start, stop, set) [BLOCK_M]
    keys,
    entries,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """One split's m, l [BLOCK_M], acc [BLOCK_M, padded Dv], and whether a row has a key in it."""
    l = tl.zeros(m.shape, tl.float32)
    some = tl.zeros(m.shape, tl.int32)
    acc = tl.zeros((m.shape[0], padded(DV)), tl.float32)
    count = tl.load(x.live.count + tl.program_id(0))
    for e in range(tl.program_id(2), count, tl.num_programs(2)):
        b, j, k, allowed = tk.load_live_tile(x, e, rows, keys, entries, D, BLOCK_N)
        v = tk.load_keys(x.v, b, tl.program_id(1), j, j < keys, DV)
        s = tk.capped(tk.dot(q, tl.trans(k)) * x.scale, x.softcap)
        s = tl.where(allowed, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        if RUNNING:
            m_new, shift = tk.online_max(m, s)
            rescale = tl.exp(m - shift)
            l, acc, m = l * rescale, acc * rescale[:, None], m_new
        else:
            some = tl.maximum(some, tl.max(allowed.to(tl.int32), 1))
            shift = m
        p = tl.exp(s - shift[:, None])
        l += tl.sum(p, 1)
        acc += tk.dot(p.to(v.dtype), v)
    return m, l, acc, some


@kernel
def _forward_kernel(
    x,  # `Attention`
    lse_ptr,  # fp32 [N, Hq] or None
    m_ptr,  # fp32 [splits, N, Hq]
    l_ptr,  # fp32 [splits, N, Hq]
    acc_ptr,  # fp32 [splits, N, Hq, Dv]
    N,
    keys,
    entries,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(S1) on one split of the keys."""
    n, head, mask, rows, q = tk.load_rows(x, N, D, BLOCK_M)
    none = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if lse_ptr is not None:
        shift = tl.load(lse_ptr + n * x.heads + head, mask=mask, other=0.0)
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
        m, l, acc, some = _sum_split(x, q, shift, rows, keys, entries, D, DV, BLOCK_N, False)
        # A sum near fp32's limits, or 0, is redone with its own maximum, so that lse never matters.
        lost = (some > 0) & ((l < 2.0**-80) | (l > 2.0**80) | (l != l))
        if tl.max(lost.to(tl.int32), 0) > 0:
            m, l, acc, some = _sum_split(x, q, none, rows, keys, entries, D, DV, BLOCK_N, True)
    else:
        m, l, acc, some = _sum_split(x, q, none, rows, keys, entries, D, DV, BLOCK_N, True)
    at = tk.partial_at(x, n, head, N)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(l_ptr + at, l, mask=mask)
    tk.store_tile(acc_ptr, at, mask, acc, DV)


@kernel
def _reduce_kernel(
    m_ptr,  # fp32 [splits, size]
    l_ptr,  # fp32 [splits, size]
    acc_ptr,  # fp32 [splits, size, Dv]
    out_ptr,  # [size, Dv]
    lse_ptr,  # fp32 [size]
    splits,
    size,  # N Hq
    DV: tl.constexpr,
):
    """Merge the splits of one (row, head): out = sum acc e^m / sum l e^m, and lse."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, padded(DV))
    m, l = -float("inf"), 0.0
    acc = tl.zeros((padded(DV),), tl.float32)
    for split in range(splits):
        at = split * size + i
        l_part = tl.load(l_ptr + at)
        if l_part > 0.0:
            m_part = tl.load(m_ptr + at)
            m_new = tl.maximum(m, m_part)
            old, new = tl.exp(m - m_new), tl.exp(m_part - m_new)
            part = tl.load(acc_ptr + at * DV + d, mask=d < DV, other=0.0)
            acc = acc * old + part * new
            l = l * old + l_part * new
            m = m_new
    some = l > 0.0
    out = acc / tl.where(some, l, 1.0)
    tl.store(out_ptr + i * DV + d, out.to(out_ptr.dtype.element_ty), mask=d < DV)
    tl.store(lse_ptr + i, tk.log_sum(m, l))


@kernel
def _delta_kernel(
    out_ptr,  # [size, Dv]
    dout_ptr,  # [size, Dv]
    dlse_ptr,  # fp32 [size]
    delta_ptr,  # fp32 [size]
    size,  # N Hq
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = out . dout - dlse of each (row, head): ds = p (dp - delta).

    Summed by a dot as dp is, so that the two cancel to the bit if one key takes all.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < size
    out = tk.load_tile(out_ptr, i, DV, mask, DV)
    dout = tk.load_tile(dout_ptr, i, DV, mask, DV)
    m = tl.arange(0, BLOCK_M)
    products = tk.dot(dout, tl.trans(out))  # [BLOCK_M, BLOCK_M], of which the diagonal
    delta = tl.sum(tl.where(m[:, None] == m[None, :], products, 0.0), 1)
    tl.store(delta_ptr + i, delta - tl.load(dlse_ptr + i, mask=mask, other=0.0), mask=mask)


@kernel
def _backward_dkv_kernel(
    x,  # `Attention`
    dout_ptr,  # [N, Hq, Dv]
    lse_ptr,  # fp32 [N, Hq]
    delta_ptr,  # fp32 [N, Hq]
    dk_ptr,  # [B, Hkv, S, D]
    dv_ptr,  # [B, Hkv, S, Dv]
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk, dv of one key tile: a loop over the rows of its sequence; zeros if none uses the tile."""
    b, j0, j = tk.key_tile(keys, BLOCK_N)
    kv_head = tl.program_id(1)
    first, last = tk.rows_of_sequence(x.selection.sequence, b, N)
    used = 0
    for n0 in range(first, last, BLOCK_M):
        n = n0 + tl.arange(0, BLOCK_M)
        start, stop, member = tk.row_bounds(x.selection, n, n < last)
        allowed = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
        used = tl.maximum(used, tk.any_of(allowed).to(tl.int32))
    read = (j < keys) & (used > 0)
    k = tk.load_keys(x.k, b, kv_head, j, read, D)
    v = tk.load_keys(x.v, b, kv_head, j, read, DV)
    dk = tl.zeros((BLOCK_N, padded(D)), tl.float32)
    dv = tl.zeros((BLOCK_N, padded(DV)), tl.float32)
    for i0 in range(first * x.group, tl.where(used > 0, last, first) * x.group, BLOCK_M):
        n, head, mask = tk.rows_from(x, i0, last, BLOCK_M)
        start, stop, member = tk.row_bounds(x.selection, n, mask)
        allowed = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
        if tk.any_of(allowed):
            at = n * x.heads + head
            q = tk.load_heads(x.q, n, head, mask, D)
            dout = tk.load_tile(dout_ptr, at, DV, mask, DV)
            lse = tl.load(lse_ptr + at, mask=mask, other=0.0)
            delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
            raw = tk.dot(k, tl.trans(q)) * x.scale  # [BLOCK_N, BLOCK_M]
            s = tk.capped(raw, x.softcap)
            p = tl.exp(tl.where(tl.trans(allowed), s - lse[None, :], -float("inf")))
            dv += tk.dot(p.to(dout.dtype), dout)
            dp = tk.dot(v, tl.trans(dout))
            ds = tk.uncapped_gradient(p * (dp - delta[None, :]), raw, x.softcap)
            dk += tk.dot(ds.to(q.dtype), q)
    at = (b.to(tl.int64) * tl.num_programs(1) + kv_head) * keys + j
    tk.store_tile(dk_ptr, at, j < keys, dk * x.scale, D)
    tk.store_tile(dv_ptr, at, j < keys, dv, DV)


@kernel
def _backward_dq_kernel(
    x,  # `Attention`
    dout_ptr,  # [N, Hq, Dv]
    lse_ptr,  # fp32 [N, Hq]
    delta_ptr,  # fp32 [N, Hq]
    part_ptr,  # fp32 [splits, N, Hq, D]
    N,
    keys,
    entries,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq / scale of one row tile over one split of the keys."""
    n, head, mask, rows, q = tk.load_rows(x, N, D, BLOCK_M)
    at = n * x.heads + head
    dout = tk.load_tile(dout_ptr, at, DV, mask, DV)
    lse = tl.load(lse_ptr + at, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    count = tl.load(x.live.count + tl.program_id(0))
    for e in range(tl.program_id(2), count, tl.num_programs(2)):
        b, j, k, allowed = tk.load_live_tile(x, e, rows, keys, entries, D, BLOCK_N)
        v = tk.load_keys(x.v, b, tl.program_id(1), j, j < keys, DV)
        raw = tk.dot(q, tl.trans(k)) * x.scale  # [BLOCK_M, BLOCK_N]
        s = tk.capped(raw, x.softcap)
        p = tl.exp(tl.where(allowed, s - lse[:, None], -float("inf")))
        dp = tk.dot(dout, tl.trans(v))
        ds = tk.uncapped_gradient(p * (dp - delta[:, None]), raw, x.softcap)
        dq += tk.dot(ds.to(k.dtype), k)
    tk.store_tile(part_ptr, tk.partial_at(x, n, head, N), mask, dq, D)
