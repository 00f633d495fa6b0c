"""The table of all vision-language types of transformers: what was found on each, as files."""

from __future__ import annotations

import csv
import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import torch
import transformers

from benchmarks.timing.commit import commit
from groundkern.hf import Examination
from groundkern.hf.examination import OBJECTIVES, OK

COLUMNS = (
    "model_type",
    "build",
    "geometry",
    "collator",
    "attach",
    "doctor",
    *OBJECTIVES,
    "packing",
)
WIDTH = 100  # of a line of text
SHORT = 110  # characters of a reason in the table


class Row(NamedTuple):
    """One type.

    Args:
        name: its `model_type`.
        build: "ok", or why no tiny model was made.
        geometry: "table", "measured" or why there is none.
        found: of `examine`.
    """

    name: str
    build: str
    geometry: str
    found: Examination

    def cells(self) -> list[str]:
        """In the order of COLUMNS: "ok", the reason, or nothing for a step that was not reached."""
        found = self.found
        tried = [found.objectives.get(name, "") for name in OBJECTIVES]
        steps = [found.collator, found.attach, found.doctor, *tried, found.packing]
        return [self.name, self.build, self.geometry, *steps]


def counted(rows: Iterable[Row]) -> str:
    """How many types there are, and how many can do what."""
    rows = list(rows)
    attached = sum(row.found.attach == OK for row in rows)
    passed = sum(row.found.doctor == OK for row in rows)
    trainable = sum(row.found.trainable for row in rows)
    each = ", ".join(
        f"{name} {sum(row.found.objectives.get(name) == OK for row in rows)}" for name in OBJECTIVES
    )
    packed = sum(row.found.trainable and row.found.packing == OK for row in rows)
    return (
        f"{len(rows)} types: {attached} can be attached, {passed} pass the doctor, {trainable} "
        f"are trainable with images ({each}), {packed} of them in packed rows"
    )


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Every reason in full."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)


def made_with(command: str) -> str:
    """The lines of a file that say how it was made."""
    today = datetime.now(timezone.utc).date().isoformat()
    return fill(
        f"{today}, commit {commit()}, transformers {transformers.__version__}, torch "
        f"{torch.__version__}, {platform.machine()}; `{command}`.",
        WIDTH,
    )


def markdown(rows: Iterable[Row], command: str) -> str:
    """The table for people, what works first: a mark to a step, and the first reason of a "no"."""
    rows = sorted(rows, key=lambda row: (-row.cells().count(OK), row.name))
    lines = [
        "# Every vision-language type of transformers",
        "",
        made_with(command),
        "Tiny random models of the real classes with their real processors; a step of every "
        "objective is run",
        "forwards and backwards. Empty: not reached.",
        "",
        fill(f"{counted(rows)}.", WIDTH),
        "",
        f"| {' | '.join((COLUMNS[0], *COLUMNS[2:]))} | why not |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for row in rows:
        name, build, geometry, *steps = row.cells()
        placed = geometry in ("table", "measured")
        marks = ["yes" if cell == OK else "no" if cell else "" for cell in steps]
        reasons = [build, *steps] if placed else [build, geometry, *steps]
        why = next((_short(cell) for cell in reasons if cell not in (OK, "")), "")
        cells = [f"`{name}`", geometry if placed else "none" if build == OK else "", *marks, why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    """A reason without what is the same in all of them: what was got of what, at most SHORT."""
    reason = reason.rpartition(", got ")[2] if reason.startswith("`config.model_type`") else reason
    reason = reason.replace("|", "\\|")
    return reason if len(reason) <= SHORT else reason[: SHORT - 3] + "..."
