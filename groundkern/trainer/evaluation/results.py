"""What a finished evaluation leaves: predictions.jsonl, evaluation.json, a table, report.html."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.evaluation import figures as counting
from groundkern.trainer.evaluation.pictures import Pictures
from groundkern.trainer.evaluation.questions import asked_text
from groundkern.trainer.evaluation.report import failures, page, print_table
from groundkern.trainer.evaluation.rows import Row, is_prediction, line_of, read_rows
from groundkern.trainer.evaluation.scoring import LOOKING, Scoring, about
from groundkern.trainer.metrics.held_out import how_measured
from groundkern.trainer.progress import progress

PREDICTIONS, EVALUATION, REPORT = "predictions.jsonl", "evaluation.json", "report.html"


def read_other(path: Path | None, output: Path) -> list[Row] | None:
    """The predictions of the evaluation that `--compare` names.

    If another version measured where its model looks by another rule, they come without that.

    Raises:
        ConfigError: it is no finished evaluation, or this one.
    """
    if path is None:
        return None
    if path.resolve() == output.resolve():
        raise ConfigError(f"--compare: expected another evaluation than --output, got {path}")
    found = path / PREDICTIONS
    if not found.is_file():
        raise ConfigError(
            f"--compare: expected the output of a finished evaluation, got {path} without "
            f"{PREDICTIONS}"
        )
    rows = read_rows(found, is_prediction)
    if not rows:
        raise ConfigError(f"--compare: expected rows of samples in {found}, got none")
    if _measured(path) == how_measured():
        return rows
    print(f"Where {path} looks is not compared: it was measured by another rule.")
    for row in rows:
        row["figures"] = {n: pair for n, pair in row["figures"].items() if n not in LOOKING}
    return rows


def _measured(path: Path) -> Any:
    """How an evaluation measured where its model looks; None if it does not tell."""
    try:
        return durable.read_json(path / EVALUATION)["settings"]["measured"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


class Results:
    """Scores what was answered, and writes everything.

    Args:
        arguments: of the command.
        dataset: the samples.
        picked: indices of those that were asked for, in the data's order.
        answers: the row of each sample that was answered, or could not be.
        figures: likewise of the teacher-forced figures.
        other: the rows to compare with, or None.
        refused: why it was not measured where the model looks, or None.
        record: what is kept of the run itself.
    """

    def __init__(
        self,
        arguments: Namespace,
        *,
        dataset: JsonLinesDataset,
        picked: list[int],
        answers: dict[int, Row],
        figures: dict[int, Row],
        other: list[Row] | None,
        refused: str | None,
        record: dict[str, Any],
    ) -> None:
        self.arguments, self.dataset, self.picked = arguments, dataset, picked
        self.answers, self.figures, self.other = answers, figures, other
        self.refused, self.record = refused, record

    def write(self, grounding: Any) -> Path:
        """Writes the files and prints the table.

        Args:
            grounding: of `Grounding`, for heat maps; None: the report has none.

        Returns:
            The path of the report.
        """
        output = self.arguments.output
        scoring = Scoring(self.arguments.metrics, self.arguments.coord)
        rows = self._scored(scoring)
        durable.write_text(output / PREDICTIONS, "".join(line_of(row) + "\n" for row in rows))
        found = self._evaluation(rows)
        durable.write_json(output / EVALUATION, found)
        print_table(found)
        worst = failures(rows, scoring, self.arguments.failures)
        pictures = Pictures(self.dataset, scoring, grounding)
        durable.write_text(output / REPORT, page(found, worst, pictures.of), errors="replace")
        return output / REPORT

    def _scored(self, scoring: Scoring) -> list[Row]:
        """A row of each answered sample with what was asked, what is right, and all figures."""
        answered = [i for i in self.picked if "prediction" in self.answers.get(i, {})]
        samples = [(index, self.dataset.sample(index)) for index in answered]
        scoring.prepare(samples, self.answers)
        rows = []
        with progress("scoring", total=len(samples), unit="sample") as bar:
            for index, sample in samples:
                answer = self.answers[index]
                looked = self.figures.get(index, {}).get("figures", {})
                rows.append(
                    {
                        **answer,
                        "where": sample.where,
                        "task": sample.task,
                        "question": asked_text(sample.messages),
                        "figures": {**scoring.score(answer), **looked},
                    }
                )
                bar.update()
        return rows

    def _evaluation(self, rows: list[Row]) -> dict[str, Any]:
        bad = [(one.where, one.reason) for one in self.dataset.bad]
        for kind in (self.answers, self.figures):
            errors = (row["error"].partition(": ") for row in kind.values() if "error" in row)
            bad += [(where, reason) for where, _, reason in errors if (where, reason) not in bad]
        compared = None
        if self.other is not None:
            pairs = counting.matched(rows, self.other)
            compared = {
                "with": str(self.arguments.compare),
                "samples": len(pairs),
                "only_here": len(rows) - len(pairs),
                "only_there": len(self.other) - len(pairs),
                "tasks": counting.differences(pairs),
            }
        tasks = counting.measured(rows)
        names = {name for metrics in tasks.values() for name in metrics}
        return {
            **self.record,
            "samples": len(rows),
            "not_ended": sum(not row["ended"] for row in rows),
            "bad": [{"where": where, "reason": reason} for where, reason in bad],
            "grounding_refused": self.refused,
            "metrics": {name: about(name)._asdict() for name in sorted(names)},
            "tasks": {
                task: {"samples": len(own), "figures": tasks[task]}
                for task, own in counting.by_task(rows).items()
            },
            "compared": compared,
        }
