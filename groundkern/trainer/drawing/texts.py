"""The texts and tables that drawings show, shipped in `data/`."""

from __future__ import annotations

import csv
from pathlib import Path

DATA = Path(__file__).parent / "data"


def texts() -> list[list[str]]:
    """The words of each text."""
    return [path.read_text(encoding="utf-8").split() for path in sorted(DATA.glob("*.txt"))]


def tables() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Each quantity of each table: what is measured, the quantity, and (name, value) rows."""
    found = []
    for path in sorted(DATA.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file)
        for i, quantity in enumerate(head[1:], start=1):
            found.append((head[0], quantity, [(row[0], row[i]) for row in rows]))
    return found
