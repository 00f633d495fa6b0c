"""What the Triton kernels of both attention ops share: the row tiles and key tiles of a plan, and
the merge of the parts that several programs leave.

A program is (row tile, virtual head, split). The query heads of a KV head are one virtual head, or
several of `lanes` each; a lane of a row tile is a (row, query head of the virtual head) pair, so
that a tile of K and V is read once for all of them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from groundkern.plan import Plan
from groundkern.plan_kernels import FIELDS
from groundkern.selection import Selection
from groundkern.tile_kernels import Heads, Keys, store_tile, wide
from groundkern.tiles import INTERPRETED, MOST_SPLITS, Tile, helper, padded, splits

_FIELDS = tl.constexpr(FIELDS)
RADIX = 8  # parts that one program merges at a time
_RADIX = tl.constexpr(RADIX)
_MOST_SPLITS = tl.constexpr(MOST_SPLITS)
_LOOKS = tl.constexpr(2 if INTERPRETED else 16)  # at the counter, each of which takes about 0.7 us


class Attention(NamedTuple):
    """What kernels over rows and their keys read; the sizes that say how wide loads may be."""

    q: Heads  # [N, Hq, D]
    k: Keys  # [B, Hkv, S, D]
    v: Keys | None  # [B, Hkv, S, Dv]
    selection: Selection  # contiguous
    tiles: Tensor  # of the `Plan`
    key_tiles: Tensor | None  # of the `Plan`
    scale: float
    softcap: float | None
    heads: int  # Hq
    group: int  # Hq / Hkv
    lanes: int  # of a virtual head
    parts: int  # virtual heads of a KV head, lanes * parts >= group


@helper
def kv_head_of(x):
    """The KV head of program (row tile, virtual head, ...)."""
    return tl.program_id(1) // x.parts


@helper
def lanes_of(x, i, end, virtual):
    """Row, query head and whether it is in range, of lanes i of a virtual head."""
    member = virtual % x.parts * x.lanes + i % x.lanes
    head = virtual // x.parts * x.group + member
    return i // x.lanes, head, (i < end) & (member < x.group)


@helper
def row_tile(x, BLOCK_M: tl.constexpr):
    """Of the row tile of program (row tile, virtual head, ...): its sequence, the first of its key
    tiles and how many it has; row, query head and whether it is in range [BLOCK_M]."""
    record = x.tiles + wide(tl.program_id(0)) * _FIELDS
    i = tl.load(record + 1) + tl.arange(0, BLOCK_M)
    n, head, mask = lanes_of(x, i, tl.load(record + 2), tl.program_id(1))
    return tl.load(record), tl.load(record + 3), tl.load(record + 4), n, head, mask


@helper
def row_tile_again(x, BLOCK_M: tl.constexpr):
    """Row, query head and whether it is in range [BLOCK_M], for what comes after a long loop: read
    again, because kept in registers through the loop they take 36 to 56 of them."""
    record = x.tiles + wide(tl.program_id(0)) * _FIELDS
    i = tl.load(record + 1, volatile=True) + tl.arange(0, BLOCK_M)
    return lanes_of(x, i, tl.load(record + 2, volatile=True), tl.program_id(1))


@helper
def row_tile_of(x, row_tiles_ptr, span, e, parts, BLOCK_M: tl.constexpr, TILE_M: tl.constexpr):
    """Row, query head and whether it is in range [BLOCK_M] of lanes e * BLOCK_M and on of the row
    tiles that read the wide key tile of program (wide key tile, virtual head)."""
    end, first = span
    lane = first + e * BLOCK_M
    if row_tiles_ptr is not None:
        at = row_tiles_ptr + wide(tl.program_id(0)) * parts + e // (TILE_M // BLOCK_M)
        lane = tl.load(at) + e % (TILE_M // BLOCK_M) * BLOCK_M
    return lanes_of(x, lane + tl.arange(0, BLOCK_M), end, tl.program_id(1))


@helper
def first_key(x, first, e, keys, BLOCK_N: tl.constexpr):
    """Where key tile e < count of a row tile begins."""
    tile = first + e
    if x.key_tiles is not None:
        entries = tl.cdiv(keys, BLOCK_N)
        tile = tl.load(x.key_tiles + wide(tl.program_id(0)) * entries + e)
    return tile * BLOCK_N


@helper
def unread_key(x, first, count, e, keys, BLOCK_N: tl.constexpr):
    """Where key tile e >= count begins, one that the row tile does not read."""
    if x.key_tiles is not None:
        return first_key(x, 0, e, keys, BLOCK_N)
    e -= count
    return tl.where(e < first, e, e + count) * BLOCK_N


@triton.constexpr_function
def in_tensor_memory() -> bool:
    """Whether products are read from tensor memory: on Blackwell of data centres."""
    info = tl.target_info
    return info.cuda_capability_geq(10) and not info.cuda_capability_geq(12)


@triton.constexpr_function
def sums_in_threads() -> bool:
    """Whether threads hold so much of a product's rows that they sum them at little cost: on AMD,
    and where products are read from tensor memory."""
    return tl.target_info.is_hip() or in_tensor_memory()


@helper
def sum_of_halves(p):
    """The sums of either half of each row: [BLOCK_M, 2]. Where 8 warps read a product from tensor
    memory, each half lies in the registers of a thread, and no warp has to wait for another."""
    return tl.sum(tl.reshape(p, (p.shape[0], 2, p.shape[1] // 2)).to(tl.float32), 2)


@helper
def load_part(ptr, at, mask, other=0.0):
    """What another program left: not from the L1 cache, which may hold what was there before."""
    return tl.load(ptr + at, mask=mask, other=other, cache_modifier=".cg")


@helper
def store_both(ptrs, at, x, y, mask):
    """x by the first pointer and y by the second."""
    tl.store(ptrs[0] + at, x, mask=mask)
    tl.store(ptrs[1] + at, y, mask=mask)


@helper
def store_rounded(ptrs, at, x, mask):
    """x in the dtype of the first of two tensors, and in the second, if there is one, what it lost
    by that."""
    first, second = ptrs
    rounded = x.to(first.dtype.element_ty)
    tl.store(first + at, rounded, mask=mask)
    if second is not None:
        rest = x - rounded.to(tl.float32)
        tl.store(second + at, rest.to(second.dtype.element_ty), mask=mask)


@helper
def _halves(x):
    """The left and the right half of the columns of x [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@helper
def store_quarters(ptr, at, mask, x, DIM: tl.constexpr):
    """x [LANES, padded DIM] to rows `at` of a contiguous matrix [..., DIM]; 256 columns a quarter
    at a time: beside sums that take half of a warp group's registers, their addresses spill."""
    if x.shape[1] < 256:
        store_tile(ptr, at, mask, x, DIM)
    else:
        left, right = _halves(x)
        a, b = _halves(left)
        _store_columns(ptr, at, mask, a, 0, DIM)
        _store_columns(ptr, at, mask, b, 64, DIM)
        c, d = _halves(right)
        _store_columns(ptr, at, mask, c, 128, DIM)
        _store_columns(ptr, at, mask, d, 192, DIM)


@helper
def _store_columns(ptr, at, mask, x, FIRST: tl.constexpr, DIM: tl.constexpr):
    d = FIRST + tl.arange(0, x.shape[1])[None, :]
    tl.store(ptr + (at[:, None] * DIM + d), x, mask=mask[:, None] & (d < DIM))


@helper
def last_to_arrive(counter_ptr, expected):
    """Whether all others of `expected` programs have been here; their stores are seen then.

    The last one leaves the counter at 0, for the next launch.
    """
    tl.debug_barrier()  # the stores of all threads come before the arrival
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@helper
def pieces(x):
    """Of the lanes of a row tile, for who merges them: the first, the last + 1, how many are a
    piece, and how many pieces there are: one for each program of the later half to arrive."""
    record = x.tiles + wide(tl.program_id(0)) * _FIELDS
    lane, end = tl.load(record + 1), tl.load(record + 2)
    step = tl.maximum(tl.cdiv((end - lane) * 2, tl.num_programs(2)), 1)
    return lane, end, step, tl.cdiv(end - lane, step)


@helper
def taken(counters_ptr, merging, leaving):
    """How many pieces were taken before; counts one more if `merging`, and a program that counts
    nothing any more if `leaving`: the last of these sets both counters to 0."""
    before = tl.atomic_add(counters_ptr + 1, merging + (leaving << 16), sem="acq_rel", scope="gpu")
    if (leaving > 0) & ((before >> 16) + leaving == tl.num_programs(2)):
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)
    return before & 0xFFFF


@helper
def arrive(counters_ptr, pieces):
    """Which piece a program is to merge now that all others of its row tile have left their parts
    (`pieces`: none), and whether (1 or 0) it was the last to: then it has to come back for pieces
    that nobody took, by `taken(counters_ptr, 1, 1)`. Others may still take some of those and store
    the same bits.

    The later half wait a moment for the last, to merge with it. Nobody has to: who does not see it
    come leaves, so that nothing hangs if programs do not run at the same time.
    """
    splits = tl.num_programs(2)
    tl.debug_barrier()  # the stores of all threads come before the arrival
    before = tl.atomic_add(counters_ptr, 1, sem="acq_rel", scope="gpu")
    there, looks = before + 1, 0
    while (there < splits) & (looks < _LOOKS) & (before * 2 + 1 >= splits):
        there = tl.atomic_add(counters_ptr, 0, sem="acquire", scope="gpu")
        looks += 1
    merging, last = (there == splits).to(tl.int32), (before + 1 == splits).to(tl.int32)
    piece = taken(counters_ptr, merging, 1 - last)
    return tl.where(merging > 0, piece, pieces), last


@helper
def merged(
    ptrs,  # fp32 m, l [splits, N, Hq] and acc [splits, N, Hq, Dv]
    at,  # [LANES], int64: where lanes are in the first part
    size,
    mask,
    DV: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """m, l [LANES] and acc [LANES, padded Dv] of all splits: always in the same order, and with the
    loads of many parts under way at a time. RUNNING: l and acc are scaled by 2^-m; else all three
    are sums."""
    splits = tl.num_programs(2)
    NONE: tl.constexpr = -float("inf") if RUNNING else 0.0
    part = tl.arange(0, _MOST_SPLITS)[None, :]
    here, at_part = mask[:, None] & (part < splits), at[:, None] + part.to(tl.int64) * size
    m_parts = load_part(ptrs[0], at_part, here, NONE)
    l_parts = load_part(ptrs[1], at_part, here)
    if RUNNING:
        m = tl.max(m_parts, 1)
        shift = tl.where(m == NONE, 0.0, m)[:, None]
        l_parts *= tl.exp2(m_parts - shift)
    else:
        m = tl.sum(m_parts, 1)
    PARTS: tl.constexpr = 512 // max(padded(DV), 64)
    d = tl.arange(0, padded(DV))[None, None, :]
    acc = tl.zeros((at.shape[0], padded(DV)), tl.float32)
    for first in tl.range(0, splits, PARTS, num_stages=5):
        some = first + tl.arange(0, PARTS)[None, :]
        there, at_some = mask[:, None] & (some < splits), at[:, None] + some.to(tl.int64) * size
        stored = there[:, :, None] & (d < DV)
        sums = load_part(ptrs[2], at_some[:, :, None] * DV + d, stored)
        if RUNNING:
            scale = tl.exp2(load_part(ptrs[0], at_some, there, NONE) - shift)
            sums *= scale[:, :, None]
        acc += tl.sum(sums, 1)
    return m, tl.sum(l_parts, 1), acc


@helper
def split_group(counters_ptr):
    """Of the group of at most RADIX splits that a program merges with: where the counters of its
    row tile and virtual head are, the last of which is of the groups; which group it is, how many
    there are, and its first split and last + 1."""
    split, splits = tl.program_id(2), tl.num_programs(2)
    groups, group = tl.cdiv(splits, _RADIX), split // _RADIX
    counters_ptr += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * (groups + 1)
    begin = group * _RADIX
    return counters_ptr, group, groups, begin, tl.minimum(begin + _RADIX, splits)


def row_grid(plan: Plan, kv_heads: int, keys: int, tile: Tile, device) -> tuple[int, int, int]:
    """(row tiles, KV heads, key splits)."""
    row_tiles = plan.tiles.shape[0]
    key_tiles = -(-keys // tile.block_n)
    return row_tiles, kv_heads, splits(device, row_tiles * kv_heads, key_tiles)


def merge_counters(grid: tuple[int, int, int]) -> int:
    """How many counters a merge of a grid of (row tiles, KV heads, splits) uses at most: a tree one
    for each group and one for all groups, `arrive` two."""
    return grid[0] * grid[1] * (-(-grid[2] // RADIX) + 1)
