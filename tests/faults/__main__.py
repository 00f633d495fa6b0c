"""`python -m tests.faults`: walk every point of saving, rotating, recording and reporting."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from groundkern.trainer.progress import progress
from tests.faults import plan, power, shim
from tests.faults.client import Server
from tests.faults.scenarios import scenarios
from tests.faults.walk import Results, Walk

MEMORY = Path("/dev/shm")


def main(words: list[str] | None = None) -> int:
    """Walk, print a table, and return 1 if a point did not survive."""
    arguments = _parser().parse_args(words)
    if reason := shim.reason_not_to():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    results, started = Results(), time.monotonic()
    where = str(MEMORY) if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder, Server(Path(folder).resolve()) as server:
        chosen = scenarios(server)
        for name in arguments.scenario or chosen:
            _walk(Walk(server, chosen[name], results), arguments)
    print(table(results))
    tried, failed = sum(results.tried.values()), sum(results.failed.values())
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{tried} faults tried, {tried - failed} survived, {failed} not; "
        f"{results.states} different folders started from, {results.continued} of them "
        f"different once tidied; {minutes:.1f} minutes"
    )
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    kinds = (*plan.KINDS, *power.KINDS)
    parser.add_argument("--scenario", action="append", help="only this one; can be repeated")
    parser.add_argument("--kind", action="append", choices=kinds, help="only this fault")
    parser.add_argument("--point", type=int, help="only the call of this number")
    parser.add_argument("--phase", help="only phases with this in their name")
    parser.add_argument("--every", type=int, default=1, help="one of this many faults")
    parser.add_argument("--seed", type=int, default=0, help="which of them, and what is random")
    return parser


def _walk(walk: Walk, arguments: argparse.Namespace) -> None:
    seed, at = arguments.seed, None if arguments.point is None else {arguments.point}
    start = random.Random(seed).randrange(arguments.every)
    count = -1

    def chosen(number: int, kind: str, part: str) -> bool:
        nonlocal count
        if arguments.point not in (None, number) or kind not in (arguments.kind or [kind]):
            return False
        if (arguments.phase or "") not in part:
            return False
        count += 1
        return count % arguments.every == start

    for title, faults, run in (
        ("faults", walk.points(), walk.faults),
        ("power failures", walk.power_points(seed, at), walk.power_failures),
    ):
        count = -1
        picked = [fault for fault in faults if chosen(*fault)]
        count = -1
        with progress(f"{walk.name}: {title}", total=len(picked), unit="fault") as bar:
            run(set(picked).__contains__, _telling(bar, walk.results, arguments.point is not None))


def _telling(bar, results: Results, printing: bool) -> Callable[[], None]:
    told = len(results.failures)

    def tell() -> None:
        nonlocal told
        for failure in results.failures[told:]:
            bar.write(f"FAILED {failure}")
            if printing:
                bar.write(failure.printed)
        told = len(results.failures)
        bar.set_postfix(failed=told, refresh=False)
        bar.update()

    return tell


def table(results: Results) -> str:
    """Phase by kind: tried, and after a slash how many of them did not survive."""
    kinds = [k for k in (*plan.KINDS, *power.KINDS) if any(at[1] == k for at in results.tried)]
    parts = list(dict.fromkeys(part for part, _ in results.tried))
    width = max(map(len, parts), default=0)
    lines = [" " * width + "".join(f"{k.removeprefix('power: '):>13}" for k in kinds)]
    for part in parts:
        cells = [_cell(results, (part, kind)) for kind in kinds]
        lines.append(f"{part:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _cell(results: Results, at: tuple[str, str]) -> str:
    tried, failed = results.tried[at], results.failed[at]
    return f"{tried}/{failed}" if failed else str(tried or "")


if __name__ == "__main__":
    sys.exit(main())
