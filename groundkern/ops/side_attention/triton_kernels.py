"""Triton kernels of side attention (CUDA, ROCm).

Forward: programs (row tile, KV head, key split) leave (m, l, acc); `_reduce_kernel` merges the
splits in order. Backward: `_backward_dkv_kernel` owns a key tile and loops over the rows of its
sequence, `_backward_dq_kernel` owns a row tile and leaves one partial per key split. Row tiles read
the key tiles that `tiles.live_tiles` lists, and no others. No atomics, no sync.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundkern import tiles
from groundkern.tiles import (
    Tile,
    allowed_keys,
    any_of,
    capped,
    dot,
    helper,
    kernel,
    load_heads,
    load_tile,
    row_bounds,
    rows_of_sequence,
    store_tile,
    uncapped_gradient,
    wide,
)

# (kernel, 4-byte operands, largest head dimension[, largest packed rows]) -> tile; 63, 127 and 255
# are for dimensions that are padded to the next power of two, whose masks take registers. Every row
# is an untuned first guess: compiled for sm_80, sm_90, sm_100 and gfx942 by `make aot`, never timed
# on a device. `make gpu` finds better ones.
TILES = {
    ("forward", False, 63): Tile(64, 32, 8),
    ("forward", False, 64): Tile(64, 32, 8),
    ("forward", False, 127): Tile(32, 32, 8),
    ("forward", False, 128): Tile(64, 32, 8),
    ("forward", False, 255): Tile(16, 32, 8),
    ("forward", False, 256): Tile(32, 32, 8),
    ("forward", True, 64): Tile(16, 32, 8),
    ("forward", True, 128): Tile(16, 32, 8),
    ("forward", True, 256): Tile(16, 32, 8, 1),
    ("dkv", False, 63): Tile(16, 64, 8),
    ("dkv", False, 64): Tile(32, 64, 4),
    ("dkv", False, 127): Tile(32, 32, 4, 2, 255),
    ("dkv", False, 128): Tile(16, 64, 8),
    ("dkv", False, 255): Tile(16, 32, 8),
    ("dkv", False, 256): Tile(16, 32, 8),
    ("dkv", True, 64): Tile(16, 32, 4),
    ("dkv", True, 128): Tile(16, 32, 8, 1),
    ("dkv", True, 256): Tile(16, 32, 8, 1),
    ("dq", False, 63): Tile(64, 32, 4),
    ("dq", False, 64): Tile(64, 64, 4),
    ("dq", False, 127): Tile(16, 32, 8, 2, 255),
    ("dq", False, 128): Tile(64, 32, 4),
    ("dq", False, 255): Tile(16, 32, 4),
    ("dq", False, 256): Tile(16, 32, 8),
    ("dq", True, 64): Tile(16, 32, 4),
    ("dq", True, 128): Tile(16, 32, 8, 1),
    ("dq", True, 256): Tile(16, 32, 8, 1),
}


@helper
def _sweep(
    q, m, sequence, start, stop, member, words_ptr, n_words, list_ptr, count, key_tiles, keys,
    k_ptr, v_ptr, scale, softcap, k_b, k_s, v_b, v_s, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, RUNNING: tl.constexpr,
):  # fmt: skip
    """One split's (m, l, acc), with the running maximum or with the fixed shift m; and some."""
    l = tl.zeros(m.shape, tl.float32)  # [BLOCK_M]
    some = tl.zeros(m.shape, tl.int32)  # whether the row has a key here at all
    acc = tl.zeros((m.shape[0], BLOCK_DV), tl.float32)
    for e in range(tl.program_id(2), count, tl.num_programs(2)):
        entry = tl.load(list_ptr + e)
        b, j0 = entry // key_tiles, (entry % key_tiles) * BLOCK_N
        end = tl.where(sequence == b, stop, 0)
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + wide(b) * k_b, j, k_s, j < keys, D, BLOCK_D)
        v = load_tile(v_ptr + wide(b) * v_b, j, v_s, j < keys, DV, BLOCK_DV)
        allowed = allowed_keys(j0, start, end, member, words_ptr, n_words, BLOCK_N)
        s = capped(dot(q, tl.trans(k)) * scale, softcap)
        s = tl.where(allowed, s, -float("inf"))  # [BLOCK_M, BLOCK_N]
        if RUNNING:
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            rescale = tl.exp(m - shift)
            l, acc, m = l * rescale, acc * rescale[:, None], m_new
        else:
            some = tl.maximum(some, tl.max(allowed.to(tl.int32), 1))
            shift = m
        p = tl.exp(s - shift[:, None])
        l += tl.sum(p, 1)
        acc += dot(p.to(v.dtype), v)
    return m, l, acc, some


@kernel
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, sequence_ptr, start_ptr, stop_ptr, words_ptr, set_ptr, lse_ptr,
    list_ptr, count_ptr, entries, key_tiles, m_ptr, l_ptr, acc_ptr, scale, softcap, N, heads, group,
    n_words, keys, q_n, q_h, k_b, k_h, k_s,
    v_b, v_h, v_s, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(S1) on one split of the keys: m, l [splits, N, Hq], acc [splits, N, Hq, Dv]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, set_ptr)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    k_ptr += kv_head.to(tl.int64) * k_h
    v_ptr += kv_head.to(tl.int64) * v_h
    list_ptr += tl.program_id(0).to(tl.int64) * entries
    count = tl.load(count_ptr + tl.program_id(0))
    none = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if lse_ptr is not None:
        shift = tl.load(lse_ptr + n * heads + head, mask=kept, other=0.0)
        shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
        m, l, acc, some = _sweep(
            q, shift, sequence, start, stop, member, words_ptr, n_words, list_ptr, count, key_tiles,
            keys, k_ptr, v_ptr, scale, softcap, k_b, k_s, v_b, v_s, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_N, False,
        )  # fmt: skip
        # A sum near fp32's ends, or 0: redone with its own maximum, so that lse never matters.
        lost = (some > 0) & ((l < 2.0**-80) | (l > 2.0**80) | (l != l))
        if tl.max(lost.to(tl.int32), 0) > 0:
            m, l, acc, some = _sweep(
                q, none, sequence, start, stop, member, words_ptr, n_words, list_ptr, count,
                key_tiles, keys, k_ptr, v_ptr, scale, softcap, k_b, k_s, v_b, v_s, D, DV, BLOCK_D,
                BLOCK_DV, BLOCK_N, True,
            )  # fmt: skip
    else:
        m, l, acc, some = _sweep(
            q, none, sequence, start, stop, member, words_ptr, n_words, list_ptr, count, key_tiles,
            keys, k_ptr, v_ptr, scale, softcap, k_b, k_s, v_b, v_s, D, DV, BLOCK_D, BLOCK_DV,
            BLOCK_N, True,
        )  # fmt: skip
    at = (split.to(tl.int64) * N + n) * heads + head
    tl.store(m_ptr + at, m, mask=kept)
    tl.store(l_ptr + at, l, mask=kept)
    store_tile(acc_ptr, at, DV, kept, acc, DV, BLOCK_DV)


@kernel
def _reduce_kernel(
    m_ptr, l_ptr, acc_ptr, out_ptr, lse_ptr, splits, size, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one (row, head): out = sum acc e^m / sum l e^m, lse."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_DV)
    m, l = -float("inf"), 0.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
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
    lse = m + tl.log(tl.where(some, l, 1.0))
    tl.store(lse_ptr + i, tl.where(some, lse, -float("inf")))


@kernel
def _delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, size, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = out . dout - dlse of each (row, head): ds = p (dp - delta).

    Summed by a dot as dp is, so that the two cancel to the bit where one key takes all.
    """
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = i < size
    out = load_tile(out_ptr, i, DV, kept, DV, BLOCK_DV)
    dout = load_tile(dout_ptr, i, DV, kept, DV, BLOCK_DV)
    m = tl.arange(0, BLOCK_M)
    products = dot(dout, tl.trans(out))  # [BLOCK_M, BLOCK_M], of which the diagonal
    delta = tl.sum(tl.where(m[:, None] == m[None, :], products, 0.0), 1)
    tl.store(delta_ptr + i, delta - tl.load(dlse_ptr + i, mask=kept, other=0.0), mask=kept)


@kernel
def _backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, sequence_ptr, start_ptr, stop_ptr,
    words_ptr, set_ptr, dk_ptr, dv_ptr, scale, softcap, N, heads, group, n_words, keys, key_tiles,
    q_n, q_h, k_b, k_h, k_s, v_b, v_h, v_s, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk, dv of one key tile: a loop over the rows of its sequence; zeros where none looks."""
    b, kv_head = tl.program_id(0) // key_tiles, tl.program_id(1)
    j0 = (tl.program_id(0) % key_tiles) * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    first, last = rows_of_sequence(sequence_ptr, b, N)
    touched = 0
    for n0 in range(first, last, BLOCK_M):
        n = n0 + tl.arange(0, BLOCK_M)
        start, stop, member = row_bounds(n, n < last, start_ptr, stop_ptr, set_ptr)
        allowed = allowed_keys(j0, start, stop, member, words_ptr, n_words, BLOCK_N)
        touched = tl.maximum(touched, any_of(allowed).to(tl.int32))
    read = (j < keys) & (touched > 0)
    k_ptr += wide(b) * k_b + kv_head.to(tl.int64) * k_h
    v_ptr += wide(b) * v_b + kv_head.to(tl.int64) * v_h
    k = load_tile(k_ptr, j, k_s, read, D, BLOCK_D)
    v = load_tile(v_ptr, j, v_s, read, DV, BLOCK_DV)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for i0 in range(first * group, tl.where(touched > 0, last, first) * group, BLOCK_M):
        i = i0 + tl.arange(0, BLOCK_M)
        n, head = i // group, kv_head * group + i % group
        kept = n < last
        start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, set_ptr)
        allowed = allowed_keys(j0, start, stop, member, words_ptr, n_words, BLOCK_N)
        if any_of(allowed):
            at = n * heads + head
            q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
            dout = load_tile(dout_ptr, at, DV, kept, DV, BLOCK_DV)
            lse = tl.load(lse_ptr + at, mask=kept, other=0.0)
            delta = tl.load(delta_ptr + at, mask=kept, other=0.0)
            raw = dot(k, tl.trans(q)) * scale  # [BLOCK_N, BLOCK_M]
            s = capped(raw, softcap)
            p = tl.exp(tl.where(tl.trans(allowed), s - lse[None, :], -float("inf")))
            dv += dot(p.to(dout.dtype), dout)
            dp = dot(v, tl.trans(dout))
            ds = uncapped_gradient(p * (dp - delta[None, :]), raw, softcap)
            dk += dot(ds.to(q.dtype), q)
    at = (b.to(tl.int64) * tl.num_programs(1) + kv_head) * keys + j
    store_tile(dk_ptr, at, D, j < keys, dk * scale, D, BLOCK_D)
    store_tile(dv_ptr, at, DV, j < keys, dv, DV, BLOCK_DV)


@kernel
def _backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, sequence_ptr, start_ptr, stop_ptr,
    words_ptr, set_ptr, list_ptr, count_ptr, entries, key_tiles, part_ptr, scale, softcap, N, heads,
    group, n_words, keys, q_n, q_h,
    k_b, k_h, k_s, v_b, v_h, v_s, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq / scale of one row tile over one split of the keys: part [splits, N, Hq, D]."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head, split = tl.program_id(1), tl.program_id(2)
    n, head = i // group, kv_head * group + i % group
    kept = n < N
    at = n * heads + head
    sequence = tl.load(sequence_ptr + n, mask=kept, other=-1)
    start, stop, member = row_bounds(n, kept, start_ptr, stop_ptr, set_ptr)
    q = load_heads(q_ptr, n, head, q_n, q_h, kept, D, BLOCK_D)
    dout = load_tile(dout_ptr, at, DV, kept, DV, BLOCK_DV)
    lse = tl.load(lse_ptr + at, mask=kept, other=0.0)
    delta = tl.load(delta_ptr + at, mask=kept, other=0.0)
    k_ptr += kv_head.to(tl.int64) * k_h
    v_ptr += kv_head.to(tl.int64) * v_h
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    list_ptr += tl.program_id(0).to(tl.int64) * entries
    count = tl.load(count_ptr + tl.program_id(0))
    for e in range(split, count, tl.num_programs(2)):
        entry = tl.load(list_ptr + e)
        b, j0 = entry // key_tiles, (entry % key_tiles) * BLOCK_N
        end = tl.where(sequence == b, stop, 0)
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr + wide(b) * k_b, j, k_s, j < keys, D, BLOCK_D)
        v = load_tile(v_ptr + wide(b) * v_b, j, v_s, j < keys, DV, BLOCK_DV)
        allowed = allowed_keys(j0, start, end, member, words_ptr, n_words, BLOCK_N)
        raw = dot(q, tl.trans(k)) * scale  # [BLOCK_M, BLOCK_N]
        s = capped(raw, softcap)
        p = tl.exp(tl.where(allowed, s - lse[:, None], -float("inf")))
        dp = dot(dout, tl.trans(v))
        ds = uncapped_gradient(p * (dp - delta[:, None]), raw, softcap)
        dq += dot(ds.to(k.dtype), k)
    store_tile(part_ptr, split.to(tl.int64) * N * heads + at, D, kept, dq, D, BLOCK_D)


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why Triton cannot serve this call, in one sentence; None when it can.

    Args:
        q: [N, Hq, D] queries.
        k: [B, Hkv, S, D] keys.
        v: [B, Hkv, S, Dv] values.
    """
    return tiles.unsupported(q, k, v)


def _tile(name: str, q: Tensor, v: Tensor) -> tuple[Tile, dict[str, int]]:
    """The table's row and the constexprs it gives."""
    dims = {"D": q.shape[2], "DV": v.shape[3]}
    blocks = {f"BLOCK_{letters}": tiles.padded(dim) for letters, dim in dims.items()}
    packed = q.shape[0] * (q.shape[1] // v.shape[1])
    kind = (name, q.dtype == torch.float32)
    tile = TILES[tiles.tile_key(TILES, kind, list(dims.values()), packed)]
    return tile, {**dims, **blocks, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}


def _rows_grid(q: Tensor, k: Tensor, tile: Tile) -> tuple[int, int, int]:
    """(row tiles, KV heads, key splits)."""
    row_tiles = triton.cdiv(q.shape[0] * (q.shape[1] // k.shape[1]), tile.block_m)
    key_tiles = triton.cdiv(k.shape[2], tile.block_n)
    return row_tiles, k.shape[1], tiles.splits(q.device, row_tiles * k.shape[1], key_tiles)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    lse: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out [N, Hq, Dv] in q's dtype and its log-sum-exp [N, Hq] fp32.

    With fp16 values the given `lse` is not used: p = exp(s - lse) of a small region would lose its
    bits in fp16.
    """
    q, k, v = (tiles.rows_contiguous(x) for x in (q, k, v))
    (rows, heads, _), dim = q.shape, v.shape[3]
    out, own_lse = q.new_empty(rows, heads, dim), q.new_empty(rows, heads, dtype=torch.float32)
    if own_lse.numel() == 0:
        return out, own_lse
    tile, constants = _tile("forward", q, v)
    grid = _rows_grid(q, k, tile)
    m, l = (q.new_empty(grid[2], rows, heads, dtype=torch.float32) for _ in range(2))
    acc = q.new_empty(grid[2], rows, heads, dim, dtype=torch.float32)
    lse = None if lse is None or q.dtype == torch.float16 else lse.contiguous()
    selection = _selection(sequence, start, stop, words, set_index)
    live = tiles.live_tiles(selection, heads // k.shape[1], *k.shape[::2], *tile[:2])
    _forward_kernel[grid](
        q, k, v, *selection, lse, *live, m, l, acc, scale, softcap or None, *_sizes(q, k, words),
        *_strides(q, k, v), **constants, **tile.options,
    )  # fmt: skip
    _reduce_kernel[(rows * heads,)](
        m, l, acc, out, own_lse, grid[2], rows * heads, DV=dim, BLOCK_DV=constants["BLOCK_DV"],
        num_warps=1,
    )  # fmt: skip
    return out, own_lse


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    own_lse: Tensor,
    sequence: Tensor,
    start: Tensor,
    stop: Tensor,
    words: Tensor | None,
    set_index: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the inputs' dtypes and shapes; the same bits on every run."""
    q, k, v, out, dout = (tiles.rows_contiguous(x) for x in (q, k, v, out, dout))
    (rows, heads, dim), (batch, kv_heads, keys, _) = q.shape, k.shape
    if own_lse.numel() == 0 or k.numel() == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    delta = q.new_empty(rows, heads, dtype=torch.float32)
    tile, constants = _tile("dkv", q, v)
    _delta_kernel[(triton.cdiv(rows * heads, 16),)](
        out, dout, dlse, delta, rows * heads, DV=v.shape[3], BLOCK_DV=constants["BLOCK_DV"],
        BLOCK_M=16, num_warps=4,
    )  # fmt: skip
    selection = _selection(sequence, start, stop, words, set_index)
    read = (q, k, v, dout, own_lse.contiguous(), delta, *selection)
    sizes, strides = _sizes(q, k, words), _strides(q, k, v)
    key_tiles = triton.cdiv(keys, tile.block_n)
    _backward_dkv_kernel[(batch * key_tiles, kv_heads)](
        *read, dk, dv, scale, softcap or None, *sizes, key_tiles, *strides, **constants,
        **tile.options,
    )  # fmt: skip
    tile, constants = _tile("dq", q, v)
    grid = _rows_grid(q, k, tile)
    part = q.new_empty(grid[2], rows, heads, dim, dtype=torch.float32)
    live = tiles.live_tiles(selection, heads // kv_heads, batch, keys, *tile[:2])
    _backward_dq_kernel[grid](
        *read, *live, part, scale, softcap or None, *sizes, *strides, **constants,
        **tile.options,
    )  # fmt: skip
    return tiles.sum_parts(part, q, scale), dk, dv


def _selection(sequence, start, stop, words, set_index) -> tuple[Tensor | None, ...]:
    """Contiguous; words and set_index both absent where there are no sets."""
    absent = words is None
    sets = (None, None) if absent else (words.contiguous(), set_index.contiguous())
    return sequence.contiguous(), start.contiguous(), stop.contiguous(), *sets


def _sizes(q: Tensor, k: Tensor, words: Tensor | None) -> tuple[int, ...]:
    """N, heads, group, n_words, keys."""
    n_words = 0 if words is None else words.shape[1]
    return *q.shape[:2], q.shape[1] // k.shape[1], n_words, k.shape[2]


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return *q.stride()[:2], *k.stride()[:3], *v.stride()[:3]
