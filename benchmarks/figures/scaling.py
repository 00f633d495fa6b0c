"""How cost grows: exponents fitted to a sweep, time ~ size ** exponent."""

from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.timing.results import Row

SIZES = ("keys", "rows", "columns", "vocabulary")


def exponent(sizes: list[float], costs: list[float]) -> float:
    """Slope of the least-squares line through (log size, log cost)."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def sweeps(rows: list[Row]) -> Iterator[tuple[dict[str, object], list[Row]]]:
    """The title and rows of each sweep: one op's case, dtype and mode, with one size growing."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["swept"]:
            case = str(row["problem"]).rsplit("/", 1)[0]
            fixed = tuple((n, row[n]) for n in SIZES if n != row["swept"])
            key = (row["swept"], row["op"], case, row["dtype"], row["mode"], fixed)
            groups.setdefault(key, []).append(row)
    names = ("swept", "op", "case", "dtype", "mode", "fixed")
    yield from ((dict(zip(names, key)), group) for key, group in groups.items())


def fits(rows: list[Row]) -> list[dict[str, object]]:
    """Per sweep and contestant: exponents of time and of memory, over the whole sweep and over the
    last doubling alone, where fixed costs matter least. None with fewer than two sizes."""
    found = []
    for title, group in sweeps(rows):
        for name in dict.fromkeys(str(r["contestant"]) for r in group):
            of_one = sorted((r for r in group if r["contestant"] == name), key=_size)
            fit: dict[str, object] = {**title, "contestant": name}
            for field, label in (("p50_ms", "time"), ("peak_mib", "memory")):
                known = [(_size(r), r[field]) for r in of_one if r[field]]
                enough = len(known) > 1
                fit[label] = exponent(*zip(*known)) if enough else None
                fit[f"{label}_last"] = exponent(*zip(*known[-2:])) if enough else None
            found.append(fit)
    return found


def _size(row: Row) -> int:
    return row[str(row["swept"])]


def show(rows: list[Row], console: Console) -> None:
    """Prints one table per sweep, of those that were timed."""
    tables: dict[str, Table] = {}
    for fit in fits(rows):
        if fit["time"] is None:
            continue
        fixed = ", ".join(f"{n} {x}" for n, x in fit["fixed"] if x)
        title = f"{fit['case']}  {fit['dtype']}  {fit['mode']}: cost ~ {fit['swept']} ** x; {fixed}"
        if title not in tables:
            tables[title] = Table("contestant")
            for name in ("time x", "last doubling", "memory x", "last doubling"):
                tables[title].add_column(name, justify="right")
        values = (fit[n] for n in ("time", "time_last", "memory", "memory_last"))
        tables[title].add_row(
            str(fit["contestant"]), *("" if x is None else f"{x:.2f}" for x in values)
        )
    for title, table in tables.items():
        console.print(title, style="bold")
        console.print(table)
