"""Triton kernels of attention maps, contributions and their KL (CUDA, ROCm).

Every kernel works on tiles of keys as they lie in memory; a table says which column a key is.
Scores are recomputed wherever they are needed: between kernels there are only [N, C] (maps and
targets) and [N, Hq] (normalisers, head weights and their gradients). With own columns c of row n
and u [N, C] the gradient that arrives from above, the gradient at a score is

    ds_hj = w_h z_hj u_j + p_hj dnorm_h          dnorm_h = - w_h sum_c z_hc u_c
    MAP           z = p                  u = dmap                          (K2)
    CONTRIBUTION  z = p f(v . g), w = 1  u = dmap                          (C1)
    KL_MEAN       z = p / M              u = -dkl P                        (K3)
    KL_EACH       z = 1                  u = -dkl P                        (K3)

with z = 0 off the own columns, and p on all keys that the normaliser sums over; it is formed in
fp32 before it is rounded, because at the optimum it cancels. Of fp32 operands dnorm is divided by
the sum of p, so that ds sums to 0. A given normaliser with a gradient takes dnorm, and no key does.

What splits leave is merged by the last of their programs to arrive, in a fixed order. No atomic but
the counter of arrivals.
"""

import triton.language as tl

from groundkern import attention_kernels as ak
from groundkern import map_kernels as mk
from groundkern import tile_kernels as tk
from groundkern.ops import attention_map
from groundkern.tiles import helper, kernel, padded

MAP = tl.constexpr(attention_map.MAP)
CONTRIBUTION = tl.constexpr(attention_map.CONTRIBUTION)
KL_MEAN = tl.constexpr(attention_map.KL_MEAN)
KL_EACH = tl.constexpr(attention_map.KL_EACH)
NOT_OWN = tl.constexpr(0x7FA5C3E1)  # the bits of a NaN


@helper
def _above(x, place, row, bounds, j0, keys, BLOCK_N: tl.constexpr, LANES: tl.constexpr, KIND):
    """What the gradient needs of each own column, one number: u, P of KL_EACH, log P - log M of
    KL_MEAN; and which columns are own. [ROWS * LANES, BLOCK_N]: loaded once for a row's heads.

    The masks must not depend on the scores: Triton cannot pipeline a dot before a load. A column
    that is not own travels as the bits of a NaN that no arithmetic makes.
    """
    ROWS: tl.constexpr = row.shape[0]
    own = mk.own_columns(x, place, bounds, j0, keys, BLOCK_N)
    numbers = x.made if KIND == KL_MEAN else x.target if KIND == KL_EACH else x.upstream
    bits = tl.where(own, mk.gathered(numbers, x.C, row, place, own), NOT_OWN)
    bits = tl.broadcast_to(bits[:, None, :], (ROWS, LANES, BLOCK_N))
    bits = tl.reshape(bits, (ROWS * LANES, BLOCK_N))
    return bits.to(tl.float32, bitcast=True), bits != NOT_OWN


@helper
def _uz(x, above, log_p, value, factor, KIND: tl.constexpr, RECTIFY: tl.constexpr):
    """u z by a factor, which has dkl of a KL; on own columns with p > 0. NaN stays NaN."""
    if KIND == KL_EACH:
        uz = -factor * above
    elif KIND == KL_MEAN:  # a head of weight 0 may lie far above
        z = log_p + above
        uz = -factor * mk.exp(x, tl.where(z > 80.0, 80.0, z))
    elif KIND == MAP:
        uz = factor * mk.exp(x, log_p) * above
    else:
        uz = mk.exp(x, log_p) * above * (mk.rectified(value) if RECTIFY else value)
    return uz


@kernel
def _norm_kernel(
    x,  # `Maps`
    part_ptr,  # fp32 [splits, N, Hq]
    norm_ptr,  # fp32 [N, Hq]
    counters_ptr,  # int32, zeros
    N,
    keys,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VISIBLE: tl.constexpr,
):
    """Log-sum-exp over the own columns or all visible keys; 0 if there are none. Of log p where
    `x` has a normaliser: near 0, so that fp32 holds what that one was rounded by."""
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    kv_head, split, splits = ak.kv_head_of(x), tl.program_id(2), tl.num_programs(2)
    q = tk.load_heads(x.q, n, head, mask, D)
    start, stop, member = tk.row_bounds(x.selection, n, mask)
    m, l = mk.no_sum(BLOCK_M)
    after = mk.listed_key(x, first, count, split, keys, BLOCK_N)
    place = tl.zeros((BLOCK_N,), tl.int32) if VISIBLE else mk.place_of(x, b, after, keys, BLOCK_N)
    for e in range(split, count, splits):
        j0, place_here = after, place
        after = mk.listed_key(x, first, count, e + splits, keys, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, kv_head, j, j < keys, D)
        if VISIBLE:
            seen = tk.visible(start, stop, j0, BLOCK_N)
        else:
            seen = mk.own_columns(x, place_here, (start, stop, member), j0, keys, BLOCK_N)
            place = mk.place_of(x, b, after, keys, BLOCK_N)
        s = tk.capped(tk.dot(q, tl.trans(k)) * x.scale, x.softcap)
        s = mk.less_norm(x, s, n, head, mask)
        m, l = tk.online_sum(m, l, tl.where(seen, s, -mk.INFINITE))
    at = n.to(tl.int64) * x.heads + head
    complete, counter = splits == 1, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if splits > 1:
        size = tk.wide(N) * x.heads
        tl.store(part_ptr + at + split * size, tk.log_sum(m, l), mask=mask)
        if ak.last_to_arrive(counters_ptr + counter, splits):
            m, l = mk.no_sum(BLOCK_M)
            for part in range(splits):
                s = ak.load_part(part_ptr, at + tk.wide(part) * size, mask)
                m, l = tk.online_sum(m, l, s[:, None])
            complete = True
    if complete:
        norm = tk.log_sum(m, l)
        tl.store(norm_ptr + at, tl.where(norm == -mk.INFINITE, 0.0, norm), mask=mask)


@helper
def _add_head(
    x,
    total,  # [ROWS, BLOCK_N]
    top,  # [ROWS, BLOCK_N], of KL_MEAN
    raw,  # [BLOCK_M, BLOCK_N]
    value,  # [BLOCK_M, BLOCK_N], of CONTRIBUTION
    at,
    mask,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """The map and, for KL_MEAN, its largest exponent, after one virtual head; and whether some of
    its heads take part [ROWS]."""
    ROWS: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    norm = mk.norm_of(x, at, mask)
    log_p = mk.log_p(raw, x.softcap, norm[:, None], mask[:, None])
    if KIND == CONTRIBUTION:
        y = mk.exp(x, log_p) * (mk.rectified(value) if RECTIFY else value)
        y = tl.where(log_p != -mk.INFINITE, y, 0.0)
        total += tl.sum(tl.reshape(y, (ROWS, LANES, BLOCK_N)), 1)
    else:
        w = tl.load(x.weight + at, mask=mask, other=0.0)
        if KIND == MAP:
            y = mk.exp(x, log_p) * w[:, None]
            total += tl.sum(tl.reshape(y, (ROWS, LANES, BLOCK_N)), 1)
        else:
            log_w = tl.where(w > 0.0, tl.log(tl.where(w > 0.0, w, 1.0)), -mk.INFINITE)
            y = tl.reshape(log_p + log_w[:, None], (ROWS, LANES, BLOCK_N))
            new, shift = tk.online_max(top, y)
            total = total * mk.exp(x, top - shift) + tl.sum(mk.exp(x, y - shift[:, None, :]), 1)
            top = new
    some = tl.max(tl.reshape((mask & (norm != mk.INFINITE)).to(tl.int32), (ROWS, LANES)), 1)
    return total, top, some > 0


@kernel
def _map_kernel(
    x,  # `Maps`
    map_ptr,  # fp32 [N, C]: the map, among zeros, or log P - log M of KL_MEAN
    kl_ptr,  # fp32 [N] or None
    part_ptr,  # fp32 [splits, N], of KL_MEAN
    counters_ptr,  # int32, zeros
    N,
    keys,
    virtual_heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
    TILES: tl.constexpr,  # of keys, that are read at once: 1 or 2
):
    """(K2), (C1) or (K3) of the head mean, on the BLOCK_M / LANES rows of program (row tile, split)
    and all heads."""
    ROWS: tl.constexpr = BLOCK_M // LANES
    OF_KL: tl.constexpr = KIND == KL_MEAN
    # Where products are read from tensor memory, warps do not divide their keys: one is enough, and
    # of two all of it spills.
    AT_ONCE: tl.constexpr = 1 if ak.in_tensor_memory() else TILES
    WIDTH: tl.constexpr = AT_ONCE * BLOCK_N
    record = x.tiles + tk.wide(tl.program_id(0)) * ak._FIELDS
    b, i0, end = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    first, count = tl.load(record + 3), tl.load(record + 4)
    split, splits = tl.program_id(1), tl.num_programs(1)
    i = i0 + tl.arange(0, BLOCK_M)
    n, lane = (i // LANES).to(tl.int64), i % LANES  # a head adds one number to their offsets
    n_at, q_at = n * x.heads + lane, n * x.q.n + lane.to(tl.int64) * x.q.h
    if KIND == CONTRIBUTION:
        g_at = n * x.g.n + lane.to(tl.int64) * x.g.h
    kl = tl.zeros((ROWS,), tl.float32)
    for pair in range(split, tl.cdiv(count, AT_ONCE), splits):
        j0, j1, j = mk.keys_at_once(x, first, pair * AT_ONCE, count, keys, BLOCK_N, AT_ONCE)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        top = tl.full((ROWS, WIDTH), -mk.INFINITE, tl.float32)
        counted = tl.zeros((ROWS,), tl.int1)
        for virtual in range(virtual_heads):
            head = virtual // x.parts * x.group + virtual % x.parts * LANES
            mask = (i < end) & (virtual % x.parts * LANES + lane < x.group)
            q = tk.load_tile(x.q.ptr + tk.wide(head) * x.q.h, q_at, 1, mask, D)
            k = tk.load_keys(x.k, b, virtual // x.parts, j, j < keys, D)
            raw = tk.dot(q, tl.trans(k)) * x.scale
            value = raw
            if KIND == CONTRIBUTION:
                g = tk.load_tile(x.g.ptr + tk.wide(head) * x.g.h, g_at, 1, mask, DV)
                v = tk.load_keys(x.v, b, virtual // x.parts, j, j < keys, DV)
                value = tk.dot(g, tl.trans(v))
            at = n_at + head
            total, top, some = _add_head(x, total, top, raw, value, at, mask, LANES, KIND, RECTIFY)
            counted = counted | some
        if OF_KL:
            total = tk.log_sum(top, total)
        if AT_ONCE == 2:
            left, right = mk.halves(total)
            kl += mk.store_map(x, map_ptr, b, left, counted, j0, keys, BLOCK_M, LANES, OF_KL)
            kl += mk.store_map(x, map_ptr, b, right, counted, j1, keys, BLOCK_M, LANES, OF_KL)
        else:
            kl += mk.store_map(x, map_ptr, b, total, counted, j0, keys, BLOCK_M, LANES, OF_KL)
    if KIND == KL_MEAN:
        row = i0 // LANES + tl.arange(0, ROWS)
        mask = row * LANES < end
        complete = splits == 1
        if splits > 1:
            tl.store(part_ptr + tk.wide(split) * N + row, kl, mask=mask)
            if ak.last_to_arrive(counters_ptr + tl.program_id(0), splits):
                kl = tl.zeros((ROWS,), tl.float32)
                for part in range(splits):
                    kl += ak.load_part(part_ptr, tk.wide(part) * N + row, mask)
                complete = True
        if complete:
            tl.store(kl_ptr + row, kl, mask=mask)


@kernel
def _sums_kernel(
    x,  # `Maps`
    part_ptr,  # fp32 [splits, N, Hq]
    sums_ptr,  # fp32 [N, Hq]: sum_c u z, or for KL_EACH sum_c P (log P - log p)
    dnorm_ptr,  # fp32 [N, Hq], or for KL_EACH None
    kl_ptr,  # fp32 [N], of KL_EACH
    counters_ptr,  # int32, zeros
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """Sums over the own columns, per head."""
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    kv_head, split, splits = ak.kv_head_of(x), tl.program_id(2), tl.num_programs(2)
    at = n.to(tl.int64) * x.heads + head
    q = tk.load_heads(x.q, n, head, mask, D)
    if KIND == CONTRIBUTION:
        g = tk.load_heads(x.g, n, head, mask, DV)
    i0, end = mk.lanes_span(x)
    row, bounds = mk.rows_of(x, i0, end, BLOCK_M, LANES)
    norm = mk.norm_of(x, at, mask)
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if KIND == KL_MEAN:
        factor = tl.load(x.upstream + n, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_M,), tl.float32)
    after = mk.listed_key(x, first, count, split, keys, BLOCK_N)
    place = mk.place_of(x, b, after, keys, BLOCK_N)
    for e in range(split, count, splits):
        j0, place_here = after, place
        after = mk.listed_key(x, first, count, e + splits, keys, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, kv_head, j, j < keys, D)
        above, own = _above(x, place_here, row, bounds, j0, keys, BLOCK_N, LANES, KIND)
        place = mk.place_of(x, b, after, keys, BLOCK_N)
        raw = tk.dot(q, tl.trans(k)) * x.scale
        log_p = mk.log_p(raw, x.softcap, norm[:, None], own)
        value = log_p
        if KIND == CONTRIBUTION:
            v = tk.load_keys(x.v, b, kv_head, j, j < keys, DV)
            value = tk.dot(g, tl.trans(v))
        if KIND == KL_EACH:
            used = own & (above > 0.0) & (log_p != -mk.INFINITE)
            log_target = tl.log(tl.where(used, above, 1.0))
            total += tl.sum(tl.where(used, above * (log_target - log_p), 0.0), 1)
        else:
            uz = _uz(x, above, log_p, value, factor[:, None], KIND, RECTIFY)
            total += tl.sum(tl.where(log_p != -mk.INFINITE, uz, 0.0), 1)
    n, head, mask = ak.row_tile_again(x, BLOCK_M)
    at = n.to(tl.int64) * x.heads + head
    complete, counter = splits == 1, tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if splits > 1:
        size = tk.wide(N) * x.heads
        tl.store(part_ptr + at + split * size, total, mask=mask)
        if ak.last_to_arrive(counters_ptr + counter, splits):
            total = tl.zeros((BLOCK_M,), tl.float32)
            for part in range(splits):
                total += ak.load_part(part_ptr, at + tk.wide(part) * size, mask)
            complete = True
    if complete:
        tl.store(sums_ptr + at, total, mask=mask)
        if KIND == KL_EACH:
            counters_ptr += tl.num_programs(0) * tl.num_programs(1) + tl.program_id(0)
            if ak.last_to_arrive(counters_ptr, tl.num_programs(1)):
                mk.kl_of_heads(x, sums_ptr, kl_ptr, tl.num_programs(1), BLOCK_M, LANES)
        else:
            if KIND != CONTRIBUTION:
                total *= tl.load(x.weight + at, mask=mask, other=0.0)
            tl.store(dnorm_ptr + at, -total, mask=mask)


@kernel
def _backward_dq_kernel(
    x,  # `Maps`
    part_ptr,  # fp32 [splits, N, Hq, D]
    part_g_ptr,  # fp32 [splits, N, Hq, Dv] or None
    dq_ptr,  # [N, Hq, D]
    dg_ptr,  # [N, Hq, Dv] or None
    counters_ptr,  # int32, zeros
    N,
    keys,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    VISIBLE: tl.constexpr,
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """dq and dg of one row tile and virtual head."""
    b, first, count, n, head, mask = ak.row_tile(x, BLOCK_M)
    OF_KL: tl.constexpr = KIND != CONTRIBUTION and KIND != MAP
    kv_head, split, splits = ak.kv_head_of(x), tl.program_id(2), tl.num_programs(2)
    at = n.to(tl.int64) * x.heads + head
    q = tk.load_heads(x.q, n, head, mask, D)
    dq = tl.zeros((BLOCK_M, padded(D)), tl.float32)
    dg = dq
    if KIND == CONTRIBUTION:
        g = tk.load_heads(x.g, n, head, mask, DV)
        dg = tl.zeros((BLOCK_M, padded(DV)), tl.float32)
    i0, end = mk.lanes_span(x)
    row, bounds = mk.rows_of(x, i0, end, BLOCK_M, LANES)
    norm, factor, dnorm = mk.of_rows(x, n, at, mask, KIND != CONTRIBUTION, OF_KL)
    start, stop, _ = tk.row_bounds(x.selection, n, mask)
    after = mk.listed_key(x, first, count, split, keys, BLOCK_N)
    place = mk.place_of(x, b, after, keys, BLOCK_N)
    for e in range(split, count, splits):
        j0, place_here = after, place
        after = mk.listed_key(x, first, count, e + splits, keys, BLOCK_N)
        j = j0 + tl.arange(0, BLOCK_N)
        k = tk.load_keys(x.k, b, kv_head, j, j < keys, D)
        above, own = _above(x, place_here, row, bounds, j0, keys, BLOCK_N, LANES, KIND)
        place = mk.place_of(x, b, after, keys, BLOCK_N)
        raw = tk.dot(q, tl.trans(k)) * x.scale  # [BLOCK_M, BLOCK_N]
        seen = tk.visible(start, stop, j0, BLOCK_N) if VISIBLE else own
        log_p = mk.log_p(raw, x.softcap, norm[:, None], seen)
        some = (log_p != -mk.INFINITE) & own if VISIBLE else log_p != -mk.INFINITE
        value = log_p
        if KIND == CONTRIBUTION:
            v = tk.load_keys(x.v, b, kv_head, j, j < keys, DV)
            value = tk.dot(g, tl.trans(v))
            passed = some & (value > 0.0) if RECTIFY else some
            dvalue = tl.where(passed, mk.exp(x, log_p) * above, 0.0)
            dg += tk.dot(dvalue.to(v.dtype), v)
        uz = _uz(x, above, log_p, value, factor[:, None], KIND, RECTIFY)
        ds = tl.where(some, uz, 0.0)
        if x.dnorm is not None:
            ds += mk.exp(x, log_p) * dnorm[:, None]
        dq += tk.dot(tk.uncapped_gradient(ds, raw, x.softcap).to(k.dtype), k)
    n, head, mask = ak.row_tile_again(x, BLOCK_M)
    at = n.to(tl.int64) * x.heads + head
    parts, to, size = (part_ptr, part_g_ptr), (dq_ptr, dg_ptr), tk.wide(N) * x.heads
    mk.store_sum(parts, to, at, size, counters_ptr, mask, dq, dg, x.scale, D, DV)


@kernel
def _backward_dkv_kernel(
    x,  # `Maps`
    row_tiles_ptr,  # of the `Plan`, or None
    row_spans_ptr,  # of the `Plan`
    dk_ptr,  # [B, Hkv, S, D]
    dv_ptr,  # [B, Hkv, S, Dv] or None
    keys,
    most,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    VISIBLE: tl.constexpr,
    ADD: tl.constexpr,  # to what dk has; a tile that no row reads is left alone
    KIND: tl.constexpr,
    RECTIFY: tl.constexpr,
):
    """dk and dv of one wide key tile, over the row tiles that read it: zeros if there are none."""
    OF_KL: tl.constexpr = KIND != CONTRIBUTION and KIND != MAP
    b, j0, j = tk.key_tile(keys, BLOCK_N)
    kv_head = tl.program_id(1)
    span = row_spans_ptr + tl.program_id(0) * 3
    count, end = tl.load(span), tl.load(span + 1)
    read = (j < keys) & (count > 0)
    k = tk.load_keys(x.k, b, kv_head, j, read, D)
    to = (tk.wide(b) * tl.num_programs(1) + kv_head) * keys + j
    if ADD:
        dk, stored = mk.keys_before(dk_ptr, to, read, x.scale, BLOCK_M, D), read
    else:
        dk, stored = mk.keys_zeros(BLOCK_M, BLOCK_N, D), j < keys
    if KIND == CONTRIBUTION:
        v = tk.load_keys(x.v, b, kv_head, j, read, DV)
        dv = mk.keys_zeros(BLOCK_M, BLOCK_N, DV)
    place = mk.place_of(x, b, j0, keys, BLOCK_N)
    after = mk.first_lane(x, row_tiles_ptr, span, 0, count, most, BLOCK_M)
    sets = mk.sets_of(x, after, end, BLOCK_M, LANES)
    for e in range(count * x.parts):
        i0, member = after, sets
        after = mk.first_lane(x, row_tiles_ptr, span, e + 1, count, most, BLOCK_M)
        virtual = kv_head * x.parts + e % x.parts
        n, head, mask = mk.lanes_of(x, i0 + tl.arange(0, BLOCK_M), end, virtual, LANES)
        at = n.to(tl.int64) * x.heads + head
        q = tk.load_heads(x.q, n, head, mask, D)
        row, bounds = mk.rows_of(x, i0, end, BLOCK_M, LANES)
        bounds = (bounds[0], bounds[1], member)
        sets = mk.sets_of(x, after, end, BLOCK_M, LANES)
        norm, factor, dnorm = mk.of_rows(x, n, at, mask, KIND != CONTRIBUTION, OF_KL)
        start, stop, _ = tk.row_bounds(x.selection, n, mask)
        above, own = _above(x, place, row, bounds, j0, keys, BLOCK_N, LANES, KIND)
        raw = tk.dot(q, tl.trans(k)) * x.scale  # [BLOCK_M, BLOCK_N]
        seen = tk.visible(start, stop, j0, BLOCK_N) if VISIBLE else own
        log_p = mk.log_p(raw, x.softcap, norm[:, None], seen)
        some = (log_p != -mk.INFINITE) & own if VISIBLE else log_p != -mk.INFINITE
        value = log_p
        if KIND == CONTRIBUTION:
            g = tk.load_heads(x.g, n, head, mask, DV)
            value = tk.dot(g, tl.trans(v))
            passed = some & (value > 0.0) if RECTIFY else some
            dvalue = tl.where(passed, mk.exp(x, log_p) * above, 0.0)
            dv = mk.add_product(dv, dvalue.to(g.dtype), g)
        uz = _uz(x, above, log_p, value, factor[:, None], KIND, RECTIFY)
        ds = tl.where(some, uz, 0.0)
        if x.dnorm is not None:
            ds += mk.exp(x, log_p) * dnorm[:, None]
        ds = tk.uncapped_gradient(ds, raw, x.softcap)
        dk = mk.add_product(dk, ds.to(q.dtype), q)
    mk.store_keys(dk_ptr, to, stored, dk, x.scale, BLOCK_M, D)
    if KIND == CONTRIBUTION:
        mk.store_keys(dv_ptr, to, stored, dv, 1.0, BLOCK_M, DV)
