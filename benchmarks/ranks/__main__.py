"""`python -m benchmarks.ranks`: several processes on CPU against one.

Steps of GroundingTrainer with every method on a tiny Qwen2.5-VL in fp32, by accelerate launch: each
strategy, number of processes, kind of batch, model and share of the samples. Exit status 1 if a
case of plain SGD differs from one process by more than 1e-5, fails or is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.ranks.cases import OPTIMIZERS, RANKS, STRATEGIES, Case, cases, context_cases
from benchmarks.ranks.launching import end_on_sigterm, launcher, started, told
from benchmarks.ranks.table import COLUMNS, TOLERANCE, Row, compared, lines_of, made_with, write_csv


def main(words: list[str] | None = None) -> int:
    """Print a line for each case and the counts; write the files that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["sgd"])
    parser.add_argument("--only", default="", help="cases whose keys hold this, such as packed")
    shared = "cases of context parallelism: processes that share each sequence, 20 steps"
    parser.add_argument("--context", action="store_true", help=shared)
    parser.add_argument("--minutes", type=float, default=60, help="after these no case is begun")
    silence = "seconds without a result after which a case counts as hanging"
    parser.add_argument("--silence", type=float, default=180, help=silence)
    parser.add_argument("--csv", type=Path, help="file for every figure and reason")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--keep", type=Path, help="folder for what the processes print")
    options = parser.parse_args(words)
    end_on_sigterm()
    make = context_cases if options.context else cases
    wanted = make(tuple(options.strategies), tuple(options.ranks), tuple(options.optimizers))
    wanted = [case for case in wanted if options.only in case.key]
    if not wanted:
        parser.error(f"--only: expected a part of a case's key, got {options.only!r}")
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="ranks-") as made:
        folder = options.keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(_rows(wanted, folder, until, options.silence))
    print(_counted(rows))
    command = " ".join(["python -m benchmarks.ranks", *(words or sys.argv[1:])])
    if options.csv is not None:
        write_csv(options.csv, COLUMNS, [row.cells() for row in rows])
    if options.markdown is not None:
        options.markdown.write_text(_page(rows, command), encoding="utf-8")
    return int(any(row.case.optimizer == "sgd" and row.status != "equal" for row in rows))


def _rows(wanted: list[Case], folder: Path, until: float, silence: float) -> Iterator[Row]:
    """Each case's row, printed as it comes."""
    alone = list(dict.fromkeys(case.alone for case in wanted))
    print(f"{len(alone)} runs of one process, then {len(wanted)} cases", flush=True)
    alone, number = dict(_ran(alone, folder, until, silence)), 0
    for _, group in groupby(wanted, key=lambda case: (case.optimizer, case.strategy, case.ranks)):
        for case, found in _ran(list(group), folder, until, silence):
            number += 1
            row = _row(case, found, alone[case.alone])
            cells = [cell for cell in row.cells() if cell]
            print(f"{number}/{len(wanted)}  {'  '.join(cells)}", flush=True)
            yield row


def _row(case: Case, found: dict, alone: dict) -> Row:
    if "weights" not in alone:
        return Row(case, "failed", reason=f"one process: {alone['error']}")
    if "weights" not in found:
        return Row(case, found["kind"], reason=found["error"])
    return compared(case, found, alone)


def _ran(
    left: list[Case], folder: Path, until: float, silence: float
) -> Iterator[tuple[Case, dict]]:
    """Cases of one launcher and what became of them; launched anew after one that broke off."""
    for case in left:
        for path in folder.glob(f"{case.key}.*"):
            path.unlink()
    while left:
        if time.monotonic() > until:
            for case in left:
                yield case, {"kind": "failed", "error": "not begun: out of time (--minutes)"}
            return
        output, first = folder / f"{left[0].key}.log", left[0]
        words = launcher(left[0].strategy, left[0].ranks)
        words += ["benchmarks.ranks.steps", str(folder), *(case.key for case in left)]
        with started(words, folder, output) as process:
            seen = time.monotonic()
            while left:
                ended = process.poll() is not None
                found = _outcome(left[0], folder)
                if found is None and not ended and time.monotonic() - seen < silence:
                    time.sleep(0.1)
                    continue
                if found is None:
                    break
                seen = time.monotonic()
                yield left.pop(0), found
        if left and (left[0] == first or (folder / f"{left[0].key}.begun").exists()):
            silent = f"no result for {silence:g} s: it hangs. "
            error = ("" if ended else silent) + told(output)
            found = _outcome(left[0], folder) or {"kind": "failed", "error": error}
            yield left.pop(0), found


def _outcome(case: Case, folder: Path) -> dict | None:
    """A case's result or the error of its lowest rank that has one; None: not there yet."""
    if (path := folder / f"{case.key}.pt").exists():
        return torch.load(path)
    for path in sorted(folder.glob(f"{case.key}.*.json")):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _counted(rows: list[Row]) -> str:
    kinds = ("equal", "differs", "refused", "failed")
    counts = ", ".join(f"{sum(row.status == kind for row in rows)} {kind}" for kind in kinds)
    return f"{len(rows)} cases: {counts} (tolerance {TOLERANCE:g})"


def _page(rows: list[Row], command: str) -> str:
    """The tables for people, one to an optimizer."""
    lines = ["# Several processes against one", "", made_with(command)]
    for optimizer, group in groupby(rows, key=lambda row: row.case.optimizer):
        group = list(group)
        lines += ["", f"## {optimizer}", "", f"{_counted(group)}.", ""]
        lines += lines_of(COLUMNS[1:], [row.cells()[1:] for row in group])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
