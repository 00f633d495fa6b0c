"""Step `tiles`: every tile of a bucket of packed rows, on single kernels by graph replay.

A tile is out if it does not compile, does not fit or changes results. All are screened, the best
few and the present one are timed again, and a tile must be 3 % faster than the present one to be
proposed. `benchmarks.gpu.results --tiles` puts proposals into the tables.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from benchmarks.contestants import admission
from benchmarks.gpu import calls
from benchmarks.gpu.calls import Bucket
from benchmarks.gpu.steps.timing import DEFAULT
from benchmarks.gpu.steps.worker import Cases, Context
from groundkern import tiles
from groundkern.kept import nothing_kept
from groundkern.ops.attention_map import triton_launch as attention_map
from groundkern.ops.side_attention import triton_launch as side_attention
from groundkern.tiles import Tile, tile_key

TABLES = {"side_attention": side_attention.TILES, "attention_map": attention_map.TILES}
GAIN = 0.97  # of the present tile's time
SCREEN, FINAL, FINALISTS = 3, 15, 4  # rounds, rounds, tiles
ELEMENTS = 8192  # the most that a tile of scores has
# block_m by bucket: lanes of a tile beyond those of the call do no work.
HEIGHTS = {16: (16,), 64: (16, 32, 64), 512: (32, 64, 128)}
DIM, WIDE = 128, False  # bf16 at the head dimension of the models


def cases(context: Context) -> Cases:
    if tiles.small(context.device.torch):
        context.write("note", text="this device uses SMALL_TILES, for which there is no sweep")
        return
    for bucket in calls.buckets():
        for kind in bucket.kinds():
            name = f"{bucket.op} {kind or 'all kernels'}, packed rows to {bucket.most or 'any'}"
            yield name, lambda bucket=bucket, kind=kind: _sweep(context, bucket, kind)


def candidates(bucket: Bucket, kind: str) -> list[Tile]:
    """Tiles worth compiling; along the keys, multiples of the 32 keys whose mask bits one integer
    holds."""
    if bucket.op == "attention_map":
        sizes = product(HEIGHTS[bucket.most], (32, 64, 128), (4, 8), (2, 3, 4), (255,))
    else:
        heights, widths = _blocks(bucket, kind)
        sizes = product(heights, widths, (4, 8), (2, 3, 4), (None, 168, 255))
    return [Tile(*size) for size in sizes if size[0] * size[1] <= ELEMENTS]


def _blocks(bucket: Bucket, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heights and widths of side attention's tiles for which the rows of its table still fit one
    another, whatever is proposed for the others: those that share a plan's tiles.

    All lanes of a bucket lie in one tile, and the forward's key tiles are whole ones of the
    backward. Without an end, dq has the forward's tiles and dkv parts of them.
    """
    if bucket.most is not None:
        return (bucket.most,), (64, 128) if kind == "forward" else (32, 64)
    forward = present(bucket, "forward")
    if kind == "dkv":
        return tuple(x for x in (16, 32, 64) if forward.block_m % x == 0), (32, 64, 128)
    return (forward.block_m,), (forward.block_n,)


def key_of(bucket: Bucket, kind: str) -> tuple:
    """The key of the table row for which the sweep tries tiles."""
    lead = (kind, WIDE, DIM) if kind else (WIDE, DIM)
    return lead if bucket.most is None else (*lead, bucket.most)


@contextmanager
def replaced(bucket: Bucket, kind: str, tile: Tile) -> Iterator[None]:
    """Puts that tile into the bucket's row of the table; nothing found with another is used."""
    table, key = TABLES[bucket.op], key_of(bucket, kind)
    before = table.get(key)
    table[key] = tile
    try:
        with nothing_kept():
            yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def present(bucket: Bucket, kind: str) -> Tile:
    """The tile that the bucket uses today."""
    table, key = TABLES[bucket.op], key_of(bucket, kind)
    if key in table:
        return table[key]
    lead = (kind, WIDE) if kind else (WIDE,)
    return table[tile_key(table, lead, [DIM], bucket.most or 2**30)]


class _Sweep:
    """Times tiles of one bucket and kind."""

    def __init__(self, context: Context, bucket: Bucket, kind: str) -> None:
        self.context, self.bucket, self.kind = context, bucket, kind
        self.present = present(bucket, kind)
        device = context.device
        call = device.problem(bucket.call).make(device.torch)
        self.mode = bucket.kinds()[kind]
        self.run, _ = admission.runner(call, admission.ours(call, "triton"), self.mode)
        self.truth, self.dtype = self.run(), bucket.call.real.dtype
        floor = bucket.call.real.floor(self.mode)
        self.expected = floor.seconds(DEFAULT["bandwidth"], DEFAULT["bfloat16"])

    def time(self, tile: Tile, rounds: int, label: str) -> float | None:
        """Microseconds of the kernels that use the row; None if the tile is out."""
        device = self.context.device
        status, total, each = "timed", None, {}
        try:
            with replaced(self.bucket, self.kind, tile):
                got, seen = device.noted_run(self.run)
                device.settle()
                wrong = admission.disagreement(device.observed(got), self.truth, self.dtype)
                if wrong:
                    status = f"out: {wrong}"
                else:
                    played = {"expected": self.expected / len(seen), "label": str(tile)}
                    for launch in (x for x in seen if self.bucket.uses(self.kind, x)):
                        seconds = device.seconds_of(launch, rounds=rounds, **played)
                        each[launch.name] = each.get(launch.name, 0.0) + 1e6 * seconds
                    total = sum(each.values())
        except torch.OutOfMemoryError:
            status = "out: out of memory"
        except Exception as error:  # compilers and drivers raise different errors for each limit
            device.settle()  # raises if the device is lost: the next process goes on
            status = f"out: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        self.context.write(
            "tile",
            case=self.bucket.call.name,
            op=self.bucket.op,
            key=self.key,
            tile=list(tile),
            present=tile == self.present,
            round=label,
            us=total,
            status=status,
            kernels=each,
        )
        return total

    @property
    def key(self) -> list:
        """[kernel or null, wide, dim, packed rows or null]."""
        return [self.kind or None, WIDE, DIM, self.bucket.most]


def _sweep(context: Context, bucket: Bucket, kind: str) -> None:
    sweep = _Sweep(context, bucket, kind)
    others = [x for x in candidates(bucket, kind) if x != sweep.present]
    random.Random(0).shuffle(others)  # if time runs out, no region is left out as a whole
    field: dict[Tile, float] = {}
    for tile in (sweep.present, *others):
        if context.left() < 5:
            context.write("note", text="the screening was cut short: the step's time was over")
            break
        us = sweep.time(tile, SCREEN, "screen")
        if us is not None:
            field[tile] = us
    if sweep.present not in field:
        raise RuntimeError(f"the present tile {tuple(sweep.present)} does not run")
    best = sorted(field, key=field.__getitem__)[:FINALISTS]
    final = {
        tile: sweep.time(tile, FINAL, "final") for tile in dict.fromkeys([*best, sweep.present])
    }
    known = {tile: us for tile, us in final.items() if us is not None}
    first = min(known, key=known.__getitem__)
    chosen = first if known[first] < GAIN * known[sweep.present] else sweep.present
    context.write(
        "best",
        case=bucket.call.name,
        op=bucket.op,
        key=sweep.key,
        tile=list(chosen),
        us=known[chosen],
        present_tile=list(sweep.present),
        present_us=known[sweep.present],
        timed=len(field),
    )
