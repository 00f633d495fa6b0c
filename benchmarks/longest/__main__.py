"""python -m benchmarks longest: the longest sample that one device trains on.

Measures the highest moment of a step of a small Qwen2.5-VL on CPU beside what is counted
(`--measure`), and prints what is counted for real models on real cards.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks.longest import growing, hours, measuring, memory, reaching, table
from benchmarks.longest.reaching import GB
from benchmarks.longest.setting import METHODS, SMALL, Setting
from benchmarks.timing import machine, results
from benchmarks.timing.results import Row

TOKENS = (2048, 4096, 8192, 16384, 32768)
OFF = 0.1  # how far what is counted may be from what is measured


def measure(tokens: list[int], methods: list[str], limit: float, csv: Path | None) -> list[Row]:
    """Rows of the small model: what is counted and what was measured.

    Args:
        tokens: of the samples.
        methods: of METHODS.
        limit: bytes that a step may have; one that is counted higher is not tried.
        csv: where to write the rows, after each.
    """
    stamp = machine.stamp(torch.device("cpu"))
    rows: list[Row] = []
    for length in tokens:
        for method in methods:
            for checkpointed in (False, True):
                setting = Setting(SMALL, method, length, checkpointed=checkpointed)
                row = one(setting, limit)
                print(table.line(row), flush=True)
                rows.append({**row, **stamp})
                if csv is not None:
                    results.write(csv, rows)
    return rows


def one(setting: Setting, limit: float) -> Row:
    """One row.

    Args:
        setting: the step.
        limit: bytes that it may have.
    """
    moment, parts = memory.peak(setting)
    counted = sum(parts.values())
    row: Row = {"method": setting.method, "tokens": setting.tokens}
    row |= {"checkpointed": setting.checkpointed, "moment": moment, "counted": round(counted)}
    row |= {"measured": None, "ratio": None, "status": "ok"}
    if counted > limit:
        return {**row, "status": f"not tried: above {limit / GB:.1f} GB"}
    measured = measuring.bounded(setting, int(limit))
    if measured is None:
        return {**row, "status": f"out of memory at {limit / GB:.1f} GB"}
    return {**row, "measured": measured, "ratio": round(counted / measured, 4)}


def wrong(rows: list[Row]) -> list[str]:
    """One sentence for each row whose count is too far off, or that ran out of memory.

    Args:
        rows: of `measure`.
    """
    said = []
    for row in rows:
        name = f"{row['method']}, {row['tokens']} tokens"
        if row["ratio"] is not None and abs(float(row["ratio"]) - 1) > OFF:
            said.append(f"{name}: counted {row['counted']} bytes, measured {row['measured']}")
        elif str(row["status"]).startswith("out of memory"):
            said.append(f"{name}: counted {row['counted']} bytes, but it ran out of memory")
    return said


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks longest", description=__doc__)
    p.add_argument("--measure", action="store_true", help="on this CPU, beside what is counted")
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="of --measure")
    p.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    p.add_argument("--limit-gb", type=float, default=6.0, help="that a measured step may have")
    p.add_argument("--csv", type=Path, help="of what is measured")
    p.add_argument("--shape", nargs="+", default=list(reaching.SHAPES_OF_TABLE))
    return p


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a count is more than a tenth away from what was measured."""
    settings = parser().parse_args(arguments)
    if settings.measure:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        limit = settings.limit_gb * GB
        rows = measure(settings.tokens, settings.method, limit, settings.csv)
        print("\n".join(table.measured(rows)))
        for sentence in (said := wrong(rows)):
            print(sentence)
        return 1 if said else 0
    for name in settings.shape:
        print("\n".join(reaching.table(name)), end="\n\n")
    print("\n".join(reaching.components_table()), end="\n\n")
    print("\n".join(growing.table()), end="\n\n")
    print("\n".join(hours.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
