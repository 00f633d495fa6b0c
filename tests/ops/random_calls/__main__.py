"""The command: draws calls, checks them, prints a line for each failure and a summary."""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

from tests.ops.random_calls.running import Checked, check, start_worker


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.ops.random_calls", description=__doc__)
    p.add_argument("--calls", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--first", type=int, default=0, help="number of the first call")
    p.add_argument("--only", type=int, help="this call alone, with what was drawn")
    p.add_argument("--op", choices=("side", "map", "contribution", "kl", "loss"))
    p.add_argument("--backend", default="triton")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--twice", type=float, default=0.25, help="share of calls that run twice")
    return p


def _checked(numbers: range, jobs: int, one) -> Iterator[Checked]:
    if jobs == 1:
        start_worker()
        yield from map(one, numbers)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, start_worker) as pool:
        yield from pool.imap_unordered(one, numbers, chunksize=4)


def _describe(seed: int, number: int, op: str | None) -> None:
    from tests.ops.random_calls import drawing, losses

    drawn = losses.draw(seed, number) if op == "loss" else drawing.draw(seed, number, op)
    print(f"{drawn.kind} {drawn.dtype}, trained: {', '.join(drawn.trained)}")
    for name, value in drawn.notes.items():
        print(f"  {name}: {value}")


def _table(done: list[Checked]) -> str:
    groups = {name: Counter() for name in ("op", "dtype", "kind")}
    for x in done:
        for name, counts in groups.items():
            counts[getattr(x, name), "calls"] += 1
            counts[getattr(x, name), "failed"] += bool(x.sentences)
    lines = [f"{'':36} calls  failed"]
    for counts in groups.values():
        for value in sorted({value for value, _ in counts}):
            lines.append(f"{value:36} {counts[value, 'calls']:5}  {counts[value, 'failed']:6}")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a call failed."""
    args = parser().parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are imported
    numbers = range(args.first, args.first + args.calls)
    if args.only is not None:
        numbers = range(args.only, args.only + 1)
        _describe(args.seed, args.only, args.op)
    one = partial(check, seed=args.seed, op=args.op, backend=args.backend, twice=args.twice)
    done: list[Checked] = []
    begun = told = time.perf_counter()
    same = f"--seed {args.seed}" + (f" --op {args.op}" if args.op else "")
    same += "" if args.backend == "triton" else f" --backend {args.backend}"
    for x in _checked(numbers, min(args.jobs, len(numbers)), one):
        done.append(x)
        if x.sentences:
            print(f"FAILED {same} --only {x.number}  {x.kind} {x.dtype}: {'; '.join(x.sentences)}")
        now = time.perf_counter()
        if now - told > 20:
            told, rate = now, len(done) / (now - begun)
            failed = sum(bool(y.sentences) for y in done)
            print(
                f"{len(done)} of {len(numbers)}, {rate:.1f} a second, {failed} failed", flush=True
            )
    print(_table(done))
    slow = sorted(done, key=lambda x: -x.seconds)[:5]
    print("slowest: " + ", ".join(f"{x.number} ({x.seconds:.1f} s)" for x in slow))
    failed = sum(bool(x.sentences) for x in done)
    seconds = time.perf_counter() - begun
    print(f"{len(done)} calls in {seconds:.0f} s, seed {args.seed}: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
