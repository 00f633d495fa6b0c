"""Triton kernels of attention maps over all visible keys: their log-sum-exp and its gradient, which
reaches every one of them, and dk put together.
"""

import triton.language as tl

from groundkern.tiles import (
    allowed_keys,
    any_of,
    capped,
    dot,
    kernel,
    load_heads,
    load_tile,
    row_bounds,
    rows_of_sequence,
    store_tile,
    uncapped_gradient,
    wide,
)


@kernel
def statistics_kernel(
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


@kernel
def visible_dq_kernel(
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


@kernel
def dk_kernel(
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
