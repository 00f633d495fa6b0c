"""What the Triton attention kernels read, write and multiply: one `Pass` per kernel of a call.

Computed from sizes and from the launchers' own tile tables and rule of splits; nothing here is
measured. One sequence, bf16, every key used, on a card with 132 multiprocessors (H100, H200).
What any implementation needs at least is in floors.py.
"""

from dataclasses import dataclass

import torch

from benchmarks.costs.floors import AttentionSizes, Mode
from groundkern import tiles
from groundkern.attention_kernels import RADIX
from groundkern.ops.attention_map import triton_launch as attention_map_launch
from groundkern.ops.side_attention import triton_launch as side_attention_launch
from groundkern.tiles import Tile

CARD = torch.device("meta")  # has as many processors as an H200, as far as `tiles` is concerned
PROCESSORS = 132
FP32 = 4  # bytes


@dataclass(frozen=True)
class Pass:
    """One kernel of a call.

    read, written: bytes of device memory; operands that several programs read at about the same
    time count once, because the L2 cache serves the others. flops: of the dots, with rows and keys
    that only fill up tiles. busy: the share of the processors' time in which they have a program,
    if all key tiles take equally long. flight: bytes of K and V that are asked for ahead of their
    use on the whole card; 0: nothing is prefetched. merged: bytes that one program
    reads of others' sums when all are done. exchanges: how often it then waits for the L2 cache
    (arrivals, loads); not counted for maps.
    """

    kernel: str
    read: int
    written: int
    flops: int = 0
    programs: int = 1
    busy: float = 1.0
    flight: int = 0
    merged: int = 0
    exchanges: int = 0


def _up(x: int, y: int) -> int:
    return -(-x // y)


@dataclass(frozen=True)
class _Grid:
    """Row tiles x KV heads x splits, and what follows from them."""

    s: AttentionSizes
    tile: Tile
    keys: int  # that are gone over
    lanes: int  # of all rows
    listed: int = 0  # key tiles that splits are cut from, if others than are gone over

    @property
    def row_tiles(self) -> int:
        return _up(self.lanes, self.tile.block_m)

    @property
    def key_tiles(self) -> int:
        return _up(self.keys, self.tile.block_n)

    @property
    def splits(self) -> int:
        return tiles.splits(CARD, self.row_tiles * self.s.kv_heads, self.listed or self.key_tiles)

    @property
    def programs(self) -> int:
        return self.row_tiles * self.s.kv_heads * self.splits

    @property
    def busy(self) -> float:
        rounds = _up(self.programs, PROCESSORS) * _up(self.key_tiles, self.splits)
        return self.row_tiles * self.s.kv_heads * self.key_tiles / (PROCESSORS * rounds)

    def flops(self, dots: int) -> int:
        padded = self.row_tiles * self.tile.block_m * self.key_tiles * self.tile.block_n
        return dots * 2 * padded * self.s.dim * self.s.kv_heads

    def flight(self, dims: int) -> int:
        """dims: of what is loaded for a key, D + Dv or D."""
        tile = self.tile.block_n * dims * self.s.itemsize
        return min(self.programs, 2 * PROCESSORS) * (self.tile.stages - 1) * tile

    def parts(self, width: int) -> int:
        """Bytes of all splits' partial sums of `width` numbers a row and head."""
        return self.splits * self.s.rows * self.s.heads * width * FP32


def _side_tile(name: str, lanes: int, dims: list[int]) -> Tile | None:
    table = side_attention_launch.TILES
    return table.get(tiles.tile_key(table, (name, False), dims, lanes))


def _side_forward(s: AttentionSizes, used: int, q: int, out: int) -> Pass:
    lanes, dims = s.rows * s.heads // s.kv_heads, [s.dim, s.value_dim]
    grid = _Grid(s, _side_tile("forward", lanes, dims), s.used, lanes)
    width = s.value_dim + 2  # acc, m, l
    parts = grid.parts(width) if grid.splits > 1 else 0
    # The later half of a row tile's programs merge: a piece of its lanes each, a few at a time, for
    # which they load m and l, then acc. Before, they arrive and take the piece; after, the last
    # asks what is left. The sums come from the L2 cache: no device memory is read for them.
    piece = _up(2 * min(lanes, grid.tile.block_m), grid.splits)
    at_a_time = 8 if grid.tile.block_m >= 64 else 4
    return Pass(
        "_forward_kernel",
        read=s.itemsize * (q + used),
        written=2 * s.itemsize * out + FP32 * s.rows * s.heads + parts,  # and out's rest
        flops=grid.flops(2),
        programs=grid.programs,
        busy=grid.busy,
        flight=grid.flight(s.dim + s.value_dim),
        merged=piece * grid.splits * width * FP32 if parts else 0,
        exchanges=3 + 2 * _up(piece, at_a_time) if parts else 0,
    )


def side_attention(s: AttentionSizes, mode: Mode) -> list[Pass]:
    """Forward; and the backward in one pass over K and V if all lanes fit one tile, else in two."""
    lanes, dims = s.rows * s.heads // s.kv_heads, [s.dim, s.value_dim]
    q, out = s.rows * s.heads * s.dim, s.rows * s.heads * s.value_dim
    used = s.kv_heads * s.used * (s.dim + s.value_dim)
    whole = s.kv_heads * s.keys * (s.dim + s.value_dim)
    statistics = FP32 * s.rows * s.heads
    passes = [_side_forward(s, used, q, out)]
    if mode == "forward":
        return passes
    one = _side_tile("backward", lanes, dims)
    grid = _Grid(s, one or _side_tile("dq", 2**31, dims), s.used, lanes)
    first = Pass(
        "_backward_kernel" if one else "_backward_dq_kernel",
        read=s.itemsize * (q + 3 * out + used) + 2 * statistics,
        written=grid.parts(s.dim) + (s.itemsize * whole if one else statistics),
        flops=grid.flops(5 if one else 3),
        programs=grid.programs,
        busy=grid.busy,
        flight=grid.flight(s.dim + s.value_dim),
    )
    passes.append(first)
    if not one:
        passes.append(_dkv(s, used, whole, q + out))
    reduced = Pass(
        "_sum_kernel", read=grid.parts(s.dim), written=s.itemsize * q, programs=PROCESSORS
    )
    return [*passes, reduced]


def _dkv(s: AttentionSizes, used: int, whole: int, rows: int) -> Pass:
    """A program owns a wide key tile and goes over all rows, which it finds in the L2 cache."""
    lanes = s.rows * s.heads // s.kv_heads
    tile = _side_tile("dkv", 2**31, [s.dim, s.value_dim])
    programs = _up(s.keys, tile.block_n) * s.kv_heads
    padded = _up(lanes, tile.block_m) * tile.block_m * _up(s.used, tile.block_n) * tile.block_n
    return Pass(
        "_backward_dkv_kernel",
        read=s.itemsize * (used + rows) + 2 * FP32 * s.rows * s.heads,
        written=s.itemsize * whole,
        flops=4 * 2 * padded * s.dim * s.kv_heads,
        programs=programs,
        busy=programs / (PROCESSORS * _up(programs, PROCESSORS)),
    )


def attention_kl(s: AttentionSizes, mode: Mode) -> list[Pass]:
    """KLAL's default: KL of the head mean, normalised over the columns, which lie side by side.
    Their keys are few: after the first kernel all find them in the L2 cache."""
    table, group = attention_map_launch.TILES, s.heads // s.kv_heads
    tile = table[tiles.tile_key(table, (False,), [s.dim], s.rows * group)]
    listed = min(_up(s.keys, tile.block_n), s.columns)
    lanes = s.rows * (1 << (group - 1).bit_length())
    grid = _Grid(s, tile, s.columns, lanes, listed)
    q, statistics = s.itemsize * s.rows * s.heads * s.dim, FP32 * s.rows * s.heads
    keys = s.itemsize * s.kv_heads * s.columns * s.dim
    maps, each = FP32 * s.rows * s.columns, FP32 * s.rows * s.heads
    shared = {"programs": grid.programs, "busy": grid.busy, "flight": grid.flight(s.dim)}
    norm = Pass(
        "_norm_kernel", q + keys + grid.parts(1), grid.parts(1) + each, grid.flops(1), **shared
    )
    splits = tiles.splits(CARD, grid.row_tiles, listed)  # all heads in a program
    steps = _up(grid.row_tiles * splits, PROCESSORS) * _up(grid.key_tiles, splits)
    log_map = Pass(
        "_map_kernel",
        read=q + statistics + maps,
        written=maps,
        flops=grid.flops(1),
        programs=grid.row_tiles * splits,
        busy=grid.row_tiles * grid.key_tiles / (PROCESSORS * steps),
    )
    if mode == "forward":
        return [norm, log_map]
    read = q + 2 * statistics + 2 * maps
    sums = Pass("_sums_kernel", read + keys + grid.parts(1), grid.parts(1) + 2 * each,
                grid.flops(1), **shared)  # fmt: skip
    groups = _up(grid.splits, RADIX)
    parts = grid.parts(s.dim) if grid.splits > 1 else 0
    of_program = min(s.rows * group, tile.block_m) * s.dim * FP32
    merged = of_program * (min(grid.splits, RADIX) + groups) if parts else 0
    dq = Pass(
        "_backward_dq_kernel", read + parts, parts + q, grid.flops(2), merged=merged, **shared
    )
    programs = _up(s.keys, tile.block_n) * s.kv_heads
    dkv = Pass(
        "_backward_dkv_kernel",
        read=read,
        written=s.itemsize * s.kv_heads * s.keys * s.dim,
        flops=grid.flops(2),
        programs=programs,
        busy=min(1.0, grid.key_tiles * s.kv_heads / PROCESSORS),  # others only write zeros
    )
    return [norm, log_map, sums, dq, dkv]
