"""What was on record after one minute of a run, three, five and seven."""

from __future__ import annotations

from collections import Counter

from benchmarks.gpu.lines import Line

MINUTES = (1, 3, 5, 7)
COUNTED = {
    "ceiling": "ceilings",
    "smoke": "calls checked against fp64",
    "row": "timings",
    "kernel": "kernel times",
    "tile": "tiles timed",
    "best": "tile rows decided",
    "test": "tests",
    "training": "training-step rows",
    "error": "errors",
}


def table(lines: list[Line]) -> str:
    """A Markdown table: for each minute, the steps that had ended and how much was on record."""
    head = ["| by minute | steps ended | on record |", "|---|---|---|"]
    rows = []
    for minute in MINUTES:
        past = [x for x in lines if x["t"] <= 60 * minute]
        ended = [f"{x['step']}{_how(x)}" for x in past if x["event"] == "end"]
        counts = Counter(x["event"] for x in past)
        some = [f"{counts[e]} {what}" for e, what in COUNTED.items() if counts[e]]
        rows.append(f"| {minute} | {', '.join(ended) or 'none'} | {', '.join(some) or 'nothing'} |")
    return "\n".join([*head, *rows])


def _how(end: Line) -> str:
    return "" if end["status"] == "done" else f" ({end['status']})"
