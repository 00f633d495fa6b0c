"""What the Triton kernels of attention maps share: what they read, their masks, and the merge of
what splits leave."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from groundkern import attention_kernels as ak
from groundkern import tile_kernels as tk
from groundkern.selection import Selection
from groundkern.tile_kernels import Heads, Keys
from groundkern.tiles import helper, padded

INFINITE = tl.constexpr(float("inf"))


class Maps(NamedTuple):
    """What the kernels read."""

    q: Heads  # [N, Hq, D]
    k: Keys  # [B, Hkv, S, D]
    g: Heads | None  # [N, Hq, Dv]
    v: Keys | None  # [B, Hkv, S, Dv]
    selection: Selection  # contiguous
    tiles: Tensor  # of the `Plan`
    key_tiles: Tensor | None  # of the `Plan`
    place: Tensor | None  # of the `Plan`
    norm: Tensor | None  # fp32 [N, Hq]; where it is not finite, the head is left out
    weight: Tensor | None  # fp32 [N, Hq]
    target: Tensor | None  # fp32 [N, C], renormalised
    made: Tensor | None  # fp32 [N, C] log P - log M, of KL_MEAN
    upstream: Tensor | None  # fp32 [N, C], of a KL [N]
    dnorm: Tensor | None  # fp32 [N, Hq], if it reaches the keys
    scale: float
    softcap: float | None
    heads: int  # Hq
    group: int  # Hq / Hkv
    lanes: int
    parts: int
    C: int


@helper
def lanes_of(x, i, end, virtual, LANES: tl.constexpr):
    """`ak.lanes_of`, with lanes known to the compiler, so that nothing is divided at run time."""
    member = virtual % x.parts * LANES + i % LANES
    head = virtual // x.parts * x.group + member
    return i // LANES, head, (i < end) & (member < x.group)


@helper
def lanes_span(x):
    """The first lane and the last lane + 1 of the row tile of program (row tile, ...)."""
    record = x.tiles + tk.wide(tl.program_id(0)) * ak._FIELDS
    return tl.load(record + 1), tl.load(record + 2)


@helper
def norm_of(x, at, mask):
    """The normaliser; inf where it is infinite, and the head left out. NaN stays NaN."""
    norm = tl.load(x.norm + at, mask=mask, other=0.0)
    return tl.where(tl.abs(norm) == INFINITE, INFINITE, norm)


@helper
def no_sum(BLOCK_M: tl.constexpr):
    """m and l of `tk.online_sum` before the first score."""
    return tl.full((BLOCK_M,), -INFINITE, tl.float32), tl.zeros((BLOCK_M,), tl.float32)


@helper
def listed_key(x, first, count, e, keys, BLOCK_N: tl.constexpr):
    """Where key tile e of a row tile begins, any tile if e >= count. Loops carry it from the
    iteration before: the list's entry and then the keys there would be loads that wait for one
    another, and take a stage of the pipeline each."""
    tile = first + e
    if x.key_tiles is not None:
        entries = tl.cdiv(keys, BLOCK_N)
        listed = x.key_tiles + tk.wide(tl.program_id(0)) * entries + e
        tile = tl.load(listed, mask=e < count, other=0)
    return tile * BLOCK_N


@helper
def keys_at_once(x, first, e, count, keys, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr):
    """Where key tile e < count of a row tile begins, and the next, and the keys of AT_ONCE (1 or 2)
    of them [AT_ONCE * BLOCK_N]. Behind the last there is none: it begins at `keys`."""
    j0, j1 = ak.first_key(x, first, e, keys, BLOCK_N), keys
    i = tl.arange(0, AT_ONCE * BLOCK_N)
    j = j0 + i
    if AT_ONCE == 2:
        j1 = tl.where(e + 1 < count, listed_key(x, first, count, e + 1, keys, BLOCK_N), keys)
        j = tl.where(i < BLOCK_N, j, j1 + i - BLOCK_N)
    return j0, j1, j


@helper
def halves(x):
    """The left and the right half of each row."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, WIDTH)), (0, 2, 1)))


@helper
def place_of(x, b, j0, keys, BLOCK_N: tl.constexpr):
    """Each key's column or -1: [BLOCK_N]."""
    j = j0 + tl.arange(0, BLOCK_N)
    return tl.load(x.place + tk.wide(b) * keys + j, mask=j < keys, other=-1)


@helper
def of_rows(x, n, at, mask, WEIGHTED: tl.constexpr, OF_KL: tl.constexpr):
    """Normaliser of each lane; head weight, of a KL times its upstream gradient; dnorm, or 0."""
    factor = tl.full(n.shape, 1.0, tl.float32)
    dnorm = tl.zeros(n.shape, tl.float32)
    if WEIGHTED:
        factor = tl.load(x.weight + at, mask=mask, other=0.0)
    if x.dnorm is not None:
        dnorm = tl.load(x.dnorm + at, mask=mask, other=0.0)
    if OF_KL:
        factor *= tl.load(x.upstream + n, mask=mask, other=0.0)
    return norm_of(x, at, mask), factor, dnorm


@helper
def own_columns(x, place, bounds, j0, keys, BLOCK_N: tl.constexpr):
    """Which keys of a tile are own columns: [rows, BLOCK_N]."""
    start, stop, member = bounds
    own = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
    return own & (place >= 0)[None, :]


@helper
def log_p(raw, softcap, norm, seen):
    """(K1) log p, -inf where the key is not seen or the head is left out."""
    seen = seen & (norm != INFINITE)
    return tl.where(seen, tk.capped(raw, softcap) - norm, -INFINITE)


@helper
def less_norm(x, s, n, head, mask):
    """log p of capped scores where `x` has a normaliser, -inf of a head that is left out; the
    scores where it has none."""
    if x.norm is not None:
        norm = norm_of(x, n.to(tl.int64) * x.heads + head, mask)[:, None]
        s = tl.where(norm == INFINITE, -INFINITE, s - norm)
    return s


@helper
def exp(x, y):
    """e^y. Of 16-bit operands as a power of two, and 0 below 2^-126: `tl.exp` keeps such numbers,
    which takes five instructions instead of two."""
    if x.q.ptr.dtype.element_ty == tl.float32:
        y = tl.exp(y)
    else:
        y = tl.exp2(y * tk._LOG2_E)
    return y


@helper
def rectified(value):
    """relu; NaN stays NaN."""
    return tl.where(value < 0.0, 0.0, value)


@helper
def gathered(ptr, C, row, place, mask):
    """The bits, as int32, of fp32 numbers [N, C] in some rows and places; 0 outside the mask.
    Loaded in halves: loads of 16 bits are not staged through shared memory, which would keep the
    keys' copies waiting."""
    halves = tl.cast(ptr, tl.pointer_type(tl.int16), bitcast=True)
    halves = (halves + tk.wide(C) * 2 * row[:, None]) + place[None, :] * 2
    low = tl.load(halves, mask=mask, other=0).to(tl.int32) & 0xFFFF
    high = tl.load(halves + 1, mask=mask, other=0).to(tl.int32) << 16
    return low | high


@helper
def rows_of(x, i0, end, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """The rows of lanes i0 and on, and their bounds: [BLOCK_M / LANES]."""
    row = i0 // LANES + tl.arange(0, BLOCK_M // LANES)
    return row, tk.row_bounds(x.selection, row, row * LANES < end)


@helper
def store_map(x, map_ptr, b, total, counted, j0, keys, BLOCK_M, LANES, OF_KL: tl.constexpr):
    """Store the own columns of a key tile: `total` or, of a KL, log P less it. The KL's sum over
    them [ROWS], or 0."""
    ROWS: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    here, stop = lanes_span(x)  # read again: kept through the heads, all of it spills
    row, bounds = rows_of(x, here, stop, BLOCK_M, LANES)
    place = place_of(x, b, j0, keys, BLOCK_N)
    own = own_columns(x, place, bounds, j0, keys, BLOCK_N)  # [ROWS, BLOCK_N]
    at = tk.wide(x.C) * row[:, None] + place[None, :]
    kl = tl.zeros((ROWS,), tl.float32)
    if OF_KL:
        target = tl.load(x.target + at, mask=own & counted[:, None], other=0.0)
        some = target > 0.0
        total = tl.where(some, tl.log(tl.where(some, target, 1.0)) - total, -INFINITE)
        kl = tl.sum(tl.where(some, target * total, 0.0), 1)
    tl.store(map_ptr + at, total, mask=own)
    return kl


@helper
def sets_of(x, i0, end, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """Only the key set of each of them, -1 without sets."""
    row = i0 // LANES + tl.arange(0, BLOCK_M // LANES)
    member = tl.full(row.shape, -1, tl.int32)
    if x.selection.set_index is not None:
        member = tl.load(x.selection.set_index + row, mask=row * LANES < end, other=-1)
    return member


@helper
def first_lane(x, row_tiles_ptr, span, e, count, most, BLOCK_M: tl.constexpr):
    """The first lane of row tile e / parts of those that read the wide key tile of program (wide
    key tile, KV head); any if there are fewer."""
    if row_tiles_ptr is not None:
        at = row_tiles_ptr + tk.wide(tl.program_id(0)) * most + e // x.parts
        i0 = tl.load(at, mask=e // x.parts < count, other=0)
    else:
        i0 = tl.load(span + 2) + e // x.parts * BLOCK_M
    return i0


@helper
def keys_zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr):
    """The sum of a key tile [BLOCK_N, padded DIM]; of 64 lanes and more transposed, so that 32 keys
    are enough for wgmma, whose first operand has 64 rows."""
    if BLOCK_M >= 64:
        total = tl.zeros((padded(DIM), BLOCK_N), tl.float32)
    else:
        total = tl.zeros((BLOCK_N, padded(DIM)), tl.float32)
    return total


@helper
def keys_before(ptr, at, mask, scale, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """The same, with what is stored by now, by scale."""
    total = tk.load_tile(ptr, at, DIM, mask, DIM).to(tl.float32) / scale
    if BLOCK_M >= 64:
        total = tl.trans(total)
    return total


@helper
def add_product(total, ds, rows):
    """`keys_zeros` + ds^T [BLOCK_N, BLOCK_M] @ rows [BLOCK_M, padded DIM]."""
    if ds.shape[0] >= 64:
        total += tk.dot(tl.trans(rows), ds)
    else:
        total += tk.dot(tl.trans(ds), rows)
    return total


@helper
def store_keys(ptr, at, mask, total, scale, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """`keys_zeros` and what was added to it, by scale."""
    if BLOCK_M >= 64:
        total = tl.trans(total)
    tk.store_tile(ptr, at, mask, total * scale, DIM)


@helper
def kl_of_heads(x, sums_ptr, kl_ptr, virtual_heads, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """(K3) of each head: their weighted sum, in order."""
    ROWS: tl.constexpr = BLOCK_M // LANES
    i0, end = lanes_span(x)
    i, row = i0 + tl.arange(0, BLOCK_M), i0 // LANES + tl.arange(0, ROWS)
    kl = tl.zeros((ROWS,), tl.float32)
    for virtual in range(virtual_heads):
        n, head, mask = lanes_of(x, i, end, virtual, LANES)
        at = n.to(tl.int64) * x.heads + head
        y = ak.load_part(sums_ptr, at, mask)
        y *= tl.load(x.weight + at, mask=mask, other=0.0)
        kl += tl.sum(tl.reshape(y, (ROWS, LANES)), 1)
    tl.store(kl_ptr + row, kl, mask=row * LANES < end)


@helper
def merge(part_ptr, to_ptr, at, to, size, span, mask, scale, DIM: tl.constexpr):
    """To rows `to`: scale times the sum, in this order, of rows `at` of the parts begin,
    begin + step, ... before end. 16 columns at a time, because whole rows take twice the registers
    of the kernels' loops; the loads of RADIX parts are under way together."""
    begin, end, step = span
    for d0 in range(0, DIM, 16):
        d = d0 + tl.arange(0, 16)
        inside = mask[:, None] & (d < DIM)[None, :]
        total = tl.zeros((at.shape[0], 16), tl.float32)
        for first in range(begin, end, step * ak._RADIX):
            for i in tl.static_range(ak._RADIX):
                part = first + i * step
                row = (at + tk.wide(part) * size)[:, None]
                total += ak.load_part(part_ptr, row * DIM + d[None, :], inside & (part < end))
        rounded = (total * scale).to(to_ptr.dtype.element_ty)
        tl.store(to_ptr + to[:, None] * DIM + d[None, :], rounded, mask=inside)


@helper
def merge_both(parts, out, at, to, size, span, mask, scale, D: tl.constexpr, DV: tl.constexpr):
    """dq, by scale, and dg."""
    merge(parts[0], out[0], at, to, size, span, mask, scale, D)
    if parts[1] is not None:
        merge(parts[1], out[1], at, to, size, span, mask, 1.0, DV)


@helper
def store_parts(dq_ptr, dg_ptr, at, mask, dq, dg, D: tl.constexpr, DV: tl.constexpr):
    ak.store_quarters(dq_ptr, at, mask, dq, D)
    if dg_ptr is not None:
        ak.store_quarters(dg_ptr, at, mask, dg, DV)


@helper
def store_sum(
    parts,  # (fp32 [splits, N, Hq, D], fp32 [splits, N, Hq, Dv] or None)
    to,  # ([N, Hq, D], [N, Hq, Dv] or None)
    at,
    size,
    counters_ptr,
    mask,
    dq,
    dg,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
):
    """dq and dg of one split; the last of a row tile's programs to arrive sums them, RADIX at a
    time."""
    dq_ptr, dg_ptr = to
    part_ptr, part_g_ptr = parts
    split, splits = tl.program_id(2), tl.num_programs(2)
    if splits == 1:
        store_parts(dq_ptr, dg_ptr, at, mask, dq * scale, dg, D, DV)
    else:
        counters_ptr, group, groups, begin, end = ak.split_group(counters_ptr)
        store_parts(part_ptr, part_g_ptr, at + split * size, mask, dq, dg, D, DV)
        if ak.last_to_arrive(counters_ptr + group, end - begin):
            if groups == 1:
                merge_both(parts, to, at, at, size, (0, splits, 1), mask, scale, D, DV)
            else:
                part, span = at + begin * size, (begin, end, 1)
                merge_both(parts, parts, at, part, size, span, mask, 1.0, D, DV)
                if ak.last_to_arrive(counters_ptr + groups, groups):
                    span = (0, splits, ak._RADIX)
                    merge_both(parts, to, at, at, size, span, mask, scale, D, DV)
