"""`python -m tests.fuzz`: mutated inputs against everything that parses; exit 1 on a failure.

Every input has a number: `--target NAME --seed S --only N` runs one again. A failing input is made
smaller and written to the corpus folder, which pytest replays.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import sys
import time
from pathlib import Path

from tests.fuzz.minimising import minimise
from tests.fuzz.running import (
    CORPUS,
    MEGABYTES,
    Failure,
    Tally,
    attempt,
    corpus,
    drawn,
    limit_memory,
    peak,
)
from tests.fuzz.target import Target
from tests.fuzz.targets import targets

TOLD = 20.0  # seconds between lines of progress
ROUND = 1  # inputs of one target before the next one's


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    p.add_argument("--target", action="append", help="by name; may be repeated; default: all")
    p.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    p.add_argument("--minutes", type=float, help="end then, whatever is left")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="this input of one target alone")
    p.add_argument("--corpus", type=Path, default=CORPUS, help="where failing inputs are written")
    p.add_argument("--guided", action="store_true", help="one target by coverage, with atheris")
    p.add_argument("--list", action="store_true", help="the targets and their seeds")
    return p


def main(words: list[str] | None = None) -> int:
    """Returns 1 if an input failed, 2 for a target that is not there."""
    args = parser().parse_args(words)
    known = targets()
    names = args.target or list(known)
    if missing := [name for name in names if name not in known]:
        print(f"no target {missing[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in names]
    if args.list:
        for target in chosen:
            print(f"{target.name:20} {', '.join(target.seeds)}")
        return 0
    if args.guided:
        from tests.fuzz.guided import run_guided

        return run_guided(chosen[0], args.inputs, args.seed, args.corpus)
    if args.only is not None:
        data = drawn(chosen[0], args.seed, args.only)
        result = attempt(chosen[0], data)
        print(f"{data!r}\n{result}")
        return int(isinstance(result, Failure))
    return _run(chosen, args)


def _run(chosen: list[Target], args: argparse.Namespace) -> int:
    begun = told = time.monotonic()
    deadline = begun + 60 * args.minutes if args.minutes else float("inf")
    tallies = {target.name: Tally() for target in chosen}
    for target in chosen:
        for _, data in corpus(target):
            _one(target, data, tallies[target.name])
    whole = sum(target.share for target in chosen)
    left = {target.name: round(args.inputs * target.share / whole) for target in chosen}
    done = dict.fromkeys(left, 0)
    total = sum(left.values())
    while any(left.values()) and time.monotonic() < deadline:
        for target in chosen:
            size = min(left[target.name], max(1, round(ROUND * target.share)))
            least = peak()
            for _ in range(size):
                data = drawn(target, args.seed, done[target.name])
                done[target.name] += 1
                _one(target, data, tallies[target.name])
            left[target.name] -= size
            if peak() - least > MEGABYTES:
                what = f"{peak() - least:.0f} MB for inputs up to --only {done[target.name] - 1}"
                tallies[target.name].add(Failure(what, "too large", data))
                print(f"FAILED {target.name}: {what}", flush=True)
        now = time.monotonic()
        if now - told > TOLD:
            told, count = now, sum(done.values())
            rate = count / (now - begun)
            failed = sum(tally.counts.total() for tally in tallies.values())
            print(f"{count:,} of {total:,}, {rate:,.0f} a second, {failed:,} failed", flush=True)
    print(table(tallies))
    count, seconds = sum(tally.inputs for tally in tallies.values()), time.monotonic() - begun
    failed = sum(tally.counts.total() for tally in tallies.values())
    rate = count / max(seconds, 1e-9)
    print(
        f"{count:,} inputs in {seconds:,.0f} s ({rate:,.0f} a second), seed {args.seed}: "
        f"{failed:,} failed"
    )
    for target in chosen:
        for failure in tallies[target.name].failures.values():
            _write(minimise(target, failure), target, args.corpus)
    return int(failed > 0)


def _one(target: Target, data: bytes, tally: Tally) -> None:
    begun = time.monotonic()
    result = attempt(target, data, measured=False)
    tally.seconds += time.monotonic() - begun
    if tally.add(result):
        print(f"FAILED {target.name}: {result.what}", flush=True)


def _write(failure: Failure, target: Target, folder: Path) -> None:
    """Keeps a failing input under a name made of what it does."""
    words = re.sub(r"[^A-Za-z]+", "-", failure.signature).strip("-").lower()[:60]
    digest = hashlib.sha256(failure.data).hexdigest()[:6]
    path = folder / target.name / f"new-{words}-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(failure.data)
    print(f"{target.name}: {failure.what}\n    {failure.data[:200]!r} -> {path.name}")


def table(tallies: dict[str, Tally]) -> str:
    """Targets with their inputs, how many were taken and how many failed."""
    lines = [f"{'target':20} {'inputs':>10} {'taken':>10} {'failed':>8} {'a second':>10}"]
    for name, t in tallies.items():
        rate = t.inputs / max(t.seconds, 1e-9)
        lines.append(f"{name:20} {t.inputs:10,} {t.taken:10,} {t.counts.total():8,} {rate:10,.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable()  # what is passed over is told as often as it is
    limit_memory()
    sys.exit(main())
