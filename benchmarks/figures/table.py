"""The table that a run prints."""

from rich.console import Console
from rich.table import Table

from benchmarks.timing.results import Row

ENDS = {"ours": "bold", "floor": "dim"}


def _number(x: object, form: str = "{:.3g}") -> str:
    return "" if x is None else form.format(x)


def _spread(row: Row, prefix: str, suffix: str = "") -> str:
    """p50 (p20-p80)."""
    low, mid, high = (row[f"{prefix}{p}{suffix}"] for p in ("p20", "p50", "p80"))
    return "" if mid is None else f"{mid:.3g} ({low:.3g}-{high:.3g})"


def show(rows: list[Row], console: Console) -> None:
    """Prints one problem."""
    first = rows[0]
    title = f"{first['problem']}  {first['dtype']}  {first['mode']}: {first['shape']}"
    with_floor = any(r["percent_of_floor"] is not None for r in rows)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("contestant")
    for name in ("ms, p50 (p20-p80)", "x GEMMs", "ours / this", "peak MiB"):
        table.add_column(name, justify="right")
    if with_floor:
        table.add_column("% of floor", justify="right")
    timed = [r for r in rows if r["status"] == "timed"]
    for row in timed:
        ours = "" if row["kind"] in ("ours", "floor") else _spread(row, "ours_over_this_")
        cells = [
            str(row["contestant"]),
            _spread(row, "", "_ms"),
            _spread(row, "to_gemms_"),
            ours,
            _number(row["peak_mib"], "{:.1f}"),
        ]
        if with_floor:
            cells.append(_number(row["percent_of_floor"], "{:.0f}"))
        table.add_row(*cells, style=ENDS.get(str(row["kind"])))
    console.print(table)
    for row in rows:
        if row not in timed:
            console.print(f"not run: {row['contestant']}: {row['status']}", style="dim")
    console.print(f"{timed[0]['rounds']} interleaved rounds; load average {first['load']}\n")
