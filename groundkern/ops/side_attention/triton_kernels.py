"""Triton kernels of side attention (CUDA, ROCm).

Forward, one launch: programs (row tile, KV head, key split) each leave (m, l, acc) of their split,
and those that are there when the last has left its own merge them, always in the same order.
Backward, if a sequence has at most 128 lanes: `_backward_kernel` keeps the row tile in place and
goes over K and V once: dk and dv of a key tile are complete when it has been read, and each split
leaves its part of dq. Otherwise `_backward_dq_kernel` owns a row tile and `_backward_dkv_kernel` a
key tile. No sync, and no atomic but the two counters of a merge.
"""

import triton.language as tl

from groundkern import attention_kernels as ak
from groundkern import tile_kernels as tk
from groundkern.tiles import helper, kernel, padded


@helper
def _sweep(
    x,  # `Attention`
    q,  # [BLOCK_M, padded D]
    shift,  # [BLOCK_M]: what scores are shifted by; not used if RUNNING
    b,
    first,
    count,
    bounds,  # (start, stop, set) [BLOCK_M]
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """Over the key tiles of one split: m, l [BLOCK_M] and acc [BLOCK_M, padded Dv].

    m is the running maximum in base 2. Without one it is the sum of p as acc has it, rounded: where
    one key takes all, acc / m is its value to the bit, and p (dp - delta) cancels in the backward.
    """
    start, stop, member = bounds
    m = tl.full(shift.shape, -float("inf"), tl.float32)
    acc = tl.zeros((shift.shape[0], padded(DV)), tl.float32)
    # With few lanes the columns of a product are divided among the warps, and each thread has few
    # of p: without a maximum that changes, these are only added up at the end.
    FEW: tl.constexpr = shift.shape[0] < 64
    # Elsewhere a product with ones makes the second sum, with as few columns as leave them in
    # registers: more would take shared memory. Where products are read from tensor memory it would
    # take barriers, and on AMD as much as the other product; beside 256 columns of acc there are no
    # registers for it.
    BY_DOT: tl.constexpr = FEW or (DV <= 128 and not ak.sums_in_threads())
    SUMS: tl.constexpr = 1 if RUNNING else BLOCK_N if FEW else 1 if BY_DOT else 2
    l = tl.zeros((shift.shape[0], SUMS), tl.float32)
    ones = tl.full((BLOCK_N, 32 if FEW else 8), 1.0, tl.float32).to(x.v.ptr.dtype.element_ty)
    weights = tl.zeros((shift.shape[0], ones.shape[1] if BY_DOT else 2), tl.float32)
    for e in range(tl.program_id(2), count, tl.num_programs(2)):
        j0 = ak.first_key(x, first, e, keys, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, tl.program_id(1), j, j < keys, D)
        v = tk.load_keys(x.v, b, tl.program_id(1), j, j < keys, DV)
        allowed = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
        s = tk.log2_scores(tk.dot(q, tl.trans(k)), x.scale, x.softcap)
        s = tl.where(allowed, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        if RUNNING:
            m_new, shift = tk.online_max(m, s)
            rescale = tl.exp2(m - shift)[:, None]
            l, acc, m = l * rescale, acc * rescale, m_new
        p = tl.exp2(s - shift[:, None])
        if SUMS == 2:
            l += ak.sum_of_halves(p)
        else:
            l += tl.sum(p, 1)[:, None] if SUMS == 1 else p
        rounded = p.to(v.dtype)
        acc += tk.dot(rounded, v)
        if not RUNNING:
            weights += tk.dot(rounded, ones) if BY_DOT else ak.sum_of_halves(rounded)
    if not RUNNING:
        m = tl.max(weights, 1) if BY_DOT else tl.sum(weights, 1)  # of ones the columns are the same
    return m, tl.sum(l, 1), acc


@helper
def _one_row(
    x,  # `Attention`
    row,  # (sequence, first key tile, how many, row, query head)
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr = 16,
):
    """log-sum-exp and out [padded Dv] of one (row, head)."""
    b, first, count, n, head = row
    d, i = tl.arange(0, padded(D)), tl.arange(0, WIDTH)
    q = tl.load(x.q.ptr + tk.wide(n) * x.q.n + tk.wide(head) * x.q.h + d, mask=d < D, other=0.0)
    start, stop = tl.load(x.selection.start + n), tl.load(x.selection.stop + n)
    m, l = -float("inf"), 0.0
    acc = tl.zeros((padded(DV),), tl.float32)
    for e in range(count * (BLOCK_N // WIDTH)):
        j0 = ak.first_key(x, first, e // (BLOCK_N // WIDTH), keys, BLOCK_N)
        j0 += e % (BLOCK_N // WIDTH) * WIDTH
        j = j0 + i
        allowed = (j >= start) & (j < stop) & (j < keys)
        if x.selection.bits is not None:
            member = tl.load(x.selection.set_index + n)
            width = tl.cdiv(keys, 32)
            bits = x.selection.bits + tk.wide(member) * width + j0 // 32
            packed = tl.load(bits, mask=(member >= 0) & (j0 // 32 < width), other=-1)
            allowed = allowed & (((packed >> (i + j0 % 32)) & 1) != 0)
        k = tk.load_keys(x.k, b, tl.program_id(1), j, allowed, D)
        s = tk.log2_scores(tk.dot_vector(k, q[None, :], 1), x.scale, x.softcap)
        s = tl.where(allowed, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        rescale, p = tl.exp2(m - shift), tl.exp2(s - shift)
        v = tk.load_keys(x.v, b, tl.program_id(1), j, allowed, DV)
        l = l * rescale + tl.sum(p, 0)
        acc = acc * rescale + tk.dot_vector(v, p.to(v.dtype)[:, None], 0)
        m = m_new
    return tk.log_sum2(m, l), acc / tl.where(l > 0.0, l, 1.0)


@helper
def _rows_again(
    x,  # `Attention`
    lost,  # bool [BLOCK_M]
    tile,  # (sequence, first key tile, how many)
    n,  # [BLOCK_M]
    head,  # [BLOCK_M]
    out_ptrs,
    lse_ptr,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes and stores the lost rows of a row tile, one after the other."""
    d = tl.arange(0, padded(DV))
    for i in range(lost.shape[0]):
        here = tl.arange(0, lost.shape[0]) == i
        if tl.max((lost & here).to(tl.int32), 0) > 0:
            row, of = tl.sum(tl.where(here, n, 0), 0), tl.sum(tl.where(here, head, 0), 0)
            place = (tile[0], tile[1], tile[2], row, of)
            lse, out = _one_row(x, place, keys, D, DV, BLOCK_N)
            at = tk.wide(row) * x.heads + of
            ak.store_rounded(out_ptrs, at * DV + d, out, d < DV)
            tl.store(lse_ptr + at, lse)


@helper
def _shift(shift_ptr, at, mask):
    """The given log-sum-exp in base 2; 0 where it is not finite."""
    shift = tl.load(shift_ptr + at, mask=mask, other=0.0)
    return tl.where(tl.abs(shift) < float("inf"), shift, 0.0) * tk._LOG2_E


@helper
def _finish(
    x,  # `Attention`
    sums,  # of all keys: m, l [LANES] and acc [LANES, padded Dv], as in `_sweep`
    to,  # (out and rest, lse, shift or None) pointers
    tile,  # (sequence, first key tile, how many)
    n,  # [LANES]
    head,  # [LANES]
    mask,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores out and lse of some lanes, and computes them again where l is near the limits of fp32
    or 0, so that the shift never changes the result."""
    m, l, acc = sums
    out_ptrs, lse_ptr, shift_ptr = to
    RUNNING: tl.constexpr = shift_ptr is None
    at, d = n.to(tl.int64) * x.heads + head, tl.arange(0, padded(DV))
    total = l if RUNNING else m
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    stored = mask[:, None] & (d < DV)[None, :]
    ak.store_rounded(out_ptrs, at[:, None] * DV + d[None, :], out, stored)
    shift = m if RUNNING else _shift(shift_ptr, at, mask)
    tl.store(lse_ptr + at, tk.log_sum2(shift, l), mask=mask)
    if not RUNNING:
        start, stop, _ = tk.row_bounds(x.selection, n, mask)
        lost = mask & (start < stop) & ((l > 2.0**-80) & (l < 2.0**80) == 0)
        if tl.max(lost.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # before rows are stored again
            _rows_again(x, lost, tile, n, head, out_ptrs, lse_ptr, keys, D, DV, BLOCK_N)


@helper
def _merge(
    x,  # `Attention`
    parts,
    to,
    tile,
    span,  # first lane and last + 1
    size,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
):
    """Merges what all splits have left of some lanes of a row tile."""
    for i in range(span[0], span[1], LANES):
        n, head, mask = ak.lanes_of(x, i + tl.arange(0, LANES), span[1], tl.program_id(1))
        at = n.to(tl.int64) * x.heads + head
        sums = ak.merged(parts, at, size, mask, DV, to[2] is None)
        _finish(x, sums, to, tile, n, head, mask, keys, D, DV, BLOCK_N)


@kernel
def _forward_kernel(
    x,  # `Attention`
    shift_ptr,  # fp32 [N, Hq], the main pass's log-sum-exp, or None
    parts,  # fp32 (m, l [splits, N, Hq] as in `_sweep`, acc [splits, N, Hq, Dv])
    out_ptrs,  # out and rest [N, Hq, Dv]; rest None: out is not rounded
    lse_ptr,  # fp32 [N, Hq]
    counters_ptr,  # int32, zeros
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(S1). With a shift there is no running maximum."""
    RUNNING: tl.constexpr = shift_ptr is None
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    q = tk.load_heads(x.q, n, head, mask, D)
    bounds = tk.row_bounds(x.selection, n, mask)
    shift = tl.zeros((BLOCK_M,), tl.float32)
    if not RUNNING:
        shift = _shift(shift_ptr, n.to(tl.int64) * x.heads + head, mask)
    m, l, acc = _sweep(x, q, shift, b, first, count, bounds, keys, D, DV, BLOCK_N, RUNNING)
    n, head, mask = ak.row_tile_again(x, BLOCK_M)
    to, tile = (out_ptrs, lse_ptr, shift_ptr), (b, first, count)
    if tl.num_programs(2) == 1:
        _finish(x, (m, l, acc), to, tile, n, head, mask, keys, D, DV, BLOCK_N)
    else:
        size = tk.wide(N) * x.heads
        at = tl.program_id(2) * size + n.to(tl.int64) * x.heads + head
        tk.store_tile(parts[2], at, mask, acc, DV)
        ak.store_both(parts, at, m, l, mask)
        counters_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2
        lane, end, step, pieces = ak.pieces(x)
        piece, last = ak.arrive(counters_ptr, pieces)
        stop = piece + 1
        LANES: tl.constexpr = 8 if BLOCK_M >= 64 and DV <= 128 else 4  # at a time
        for turn in range(1 + last):
            if turn == 1:  # the last to arrive takes what is left
                piece, stop = ak.taken(counters_ptr, 1, 1), pieces
            span = lane + piece * step, tl.minimum(lane + stop * step, end)
            _merge(x, parts, to, tile, span, size, keys, D, DV, BLOCK_N, LANES)


@helper
def _delta(outputs, at, mask, dout, DV: tl.constexpr):
    """delta [BLOCK_M] = out . dout - dlse of each lane: ds = p (dp - delta).

    Summed by a dot as dp is, so that the two cancel to the bit if one key takes all.
    """
    out_ptr, rest_ptr, dlse_ptr = outputs
    out = tk.load_tile(out_ptr, at, DV, mask, DV)
    i = tl.arange(0, at.shape[0])
    products = tk.dot(dout, tl.trans(out))  # [BLOCK_M, BLOCK_M], of which the diagonal
    if rest_ptr is not None:
        products += tk.dot(dout, tl.trans(tk.load_tile(rest_ptr, at, DV, mask, DV)))
    delta = tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), 1)
    return delta - tl.load(dlse_ptr + at, mask=mask, other=0.0)


@helper
def _gradient(x, q, k, v, dout, lse, delta, allowed):
    """p in fp32, and the gradient at the scores in q's dtype: [BLOCK_M, BLOCK_N].

    Rows first: what each thread holds of lse and delta are two numbers then, and a quarter of them
    the other way round.
    """
    raw = tk.dot(q, tl.trans(k))
    s = tk.log2_scores(raw, x.scale, x.softcap)
    p = tl.exp2(tl.where(allowed, s - lse[:, None], -float("inf")))
    dp = tk.dot(dout, tl.trans(v))
    ds = tk.uncapped_gradient(p * (dp - delta[:, None]), raw * x.scale, x.softcap)
    return p, ds.to(q.dtype)


@helper
def _over_rows(p, x):
    """p^T x [BLOCK_N, DIM]. With many rows the keys, and not DIM, are the columns of the product:
    then it takes half the registers."""
    if p.shape[0] < 64:
        return tk.dot(tl.trans(p), x)
    return tl.trans(tk.dot(tl.trans(x), p))


@kernel
def _backward_kernel(
    x,  # `Attention`
    dout_ptr,  # [N, Hq, Dv]
    lse_ptr,  # fp32 [N, Hq]
    outputs,  # (out and rest [N, Hq, Dv], fp32 dlse [N, Hq])
    dk_ptr,  # [B, Hkv, S, D]
    dv_ptr,  # [B, Hkv, S, Dv]
    dq_ptr,  # fp32 [splits, N, Hq, D]
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,  # keys of a key tile of the plan, a multiple of BLOCK_N
):
    """dk, dv and dq / scale of one split of a sequence whose rows are one tile."""
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    to = (tk.wide(b) * tl.num_programs(1) + kv_head) * keys
    PARTS: tl.constexpr = TILE_N // BLOCK_N
    # Zeros first: what they need would otherwise be kept through the loop below.
    zero_k = tl.zeros((BLOCK_N, padded(D)), tl.float32)
    zero_v = tl.zeros((BLOCK_N, padded(DV)), tl.float32)
    for e in range(count * PARTS + split, tl.cdiv(keys, TILE_N) * PARTS, tl.num_programs(2)):
        j0 = ak.unread_key(x, first, count, e // PARTS, keys, TILE_N) + e % PARTS * BLOCK_N
        tk.store_rows(dk_ptr, to + j0, keys - j0, zero_k, D)
        tk.store_rows(dv_ptr, to + j0, keys - j0, zero_v, DV)
    at = n.to(tl.int64) * x.heads + head
    q = tk.load_heads(x.q, n, head, mask, D)
    dout = tk.load_tile(dout_ptr, at, DV, mask, DV)
    delta = _delta(outputs, at, mask, dout, DV)
    lse = tl.load(lse_ptr + at, mask=mask, other=0.0) * tk._LOG2_E
    start, stop, member = tk.row_bounds(x.selection, n, mask)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    # AMD copies keys ahead through registers, for which there is no room beside wide heads. (With a
    # softcap there is: what is copied then spills without.)
    IN_PLACE: tl.constexpr = D > 128 and x.softcap is None and tl.target_info.is_hip()
    AHEAD: tl.constexpr = 1 if IN_PLACE else None
    # Beside 128 lanes or wide heads there are no registers for what would be moved out of the loop.
    FULL: tl.constexpr = BLOCK_M == 128 or D > 128
    stop_tile, step = count * PARTS, tl.num_programs(2)
    for e in tl.range(split, stop_tile, step, num_stages=AHEAD, disable_licm=FULL):
        j0 = ak.first_key(x, first, e // PARTS, keys, TILE_N) + e % PARTS * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, kv_head, j, j < keys, D)
        v = tk.load_keys(x.v, b, kv_head, j, j < keys, DV)
        allowed = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
        p, ds = _gradient(x, q, k, v, dout, lse, delta, allowed)
        tk.store_rows(dv_ptr, to + j0, keys - j0, _over_rows(p.to(dout.dtype), dout), DV)
        tk.store_rows(dk_ptr, to + j0, keys - j0, _over_rows(ds, q) * x.scale, D)
        dq += tk.dot(ds, k)
    n, head, mask = ak.row_tile_again(x, BLOCK_M)
    at = (split * tk.wide(N) + n) * x.heads + head
    tk.store_tile(dq_ptr, at, mask, dq, D)


@kernel
def _backward_dq_kernel(
    x,  # `Attention`
    dout_ptr,  # [N, Hq, Dv]
    lse_ptr,  # fp32 [N, Hq]
    outputs,  # (out and rest [N, Hq, Dv], fp32 dlse [N, Hq])
    delta_ptr,  # fp32 [N, Hq]
    dq_ptr,  # fp32 [splits, N, Hq, D]
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_N: tl.constexpr,  # keys of a key tile of the plan, a multiple of BLOCK_N
):
    """dq / scale of one row tile over one split of its keys, and delta for the dkv kernel."""
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    split = tl.program_id(2)
    at = n.to(tl.int64) * x.heads + head
    q = tk.load_heads(x.q, n, head, mask, D)
    dout = tk.load_tile(dout_ptr, at, DV, mask, DV)
    delta = _delta(outputs, at, mask, dout, DV)
    tl.store(delta_ptr + at, delta, mask=mask & (split == 0))
    lse = tl.load(lse_ptr + at, mask=mask, other=0.0) * tk._LOG2_E
    start, stop, member = tk.row_bounds(x.selection, n, mask)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    PARTS: tl.constexpr = TILE_N // BLOCK_N
    for e in range(split, count * PARTS, tl.num_programs(2)):
        j0 = ak.first_key(x, first, e // PARTS, keys, TILE_N) + e % PARTS * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, tl.program_id(1), j, j < keys, D)
        v = tk.load_keys(x.v, b, tl.program_id(1), j, j < keys, DV)
        allowed = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
        _, ds = _gradient(x, q, k, v, dout, lse, delta, allowed)
        dq += tk.dot(ds, k)
    n, head, mask = ak.row_tile_again(x, BLOCK_M)
    at = (split * tk.wide(N) + n) * x.heads + head
    ak.store_quarters(dq_ptr, at, mask, dq, D)


@kernel
def _backward_dkv_kernel(
    x,  # `Attention`
    row_tiles_ptr,  # of the `Plan`, or None
    row_spans_ptr,  # of the `Plan`
    dout_ptr,  # [N, Hq, Dv]
    lse_ptr,  # fp32 [N, Hq]
    delta_ptr,  # fp32 [N, Hq]
    dk_ptr,  # [B, Hkv, S, D]
    dv_ptr,  # [B, Hkv, S, Dv]
    keys,
    parts,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_M: tl.constexpr,  # lanes of a row tile, a multiple of BLOCK_M
):
    """dk, dv of one wide key tile, over the row tiles that read it: zeros if there are none."""
    b, j0, j = tk.key_tile(keys, BLOCK_N)
    kv_head = tl.program_id(1)
    span_ptr = row_spans_ptr + tl.program_id(0) * 3
    count, span = tl.load(span_ptr), (tl.load(span_ptr + 1), tl.load(span_ptr + 2))
    read = (j < keys) & (count > 0)
    k = tk.load_keys(x.k, b, kv_head, j, read, D)
    v = tk.load_keys(x.v, b, kv_head, j, read, DV)
    dk = tl.zeros((BLOCK_N, padded(D)), tl.float32)
    dv = tl.zeros((BLOCK_N, padded(DV)), tl.float32)
    for e in range(count * (TILE_M // BLOCK_M)):
        n, head, mask = ak.row_tile_of(x, row_tiles_ptr, span, e, parts, BLOCK_M, TILE_M)
        at = n.to(tl.int64) * x.heads + head
        q = tk.load_heads(x.q, n, head, mask, D)
        dout = tk.load_tile(dout_ptr, at, DV, mask, DV)
        start, stop, member = tk.row_bounds(x.selection, n, mask)
        allowed = tk.allowed_rows(x.selection, start, stop, member, j0, keys, BLOCK_N)
        raw = tk.dot(k, tl.trans(q))  # [BLOCK_N, BLOCK_M]
        s = tk.log2_scores(raw, x.scale, x.softcap)
        # Loaded only here: through the product above there are no registers for it.
        lse = tl.load(lse_ptr + at, mask=mask, other=0.0) * tk._LOG2_E
        p = tl.exp2(tl.where(allowed, s - lse[None, :], -float("inf")))
        dv += tk.dot(p.to(dout.dtype), dout)
        dp = tk.dot(v, tl.trans(dout))
        delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
        ds = tk.uncapped_gradient(p * (dp - delta[None, :]), raw * x.scale, x.softcap)
        dk += tk.dot(ds.to(q.dtype), q)
    at = (tk.wide(b) * tl.num_programs(1) + kv_head) * keys + j0
    tk.store_rows(dk_ptr, at, keys - j0, dk * x.scale, D)
    tk.store_rows(dv_ptr, at, keys - j0, dv, DV)
