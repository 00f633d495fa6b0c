"""The table of metrics in docs/evaluate.md: `python -m tests.trainer.evaluate.metrics_table` writes
it."""

from __future__ import annotations

from pathlib import Path

from trainer.evaluation.metrics import METRICS, TASK_METRICS

PAGE = Path(__file__).parents[3] / "docs" / "evaluate.md"
BEGIN, END = "<!-- metrics:begin -->\n", "<!-- metrics:end -->"
NEEDS = {
    "answer": "text",
    "number": "whole numbers in the gold",
    "table": "a table",
    "boxes": "boxes in the gold or regions",
    "places": "regions, or points or boxes in the gold",
}


def table() -> str:
    """One row for each metric: its meaning, what it needs, the tasks that have it, its source."""
    lines = ["| metric | what it is | needs | default of tasks | source |", "|---|---|---|---|---|"]
    for metric in METRICS.values():
        tasks = ", ".join(
            f"`{task}`" for task, names in TASK_METRICS.items() if metric.name in names
        )
        title = metric.title if metric.higher_is_better else f"{metric.title}, lower is better"
        cells = (f"`{metric.name}`", title, NEEDS[metric.needs], ", ".join(tasks), metric.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table as the page has it."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + written() + END, BEGIN + table() + END))
