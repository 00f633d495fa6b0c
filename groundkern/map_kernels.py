"""What the Triton kernels of attention maps share: what they read, their row tiles and masks, and
the merge of what splits leave.

A KV head's query heads are cut into `parts` of `lanes`, each of which is a virtual head: a lane of
a row tile is (row, query head of the virtual head).
"""

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
    log_map: Tensor | None  # fp32 [N, C], of KL_MEAN
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
def lanes_of(x, i, end, virtual):
    """Row, query head and whether it is in range, of lanes i of a virtual head."""
    member = virtual % x.parts * x.lanes + i % x.lanes
    head = virtual // x.parts * x.group + member
    return i // x.lanes, head, (i < end) & (member < x.group)


@helper
def row_tile(x, BLOCK_M: tl.constexpr):
    """Of the row tile of program (row tile, virtual head, split): its sequence, the first of its
    key tiles and how many it has; row, query head and whether it is in range [BLOCK_M]."""
    record = x.tiles + tk.wide(tl.program_id(0)) * ak._FIELDS
    i = tl.load(record + 1) + tl.arange(0, BLOCK_M)
    n, head, mask = lanes_of(x, i, tl.load(record + 2), tl.program_id(1))
    return tl.load(record), tl.load(record + 3), tl.load(record + 4), n, head, mask


@helper
def norm_of(x, at, mask):
    """The normaliser; inf where it is not finite."""
    norm = tl.load(x.norm + at, mask=mask, other=0.0)
    return tl.where(tl.abs(norm) < INFINITE, norm, INFINITE)


@helper
def seen(x, b, bounds, j0, keys, BLOCK_N: tl.constexpr, VISIBLE: tl.constexpr):
    """Of a key tile: each key's column or -1 [BLOCK_N]; the own columns and the keys that the
    normaliser sums over [BLOCK_M, BLOCK_N]."""
    start, stop, member = bounds
    j = j0 + tl.arange(0, BLOCK_N)
    place = tl.load(x.place + tk.wide(b) * keys + j, mask=j < keys, other=-1)
    own = tk.allowed_keys(x.selection, start, stop, member, j0, keys, BLOCK_N)
    own = own & (place >= 0)[None, :]
    seen = own
    if VISIBLE:
        seen = (j[None, :] >= start[:, None]) & (j[None, :] < stop[:, None])
    return place, own, seen


@helper
def log_p(raw, softcap, norm, seen):
    """(K1) log p, -inf where the key is not seen or the head is left out."""
    seen = seen & (norm < INFINITE)
    return tl.where(seen, tk.capped(raw, softcap) - norm, -INFINITE)


@helper
def stored_part(ptr, at, mask, DIM: tl.constexpr):
    """Rows that another program stored, past the L1 cache."""
    d = tl.arange(0, padded(DIM))
    pointers = ptr + at[:, None] * DIM + d[None, :]
    stored = mask[:, None] & (d < DIM)[None, :]
    return tl.load(pointers, mask=stored, other=0.0, cache_modifier=".cg")


@helper
def merged(dq_ptr, dg_ptr, at, size, begin, end, step, mask, dg, D: tl.constexpr, DV: tl.constexpr):
    """dq and dg of the parts begin, begin + step, ... before end, in this order."""
    dq = tl.zeros((at.shape[0], padded(D)), tl.float32)
    if dg_ptr is not None:
        dg = tl.zeros((at.shape[0], padded(DV)), tl.float32)
    for part in range(begin, end, step):
        dq += stored_part(dq_ptr, at + tk.wide(part) * size, mask, D)
        if dg_ptr is not None:
            dg += stored_part(dg_ptr, at + tk.wide(part) * size, mask, DV)
    return dq, dg


@helper
def store_parts(dq_ptr, dg_ptr, at, mask, dq, dg, D: tl.constexpr, DV: tl.constexpr):
    tk.store_tile(dq_ptr, at, mask, dq, D)
    if dg_ptr is not None:
        tk.store_tile(dg_ptr, at, mask, dg, DV)
