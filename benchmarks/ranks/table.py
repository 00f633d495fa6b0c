"""What was found for each case, as a table for people and as a file for programs."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import accelerate
import torch
import transformers
from torch import Tensor

from benchmarks.ranks.cases import SHARES, Case
from benchmarks.timing.commit import commit

WIDTH = 100  # of a line of text
SHORT = 160  # characters of a reason in the table
TOLERANCE = 1e-5
COLUMNS = (
    *("optimizer", "strategy", "ranks", "batch", "model", "share", "status"),
    *("losses", "weights", "update", "worst_loss", "worst_weight", "reason"),
)


class Row(NamedTuple):
    """One case.

    Args:
        case: what ran.
        status: "equal", "differs", "refused" or "failed".
        losses: the largest difference of a logged figure, relative to its largest of all steps.
        weights: of a weight after the last step, relative to the largest of its tensor.
        update: of all weights' changes in training, as one vector: the norm of the difference over
            the norm.
        worst_loss, worst_weight: their names.
        reason: why it was refused or failed.
    """

    case: Case
    status: str
    losses: float | None = None
    weights: float | None = None
    update: float | None = None
    worst_loss: str = ""
    worst_weight: str = ""
    reason: str = ""

    def cells(self) -> list[str]:
        """In the order of COLUMNS."""
        case = self.case
        batch, model = "packed" if case.packed else "padded", "LoRA" if case.lora else "full"
        model += ", checkpointed" if case.checkpointed else ""
        model += ", Ulysses" if case.ulysses else ""
        ranks = f"{case.readers} x {case.context}" if case.context > 1 else str(case.ranks)
        numbers = ["" if x is None else f"{x:.1e}" for x in self[2:5]]
        return [
            *(case.optimizer, case.strategy or "one process", ranks, batch, model),
            *(SHARES[case.share], self.status, *numbers),
            *(self.worst_loss, self.worst_weight, self.reason),
        ]


def compared(case: Case, found: dict, alone: dict) -> Row:
    """What several processes made of a case beside what one process did.

    Args:
        case: what ran.
        found, alone: logs and weights, as `steps.trained` returns them.
    """
    steps = list(zip(_figures(found["log"]), _figures(alone["log"]), strict=True))
    names = set.intersection(*(set(x) & set(y) for x, y in steps))
    missing = {name for x, y in steps for name in set(x) ^ set(y)}
    missing |= found["weights"].keys() ^ alone["weights"].keys()
    if missing:
        return Row(case, "failed", reason=f"only one of both has {', '.join(sorted(missing)[:5])}")
    losses = {name: relative(*_both(steps, name)) for name in names}
    weights = {name: relative(found["weights"][name], x) for name, x in alone["weights"].items()}
    loss, weight = max(losses, key=losses.get), max(weights, key=weights.get)
    same = losses[loss] <= TOLERANCE and weights[weight] <= TOLERANCE
    status = "equal" if same else "differs"
    update = _update(found["weights"], alone["weights"], alone["begun"])
    return Row(case, status, losses[loss], weights[weight], update, loss, weight)


def _figures(log: Sequence[dict]) -> list[dict]:
    """What each step logged of its losses and gradient."""
    left_out = ("epoch", "step", "learning_rate")
    return [{k: x for k, x in row.items() if k not in left_out} for row in log if "loss" in row]


def _both(steps: Sequence[tuple[dict, dict]], name: str) -> tuple[Tensor, Tensor]:
    """A figure of all steps, of the one run and of the other."""
    found = [[math.nan if each[name] is None else each[name] for each in step] for step in steps]
    return torch.tensor(found, dtype=torch.float64).unbind(1)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number wanted; infinite if one is NaN.

    Args:
        found, wanted: of one shape.
    """
    largest = wanted.double().abs().max().clamp(min=1e-30)
    apart = float((found.double() - wanted.double()).abs().max() / largest)
    return math.inf if math.isnan(apart) else apart


def _update(found: dict, wanted: dict, begun: dict) -> float:
    names = [name for name in wanted if wanted[name].is_floating_point()]
    apart = sum(float((found[k].double() - wanted[k].double()).square().sum()) for k in names)
    moved = sum(float((wanted[k].double() - begun[k].double()).square().sum()) for k in names)
    return (apart / max(moved, 1e-60)) ** 0.5


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Every cell in full.

    Args:
        path: the file.
        columns: the first row.
        rows: the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def made_with(command: str) -> str:
    """The lines of a page that say how it was made.

    Args:
        command: what made it.
    """
    today = datetime.now(timezone.utc).date().isoformat()
    return fill(
        f"{today}, commit {commit()}, transformers {transformers.__version__}, accelerate "
        f"{accelerate.__version__}, torch {torch.__version__}, {platform.machine()} with "
        f"{os.cpu_count()} cores; `{command}`.",
        WIDTH,
    )


def lines_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table.

    Args:
        columns: its head.
        rows: its cells.
    """
    body = ["| " + " | ".join(_short(cell) for cell in row) + " |" for row in rows]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *body]


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= SHORT else text[: SHORT - 3] + "..."
