"""What each of two CPU processes holds under every strategy, beside the arithmetic: `python -m
benchmarks.ranks.memory`.

Weights, gradients and optimizer states are counted from their tensors, in rank 0; `peak` is how far
its resident set rose above what it was before there was a model, in the second step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.ranks.arithmetic import States, states
from benchmarks.ranks.launching import launcher
from benchmarks.timing.machine import stamp
from benchmarks.timing.memory import ALLOCATOR
from benchmarks.training_step.kept import PRECISIONS, adapter_parameters
from benchmarks.training_step.model import SHAPES
from groundkern.trainer.config import Lora

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
CASES = (
    ("ddp", "full"),
    ("fsdp2", "full"),
    ("zero3", "full"),
    ("ddp", "lora"),
    ("fsdp2", "lora"),
    ("zero3", "lora"),
)
COUNTED = ("weights", "gradients", "optimizer")
FIELDS = ("strategy", "how", *COUNTED, "peak", *(f"{x}_by_arithmetic" for x in COUNTED))


def words(strategy: str, module: str) -> list[str]:
    """The command that starts a module as two CPU processes.

    Args:
        strategy: ddp, fsdp2 or zero3.
        module: to run.
    """
    return [*launcher(strategy, RANKS), module]


def measured(strategy: str, how: str, shape: str, tokens: int, limit: float) -> dict[str, int]:
    """Bytes that rank 0 held.

    Args:
        strategy: ddp, fsdp2 or zero3.
        how: full, lora or checkpointed.
        shape: of `SHAPES`.
        tokens: of the sample of each process.
        limit: seconds.

    Raises:
        RuntimeError: the processes failed, or took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [*words(strategy, "benchmarks.ranks.holding"), folder, shape, str(tokens), how]
        environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **ALLOCATOR}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # accelerate launch ends the ranks
            said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{strategy} {how}: status {process.returncode}\n{said[-3000:]}")
        return json.loads((Path(folder) / "held.json").read_text())


def counted(strategy: str, how: str, shape: str) -> States:
    """The arithmetic of the same case.

    Args:
        strategy: ddp, fsdp2 or zero3.
        how: full, lora or checkpointed.
        shape: of `SHAPES`.
    """
    adapters = adapter_parameters(SHAPES[shape], Lora().r) if how == "lora" else None
    precision = PRECISIONS["float32"]
    return states(SHAPES[shape], precision, strategy, ranks=RANKS, adapters=adapters)


def table(rows: list[dict]) -> list[str]:
    """Markdown: MB by case, measured and by arithmetic.

    Args:
        rows: as `main` writes them.
    """
    lines = [
        "| | weights | gradients | optimizer | peak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{int(row[x]) / 1e6:.1f} ({float(row[f'{x}_by_arithmetic']) / 1e6:.1f})"
            for x in COUNTED
        ]
        peak = f"{int(row['peak']) / 1e6:.0f}"
        lines.append(f"| {row['strategy']}, {row['how']} | {' | '.join(cells)} | {peak} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks.memory")
    parser.add_argument("--shape", default="large", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=256, help="of the sample of each process")
    parser.add_argument("--limit", type=float, default=1200, help="seconds of a case")
    parser.add_argument("--case", nargs="+", default=[], help="such as fsdp2:lora; default: all")
    parser.add_argument("--output", type=Path, help="CSV file")
    arguments = parser.parse_args()
    chosen = [tuple(case.split(":")) for case in arguments.case] or CASES
    rows = []
    for strategy, how in chosen:
        held = measured(strategy, how, arguments.shape, arguments.tokens, arguments.limit)
        expected = counted(strategy, how, arguments.shape)._asdict()
        row = {"strategy": strategy, "how": how, "peak": held["peak"]}
        row |= {name: held[name] for name in COUNTED}
        row |= {f"{name}_by_arithmetic": round(expected[name]) for name in COUNTED}
        print(json.dumps(row), flush=True)
        rows.append(row)
        if arguments.output is not None:  # as far as it got
            extra = {"shape": arguments.shape, "tokens": arguments.tokens}
            extra |= stamp(torch.device("cpu"))
            with arguments.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, (*FIELDS, *extra))
                writer.writeheader()
                writer.writerows({**row, **extra} for row in rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
