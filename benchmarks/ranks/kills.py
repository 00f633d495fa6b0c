"""`python -m benchmarks.ranks.kills`: a rank of `groundkern train` is killed, and then?

kill -9 of the first and of another rank at each moment: how long until no process is left, what is
printed, and what becomes of the run when it is continued on 1, 2 and 4 processes with as many
samples to a step. Exit status 1 unless every continued run is whole: with the same bits on the same
number of processes, within 1e-5 on another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from benchmarks.ranks.cases import STRATEGIES
from benchmarks.ranks.dying import MOMENTS
from benchmarks.ranks.killing import Ended, continued, judged, make_data, newest_whole, trained
from benchmarks.ranks.launching import end_on_sigterm
from benchmarks.ranks.table import TOLERANCE, lines_of, made_with, write_csv

RANKS = 2  # of the run that is killed
COLUMNS = (
    *("strategy", "killed rank", "moment", "gone after", "newest whole", "continued on"),
    *("outcome", "difference", "said"),
)


def main(words: list[str] | None = None) -> int:
    """Print a line for each continued run; write the files that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks.kills", description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["ddp"])
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--killed", nargs="+", choices=("0", "1"), default=["0", "1"])
    parser.add_argument("--continue-on", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2, 4])
    turn = "continue a killed run on one of these alone, the next on the next"
    parser.add_argument("--in-turn", action="store_true", help=turn)
    parser.add_argument("--minutes", type=float, default=60, help="after these nothing is begun")
    parser.add_argument("--csv", type=Path, help="file for every figure")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs and what they print")
    options = parser.parse_args(words)
    end_on_sigterm()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: expected a new folder, got {options.keep}, which is there")
    with tempfile.TemporaryDirectory(prefix="kills-") as made:
        where = options.keep or Path(made)
        rows = []
        for row in _rows(options, where):
            print("  ".join(row), flush=True)
            rows.append(row)
    bad = [row for row in rows if row[6] != "whole"]
    print(f"{len(rows)} continued runs, {len(rows) - len(bad)} whole")
    command = " ".join(["python -m benchmarks.ranks.kills", *(words or sys.argv[1:])])
    if options.csv is not None:
        write_csv(options.csv, COLUMNS, rows)
    if options.markdown is not None:
        lines = ["# A rank is killed", "", made_with(command), "", *lines_of(COLUMNS, rows)]
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(bool(bad))


def _rows(options: argparse.Namespace, where: Path) -> Iterator[tuple[str, ...]]:
    until = time.monotonic() + 60 * options.minutes
    data = where / "data"
    make_data(data)
    every = options.continue_on
    turns = cycle([[ranks] for ranks in every] if options.in_turn else [every])
    for strategy in options.strategies:
        whole = where / f"{strategy}-whole"
        ended = trained(strategy, RANKS, data, whole)
        if ended.status != 0:
            yield (strategy, "nobody", "", "", "", str(RANKS), _fault(ended), "", ended.said)
            continue
        for moment in options.moments:
            for victim in options.killed:
                if time.monotonic() > until:
                    yield (strategy, victim, MOMENTS[moment], "", "", "", "not begun", "", "")
                    continue
                yield from _killed(strategy, victim, moment, data, whole, next(turns))


def _killed(
    strategy: str, victim: str, moment: str, data: Path, whole: Path, continue_on: list[int]
) -> Iterator[tuple[str, ...]]:
    """One kill, and a row for each number of processes on which it is continued."""
    output = whole.with_name(f"{strategy}-{moment}-{victim}")
    died = trained(strategy, RANKS, data, output, victim=victim, moment=moment)
    if died.seconds is None:
        outcome = "hangs" if died.status is None else f"nobody died, status {died.status}"
        yield (strategy, victim, MOMENTS[moment], "", "", "", outcome, "", died.said)
        return
    newest = newest_whole(output)
    begun = (strategy, victim, MOMENTS[moment], f"{died.seconds:.1f} s")
    begun += ("none" if newest is None else newest.name,)
    for ranks in continue_on:
        ended, folder = continued(strategy, ranks, RANKS, data, output)
        if ended.status != 0:
            yield (*begun, str(ranks), _fault(ended), "", ended.said)
            continue
        outcome, apart = judged(folder, whole, exactly=ranks == RANKS)
        allowed = 0 if ranks == RANKS else TOLERANCE
        if outcome == "whole" and not apart <= allowed:
            outcome = "differs"
        yield (*begun, str(ranks), outcome, f"{apart:.1e}", died.said)


def _fault(ended: Ended) -> str:
    return "hangs" if ended.status is None else f"exit status {ended.status}"


if __name__ == "__main__":
    sys.exit(main())
