"""Runs to a table: mean and spread over seeds, in Markdown, CSV and one picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from trainer import durable
from trainer import run_folder as folder
from trainer.config import ConfigError
from trainer.evidence.runs import FIGURES, Plan, most_frequent


class Cell(NamedTuple):
    """A figure of one task and method over its seeds."""

    task: str
    method: str
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation; NaN of a single seed."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


def cells(results: Sequence[dict[str, Any]]) -> list[Cell]:
    """The figures of all runs, in the order of tasks, methods and `FIGURES`."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for result in results:
        for metric, _ in FIGURES:
            if metric in result["figures"]:
                key = result["task"], result["method"], metric
                found.setdefault(key, []).append(result["figures"][metric])
    return [Cell(*key, tuple(values)) for key, values in found.items()]


def write_tables(plan: Plan, results: Sequence[dict[str, Any]], command: str) -> Path:
    """Write evidence.json, evidence.csv and evidence.md under the output folder.

    Returns:
        The path of the Markdown table.
    """
    table = cells(results)
    durable.write_json(plan.output / "evidence.json", list(results))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["task", "method", "metric", "mean", "spread", "seeds", "values"])
    for cell in table:
        values = " ".join(f"{value:.6g}" for value in cell.values)
        row = (f"{cell.mean:.6g}", f"{cell.spread:.6g}", len(cell.values), values)
        writer.writerow([cell.task, cell.method, cell.metric, *row])
    durable.write_text(plan.output / "evidence.csv", text.getvalue())
    path = plan.output / "evidence.md"
    durable.write_text(path, markdown(plan, table, command))
    return path


def markdown(plan: Plan, table: Sequence[Cell], command: str) -> str:
    """A heading, the conditions and one table for each task."""
    versions = ", ".join(f"{name} {number}" for name, number in folder.versions().items())
    lines = [
        "# Plain fine-tuning against grounding methods, at equal steps",
        "",
        f"`{command}`: {plan.steps} steps of {plan.batch_size}, {plan.samples} training and "
        f"{plan.test} held-out drawings of {plan.size} px ({plan.difficulty}) a task, "
        f"{plan.seeds} seed(s). {folder.machine()}; {versions}.",
        "",
        "Held-out figures, mean ± standard deviation over seeds. An answer is right when every one "
        "of its tokens, its end included, is the most likely one, which is what greedy decoding "
        "writes. Methods run with the demo's settings, not tuned on these tasks.",
    ]
    for task in dict.fromkeys(cell.task for cell in table):
        own = [cell for cell in table if cell.task == task]
        metrics = [(m, title) for m, title in FIGURES if any(c.metric == m for c in own)]
        guess = most_frequent(plan, task)
        lines += ["", f"## {task}", ""]
        lines += [f"Always the most frequent answer: {guess:.3f} right.", ""]
        lines += ["| method | " + " | ".join(title for _, title in metrics) + " |"]
        lines += ["|---|" + "---|" * len(metrics)]
        for method in dict.fromkeys(cell.method for cell in own):
            shown = {cell.metric: _shown(cell) for cell in own if cell.method == method}
            row = " | ".join(shown.get(metric, "") for metric, _ in metrics)
            lines.append(f"| {method} | {row} |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell) -> str:
    spread = f" ± {cell.spread:.3f}" if len(cell.values) > 1 else ""
    return f"{cell.mean:.3f}{spread}"


def plot(plan: Plan, results: Sequence[dict[str, Any]]) -> Path:
    """evidence.png: a panel for each task and figure, a dot for each seed, mean and spread.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "evidence: the picture needs matplotlib: pip install matplotlib"
        ) from None
    table = cells(results)
    tasks = list(dict.fromkeys(cell.task for cell in table))
    metrics = [(m, title) for m, title in FIGURES if any(c.metric == m for c in table)]
    figure = Figure(figsize=(3.4 * len(metrics), 2.6 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), len(metrics), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, (metric, title) in zip(row, metrics, strict=True):
            own = [cell for cell in table if (cell.task, cell.metric) == (task, metric)]
            if not own:
                axis.set_axis_off()
                continue
            _panel(axis, own)
            if metric == "answer_accuracy":
                axis.axvline(most_frequent(plan, task), color="0.6", linestyle=":")
            axis.set_title(f"{task}: {title}", fontsize=8)
    path = plan.output / "evidence.png"
    figure.savefig(path, dpi=110)
    return path


def _panel(axis: Any, own: Sequence[Cell]) -> None:
    for place, cell in enumerate(own):
        colour = "0.35" if cell.method == "plain" else "C0"
        spread = 0.0 if math.isnan(cell.spread) else cell.spread
        axis.barh(place, cell.mean, xerr=spread, color=colour, alpha=0.45, ecolor=colour)
        axis.plot(cell.values, [place] * len(cell.values), ".", color=colour)
    axis.set_yticks(range(len(own)), [cell.method for cell in own], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
