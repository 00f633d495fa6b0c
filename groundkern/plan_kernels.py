"""The Triton kernels that make a `Plan`, and the op that launches them."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from groundkern.op_body import grouped, op_body, schema
from groundkern.plan import NO_PLAN, Plan
from groundkern.selection import Selection
from groundkern.tile_kernels import allowed_keys, any_of, row_bounds, wide
from groundkern.tiles import helper, kernel

FIELDS = 5  # of a row tile
CHUNK = 8  # key tiles that one program looks at
SIZES = "SymInt lanes, SymInt batch, SymInt keys, int block_m, int block_n, int wide"


@helper
def _place_of_tile(offsets_ptr, t, batch, lanes, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """The sequence of row tile t, `batch` if the tile is unused, and that sequence's first tile."""
    b, base, before = 0, 0, 0
    for b0 in range(0, batch, BLOCK):
        at = b0 + tl.arange(0, BLOCK)
        first = tl.load(offsets_ptr + at, mask=at < batch, other=0)
        last = tl.load(offsets_ptr + at + 1, mask=at < batch, other=0)
        tiles = tl.maximum(tl.cdiv((last - first) * lanes, BLOCK_M), 1)
        tiles = tl.where(at < batch, tiles, 0)
        done = (before + tl.cumsum(tiles, 0) <= t) & (at < batch)
        b += tl.sum(done.to(tl.int32), 0)
        base += tl.sum(tl.where(done, tiles, 0), 0)
        before += tl.sum(tiles, 0)
    return b, base


@kernel
def _tiles_kernel(
    selection,  # `Selection`
    offsets_ptr,  # int32 [B + 1], the first row of each sequence
    tiles_ptr,  # int32 [T, FIELDS]
    batch,
    lanes,
    keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """One row tile, with the key tiles between its rows' first `start` and last `stop`."""
    t = tl.program_id(0)
    b, base = _place_of_tile(offsets_ptr, t, batch, lanes, BLOCK_M, BLOCK)
    first = tl.load(offsets_ptr + b, mask=b < batch, other=0) * lanes
    last = tl.load(offsets_ptr + b + 1, mask=b < batch, other=0) * lanes
    i0 = first + (t - base) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    start, stop, _ = row_bounds(selection, i // lanes, i < last)
    some = start < stop
    low = tl.min(tl.where(some, start, 2147483647), 0) // BLOCK_N
    high = tl.cdiv(tl.minimum(tl.max(tl.where(some, stop, 0), 0), keys), BLOCK_N)
    tiles_ptr += wide(t) * FIELDS
    tl.store(tiles_ptr, tl.where(b < batch, b, 0))
    tl.store(tiles_ptr + 1, tl.where(b < batch, i0, 0))
    tl.store(tiles_ptr + 2, tl.where(b < batch, tl.minimum(i0 + BLOCK_M, last), 0))
    tl.store(tiles_ptr + 3, tl.where(low < high, low, 0))
    tl.store(tiles_ptr + 4, tl.maximum(high - low, 0))


@helper
def _any_allowed(
    selection,
    place_ptr,
    tile_ptr,
    lanes,
    j0,
    keys,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whether a row of a tile may use one of the keys j0 .. j0 + BLOCK_N."""
    i = tl.load(tile_ptr + 1) + tl.arange(0, BLOCK_M)
    n, mask = i // lanes, i < tl.load(tile_ptr + 2)
    start, stop, member = row_bounds(selection, n, mask)
    allowed = allowed_keys(selection, start, stop, member, j0, keys, BLOCK_N)
    j = j0 + tl.arange(0, BLOCK_N)
    used = j < keys
    if place_ptr is not None:
        place_ptr += wide(tl.load(tile_ptr)) * keys
        used = used & (tl.load(place_ptr + j, mask=used, other=-1) >= 0)
    return any_of(allowed & used[None, :])


@kernel
def _live_kernel(
    selection,  # `Selection`
    place_ptr,  # int32 [B, S] or None: no columns
    tiles_ptr,  # int32 [T, FIELDS]
    live_ptr,  # int32 [T, entries]
    lanes,
    keys,
    entries,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Whether a row tile has to read a key tile."""
    tile = tiles_ptr + wide(tl.program_id(0)) * FIELDS
    low = tl.load(tile + 3)
    high = low + tl.load(tile + 4)
    live_ptr += wide(tl.program_id(0)) * entries
    first = tl.program_id(1) * CHUNK
    for e in range(first, tl.minimum(first + CHUNK, entries)):
        live = 0
        if (e >= low) & (e < high):
            j0 = e * BLOCK_N
            some = _any_allowed(selection, place_ptr, tile, lanes, j0, keys, BLOCK_M, BLOCK_N)
            live = some.to(tl.int32)
        tl.store(live_ptr + e, live)


@kernel
def _list_kernel(
    live_ptr,  # int32 [T, entries]
    tiles_ptr,  # int32 [T, FIELDS]
    key_tiles_ptr,  # int32 [T, entries]
    entries,
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """The key tiles of one row tile in order: first those to read, then all others."""
    live_ptr += wide(tl.program_id(0)) * entries
    key_tiles_ptr += wide(tl.program_id(0)) * entries
    count = 0
    for e0 in range(0, entries, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(live_ptr + e, mask=e < entries, other=0), 0)
    before = 0
    for e0 in range(0, entries, BLOCK):
        e = e0 + tl.arange(0, BLOCK)
        live = tl.load(live_ptr + e, mask=e < entries, other=0)
        among = before + tl.cumsum(live, 0) - live  # how many to read come before e
        place = tl.where(live > 0, among, count + e - among)
        tl.store(key_tiles_ptr + place, e, mask=e < entries)
        before += tl.sum(live, 0)
    tile = tiles_ptr + wide(tl.program_id(0)) * FIELDS
    tl.store(tile + 3, 0)
    tl.store(tile + 4, count)


@kernel
def _row_tiles_kernel(
    selection,  # `Selection`
    offsets_ptr,  # int32 [B + 1]
    place_ptr,  # int32 [B, S] or None: no columns
    tiles_ptr,  # int32 [T, FIELDS]
    row_tiles_ptr,  # int32 [B * wide key tiles, parts] or None: they follow one another
    row_spans_ptr,  # int32 [B * wide key tiles, 3]
    batch,
    lanes,
    keys,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a wide key tile
    NARROW: tl.constexpr,  # keys of a key tile
    BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """The row tiles that have to read one wide key tile, in order; without a list, all from the
    first to the last of them."""
    program, key_tiles = tl.program_id(0), tl.cdiv(keys, BLOCK_N)
    b, j0 = program // key_tiles, (program % key_tiles) * BLOCK_N
    base = 0
    for b0 in range(0, b, BLOCK):
        at = b0 + tl.arange(0, BLOCK)
        first = tl.load(offsets_ptr + at, mask=at < b, other=0)
        last = tl.load(offsets_ptr + at + 1, mask=at < b, other=0)
        tiles = tl.maximum(tl.cdiv((last - first) * lanes, BLOCK_M), 1)
        base += tl.sum(tl.where(at < b, tiles, 0), 0)
    rows = tl.load(offsets_ptr + b + 1) - tl.load(offsets_ptr + b)
    low, count = 0, 0
    for t in range(base, base + tl.cdiv(rows * lanes, BLOCK_M)):
        tile = tiles_ptr + wide(t) * FIELDS
        if row_tiles_ptr is not None:
            if _any_allowed(selection, place_ptr, tile, lanes, j0, keys, BLOCK_M, BLOCK_N):
                tl.store(row_tiles_ptr + wide(program) * parts + count, tl.load(tile + 1))
                count += 1
        else:
            first, tiles = tl.load(tile + 3), tl.load(tile + 4)
            read = (first * NARROW < j0 + BLOCK_N) & ((first + tiles) * NARROW > j0) & (tiles > 0)
            low = tl.where(read & (count == 0), t, low)
            count = tl.where(read, t + 1 - low, count)
    tl.store(row_spans_ptr + program * 3, count)
    tl.store(row_spans_ptr + program * 3 + 1, tl.load(offsets_ptr + b + 1) * lanes)
    tl.store(row_spans_ptr + program * 3 + 2, tl.load(tiles_ptr + wide(low) * FIELDS + 1))


def _columns_place(columns: Tensor, keys: int) -> Tensor:
    """int32 [B, S]: the place of each key among the columns, -1 for none."""
    place = torch.arange(columns.shape[1], dtype=torch.int32, device=columns.device)
    spare = torch.where(columns >= 0, columns, keys).long()
    table = place.new_full((columns.shape[0], keys + 1), -1)
    return table.scatter_(1, spare, place.expand_as(spare))[:, :keys].contiguous()


def _sizes(
    selection: Selection, lanes: int, batch: int, keys: int, block_m: int, block_n: int, wide: int
) -> tuple[int, int, int, int]:
    """Row tiles, key tiles, wide key tiles, and row tiles of a sequence at most."""
    packed = selection.sequence.shape[0] * lanes
    most = -(-packed // block_m)
    tiles = most + batch if wide else batch
    return tiles, -(-keys // block_n), -(-keys // (wide or block_n)), most


@custom_op(
    "groundkern::plan",
    mutates_args=(),
    schema=f"({schema(Selection)}, {SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@op_body(Selection)
def _plan(selection, lanes, batch, keys, block_m, block_n, wide) -> tuple[Tensor, ...]:
    selection, listed = selection.contiguous(), _listed(selection)
    sizes = (selection, lanes, batch, keys, block_m, block_n, wide)
    count, key_tiles, wide_tiles, most = _sizes(*sizes)
    new = selection.sequence.new_empty
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=selection.sequence.device)
    offsets = torch.searchsorted(selection.sequence, bounds, out_int32=True)
    columns = selection.columns
    place = None if columns is None else _columns_place(columns, keys)
    blocks = {"BLOCK_M": block_m, "FIELDS": FIELDS, "num_warps": 4}
    tiles = new(count, FIELDS)
    narrow = {**blocks, "BLOCK_N": block_n}
    _tiles_kernel[count,](selection, offsets, tiles, batch, lanes, keys, BLOCK=256, **narrow)
    lists = new(count, key_tiles) if listed else new(0)
    if listed:
        live = new(count, key_tiles)
        grid = (count, -(-key_tiles // CHUNK))
        _live_kernel[grid](
            selection, place, tiles, live, lanes, keys, key_tiles, CHUNK=CHUNK, **narrow
        )
        _list_kernel[count,](live, tiles, lists, key_tiles, BLOCK=1024, FIELDS=FIELDS, num_warps=4)
    row_tiles = new(batch * wide_tiles, most).zero_() if wide and listed else new(0)
    row_spans = new(batch * wide_tiles, 3) if wide else new(0)
    if wide:
        _row_tiles_kernel[batch * wide_tiles,](
            selection,
            offsets,
            place,
            tiles,
            row_tiles if listed else None,
            row_spans,
            batch,
            lanes,
            keys,
            most,
            BLOCK_N=wide,
            NARROW=block_n,
            BLOCK=256,
            **blocks,
        )
    return tiles, lists, row_tiles, row_spans, new(0) if place is None else place


@_plan.register_fake
@grouped(Selection)
def _(selection, *sizes):
    count, key_tiles, wide_tiles, most = _sizes(selection, *sizes)
    batch, keys, wide, listed = sizes[1], sizes[2], sizes[5], _listed(selection)
    new = selection.sequence.new_empty
    return (
        new(count, FIELDS),
        new(count, key_tiles) if listed else new(0),
        new(batch * wide_tiles, most) if wide and listed else new(0),
        new(batch * wide_tiles, 3) if wide else new(0),
        new(0) if selection.columns is None else new(batch, keys),
    )


def _listed(selection: Selection) -> bool:
    """Whether the keys of a row may have gaps."""
    return selection.bits is not None or selection.columns is not None


def plan(
    selection: Selection,
    *,
    lanes: int,
    batch: int,
    keys: int,
    block_m: int,
    block_n: int,
    wide: int = 0,
) -> Plan:
    """The plan of a selection: a few launches, no sync.

    Args:
        selection: with key sets, a row reads only tiles with a key of its set; with columns, only
            those with one of its own columns.
        lanes: of a row, at least the query heads of one KV head.
        batch, keys: B and S of the keys.
        block_m: lanes of a row tile, a power of two >= 16.
        block_n: keys of a key tile, a power of two >= 32.
        wide: keys of a wide key tile; 0: every sequence has at most block_m lanes, and the plan has
            one row tile a sequence.
    """
    if len(selection.sequence) == 0 or batch == 0 or keys == 0:
        return NO_PLAN
    found = _plan(*selection, lanes, batch, keys, block_m, block_n, wide)
    listed = _listed(selection)
    there = (True, listed, wide > 0 and listed, wide > 0, selection.columns is not None)
    return Plan(*(x if is_there else None for x, is_there in zip(found, there)), block_m, block_n)
