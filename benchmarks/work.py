"""`python -m benchmarks.work`: FLOPs and bytes of every op at the shapes of real models.

Computed from sizes (costs/), not measured. With --bandwidth and --rate, the ceilings of a device in
TB/s and TFLOP/s, also the least microseconds and what bounds them.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks import problems
from benchmarks.costs import floors
from benchmarks.costs.cross_entropy_engine import Head, extra_bytes, moved_bytes

ROWS, KEYS = (1, 8, 64, 256), (4096, 32_768, 131_072)
LOSS_ROWS = (137, 512, 1024, 16_384)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Line:
    """The least work of one call.

    engine, extra: bytes that our Triton loss moves and holds; None for other ops.
    """

    shape: str
    call: str
    mode: floors.Mode
    floor: floors.Floor
    engine: int | None = None
    extra: int | None = None


def attention(shape: str) -> Iterator[Line]:
    """Side attention and KLAL's KL, one layer."""
    model = problems.MODELS[shape]
    for keys, rows in product(KEYS, ROWS):
        sizes = {"shape": shape, "keys": keys, "rows": rows}
        some = {
            "side_attention": problems.side_attention(model, DTYPE, **sizes),
            "attention_kl visible": problems.attention_map(model, DTYPE, over="visible", **sizes),
            "attention_kl columns": problems.attention_map(model, DTYPE, over="columns", **sizes),
        }
        for (name, problem), mode in product(some.items(), ("forward", "full")):
            yield Line(shape, f"{name} S{keys} N{rows}", mode, problem.floor(mode))


def loss(shape: str) -> Iterator[Line]:
    """Linear cross entropy, forward and backward."""
    model = problems.MODELS[shape]
    for rows, trained in product(LOSS_ROWS, (False, True)):
        problem = problems.linear_cross_entropy(
            model, DTYPE, shape=shape, rows=rows, trained=trained
        )
        head = Head(rows, model.hidden, model.vocabulary, DTYPE.itemsize, trained)
        name = f"linear_cross_entropy {'trained' if trained else 'frozen'} N{rows}"
        yield Line(shape, name, "full", problem.floor("full"), moved_bytes(head), extra_bytes(head))


def text(line: Line, bandwidth: float | None, rate: float | None) -> str:
    """One row of the table; bandwidth in TB/s, rate in TFLOP/s."""
    floor = line.floor
    numbers = f"{floor.flops / 1e9:12.3f}{floor.bytes / 1e6:12.2f}{floor.flops / floor.bytes:9.1f}"
    if line.engine is not None:
        numbers += f"{line.engine / 1e6:12.1f}{line.extra / 1e6:12.1f}"
    elif bandwidth and rate:
        numbers += " " * 24
    if bandwidth and rate:
        memory, matrix = floor.bytes / bandwidth / 1e6, floor.flops / rate / 1e6
        bound = "memory" if memory >= matrix else "matrix"
        numbers += f"{max(memory, matrix):12.1f}  {bound}"
    return f"{line.shape:16}{line.call:40}{line.mode:9}{numbers}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.work", description=__doc__)
    parser.add_argument(
        "--shape", nargs="+", default=list(problems.MODELS), choices=problems.MODELS
    )
    parser.add_argument("--bandwidth", type=float, help="of a device, TB/s")
    parser.add_argument("--rate", type=float, help="of its bf16 matrix products, TFLOP/s")
    args = parser.parse_args(arguments)
    if (args.bandwidth is None) != (args.rate is None):
        parser.error("--bandwidth and --rate come together")
    head = f"{'shape':16}{'call (bf16)':40}{'mode':9}{'GFLOP':>12}{'MB':>12}{'FLOP/B':>9}"
    head += f"{'engine MB':>12}{'extra MB':>12}" + (f"{'us':>12}" if args.rate else "")
    print(head)
    for shape in args.shape:
        for line in (*attention(shape), *loss(shape)):
            print(text(line, args.bandwidth, args.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
