"""Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.timing.results import Row


def line(row: Row) -> str:
    """One row as text.

    Args:
        row: of `benchmarks.longest.__main__.measure`.
    """
    how = "checkpointed" if row["checkpointed"] else "whole"
    counted = f"counted {int(row['counted']) / 1e6:.0f} MB"
    found = row["status"] if row["ratio"] is None else f"measured {int(row['measured']) / 1e6:.0f}"
    return f"{row['tokens']:>6} {row['method']}, {how}: {counted}, {found}"


def measured(rows: Iterable[Row]) -> list[str]:
    """Markdown: MB measured, and in brackets what is counted over it, by method and length.

    Args:
        rows: of `benchmarks.longest.__main__.measure`, or read from its CSV.
    """
    rows = list(rows)
    lengths = sorted({int(row["tokens"]) for row in rows})
    names = dict.fromkeys((row["method"], str(row["checkpointed"])) for row in rows)
    lines = [
        "| | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    found = {(r["method"], str(r["checkpointed"]), int(r["tokens"])): r for r in rows}
    for name, checkpointed in names:
        cells = [_cell(found.get((name, checkpointed, length))) for length in lengths]
        title = f"{name}, checkpointed" if checkpointed == "True" else name
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["ratio"] in (None, ""):
        return f"— ({int(row['counted']) / 1e6:,.0f} counted)"
    return f"{int(row['measured']) / 1e6:,.0f} ({float(row['ratio']):.3f})"
