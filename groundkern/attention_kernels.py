"""What the Triton kernels of both attention ops share: the row tiles and key tiles of a plan, and
the merge of the parts that several programs leave.

A program is (row tile, KV head, split). A lane of a row tile is a (row, query head of the KV head)
pair, so that every tile of K and V is read once for all heads that share it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from groundkern.plan import Plan
from groundkern.plan_kernels import FIELDS
from groundkern.selection import Selection
from groundkern.tile_kernels import Heads, Keys, wide
from groundkern.tiles import Tile, helper, splits

_FIELDS = tl.constexpr(FIELDS)
RADIX = 8  # parts that one program merges at a time
_RADIX = tl.constexpr(RADIX)


class Planned(NamedTuple):
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
    lanes: int  # of a row, at least `group`


@helper
def row_tile(x, BLOCK_M: tl.constexpr):
    """Of the row tile of program (row tile, KV head, ...): its sequence, the first of its key tiles
    and how many it has; row, query head and whether it is in range [BLOCK_M]."""
    record = x.tiles + wide(tl.program_id(0)) * _FIELDS
    n, head, mask = lanes_of(x, tl.load(record + 1), tl.load(record + 2), BLOCK_M)
    return tl.load(record), tl.load(record + 3), tl.load(record + 4), n, head, mask


@helper
def row_tile_again(x, BLOCK_M: tl.constexpr):
    """Row, query head and whether it is in range [BLOCK_M], for what comes after a long loop: read
    again, because kept in registers through the loop they take 60 of them."""
    record = x.tiles + wide(tl.program_id(0)) * _FIELDS
    first, end = tl.load(record + 1, volatile=True), tl.load(record + 2, volatile=True)
    return lanes_of(x, first, end, BLOCK_M)


@helper
def lanes_of(x, first, end, BLOCK_M: tl.constexpr):
    """Row, query head and whether it is before `end`, of the lanes from `first` on: [BLOCK_M]."""
    i = first + tl.arange(0, BLOCK_M)
    mask = (i < end) & (i % x.lanes < x.group)
    return i // x.lanes, tl.program_id(1) * x.group + i % x.lanes, mask


@helper
def row_tile_of(x, row_tiles_ptr, span, e, parts, BLOCK_M: tl.constexpr, TILE_M: tl.constexpr):
    """Row, query head and whether it is in range [BLOCK_M] of lanes e * BLOCK_M and on of the row
    tiles that read the wide key tile of program (wide key tile, KV head)."""
    end, first = span
    lane = first + e * BLOCK_M
    if row_tiles_ptr is not None:
        at = row_tiles_ptr + wide(tl.program_id(0)) * parts + e // (TILE_M // BLOCK_M)
        lane = tl.load(at) + e % (TILE_M // BLOCK_M) * BLOCK_M
    return lanes_of(x, lane, end, BLOCK_M)


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


@helper
def load_part(ptr, at, mask):
    """What another program left: not from the L1 cache, which may hold what was there before."""
    return tl.load(ptr + at, mask=mask, other=0.0, cache_modifier=".cg")


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


def row_grid(plan: Plan, kv_heads: int, keys: int, tile: Tile, device) -> tuple[int, int, int]:
    """(row tiles, KV heads, key splits)."""
    row_tiles = plan.tiles.shape[0]
    key_tiles = triton.cdiv(keys, tile.block_n)
    return row_tiles, kv_heads, splits(device, row_tiles * kv_heads, key_tiles)


def merge_counters(grid: tuple[int, int, int]) -> int:
    """How many counters a merge tree of a grid of (row tiles, KV heads, splits) uses."""
    return grid[0] * grid[1] * (triton.cdiv(grid[2], RADIX) + 1)
