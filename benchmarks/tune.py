"""`python -m benchmarks.tune`: find better rows for the Triton kernels' tile tables, on a GPU.

Times an op's call with every candidate tile of one row, halves the field until few are left, and
prints the row with device and date; a person puts it into the table. A candidate that does not
compile, does not fit or gives other results than the present tile is out. The present tile stays
unless another is faster by more than 2 %.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from itertools import product

import torch

import groundkern as gk
from benchmarks import harness, problems
from groundkern.ops.attention_map import triton_kernels as attention_map
from groundkern.ops.side_attention import triton_kernels as side_attention
from groundkern.tiles import Tile

TABLES = {"side_attention": side_attention.TILES, "attention_map": attention_map.TILES}
GAIN = 0.98  # of the present tile's time
Time = Callable[[Tile], float | None]


def candidates() -> list[Tile]:
    """Tiles worth compiling: whole words of a bit set along the keys."""
    sizes = product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    return [Tile(*size) for size in sizes if size[0] * size[1] <= 8192]


def search(present: Tile, others: list[Tile], time: Time, *, seed: int = 0) -> tuple[Tile, dict]:
    """(the best tile, median seconds of those that were timed to the end).

    Rounds time the whole field once, in random order. After 3, 6, 12 ... of them the slower half
    leaves, by median; the present tile stays in to the end.

    Args:
        time: seconds of one call with a tile; None where the tile is out.
    """
    dice, samples = random.Random(seed), {present: []}
    samples |= {tile: [] for tile in others}
    rounds = 3
    while True:
        for _ in range(rounds):
            field = list(samples)
            dice.shuffle(field)
            for tile in field:
                seconds = time(tile)
                if seconds is None:
                    del samples[tile]
                else:
                    samples[tile].append(seconds)
        if present not in samples:
            raise RuntimeError(f"the present tile {tuple(present)} does not run")
        medians = {tile: statistics.median(x) for tile, x in samples.items()}
        order = sorted(medians, key=medians.__getitem__)
        if len(order) <= 3:
            break
        kept = {present, *order[: max(2, math.ceil(len(order) / 2))]}
        if len(kept) == len(order):
            break
        samples, rounds = {tile: samples[tile] for tile in kept}, 2 * rounds
    best = order[0]
    return (best if medians[best] < GAIN * medians[present] else present), medians


def row_of(table: dict[tuple, Tile], kind: tuple, dim: int) -> tuple:
    """The key of the row that serves a head dimension."""
    return min(
        (key for key in table if key[:-1] == kind and key[-1] >= dim), key=lambda key: key[-1]
    )


def step_of(op: str, model: problems.Model, dtype: torch.dtype, rows: int, keys: int):
    """(the call to time, its kinds of rows with what runs them: "forward" or "full")."""
    device, sizes = torch.device("cuda"), {"shape": "tune", "rows": rows, "keys": keys}
    wide = dtype == torch.float32
    if op == "side_attention":
        call = problems.side_attention(model, dtype, **sizes).make(device)
        kinds = {("forward", wide): "forward", ("dkv", wide): "full", ("dq", wide): "full"}
    else:
        call = problems.attention_map(model, dtype, **sizes).make(device)
        kinds = {key[:-1]: "full" for key in TABLES[op] if key[-2] == wide}
    return call, kinds


def timer_of(table: dict[tuple, Tile], key: tuple, run: Callable, clock: Callable) -> Time:
    """Seconds of `run` with one row of the table replaced; None where results change."""
    present = table[key]
    truth = run()
    checked: set[Tile] = set()

    def time(tile: Tile) -> float | None:
        table[key] = tile
        try:
            if tile not in checked:
                if harness.disagreement(run(), truth, truth[0][0].dtype):
                    return None
                checked.add(tile)
            return clock(run)
        except Exception as error:  # compilers and drivers have errors of their own for each limit
            print(f"  out: {tuple(tile)}: {type(error).__name__}", file=sys.stderr)
            return None
        finally:
            table[key] = present

    return time


def line(key: tuple, best: Tile, present: Tile, medians: dict[Tile, float], device: str) -> str:
    """A row as the table has it, with the reason."""
    now, was = medians[best] * 1e6, medians[present] * 1e6
    reason = f"kept at {was:.1f} us" if best == present else f"{now:.1f} us, {was:.1f} us before"
    return f"    {key}: {best},  # {device}, {date.today()}: {reason}"


def lines(args: argparse.Namespace) -> Iterator[str]:
    device = torch.device("cuda")
    clock, name = harness.cuda_timer(device), torch.cuda.get_device_name(device)
    model = problems.Model(0, args.heads, args.kv_heads, args.dim, 0)
    for op, dtype_name in product(args.op, args.dtype):
        dtype = getattr(torch, dtype_name)
        call, kinds = step_of(op, model, dtype, args.rows, args.keys)
        for kind, mode in kinds.items():
            key = row_of(TABLES[op], kind, args.dim)
            run, _ = harness.runner(call, harness.ours(call, "triton"), mode)
            time = timer_of(TABLES[op], key, run, clock)
            best, medians = search(TABLES[op][key], candidates(), time)
            yield f"{op}, {args.rows} rows, {args.keys} keys, {dtype_name}"
            yield line(key, best, TABLES[op][key], medians, name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("op", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.op) - set(TABLES))
    if unknown:
        parser.error(f"argument op: expected some of {', '.join(TABLES)}, got {unknown[0]!r}")
    if not torch.cuda.is_available() or gk.available_backends()["triton"] is not None:
        print("tuning needs a CUDA device with triton, and there is none here.", file=sys.stderr)
        return 1
    for text in lines(args):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
