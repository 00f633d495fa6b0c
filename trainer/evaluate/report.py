"""The table on the terminal, and report.html: figures, the comparison, and failures as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.data.dataset import JsonLinesDataset
from trainer.data.images import SampleError
from trainer.data.sample import Sample
from trainer.evaluate.figures import ALL, by_task
from trainer.evaluate.rows import Row
from trainer.evaluate.scoring import Scoring
from trainer.heatmaps import heat_maps
from trainer.pictures import data_uri, full_scale, heat_picture
from trainer.report import environment

THUMBNAIL = 560  # pixels of the longer side
WIDTH = 120  # columns of the table where there is no terminal
SHOWN = 600  # characters of a text


def print_table(evaluation: dict[str, Any]) -> None:
    """Prints the figures of every task, and the differences where there are any."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    compared = evaluation["compared"]
    heads = ("task", "metric", "figure", "95 % interval", "samples")
    for head in (*heads, *(("other", "difference", "p") if compared else ())):
        left = "left" if head in heads[:2] else "right"
        table.add_column(head, justify=left, no_wrap=head not in heads[:2])
    for task, rows in tables(evaluation):
        for number, row in enumerate(rows):
            cells = [escape(task) if not number else "", escape(row["title"])]
            cells += [row["figure"], row["interval"], f"{row['samples']:,}"]
            if compared:
                cells += [row["other"], row["difference"], row["p"]]
            table.add_row(*cells)
    console = Console() if Console().is_terminal else Console(width=WIDTH)
    console.print(table)
    for sentence in sentences(evaluation):
        console.print(sentence, markup=False, highlight=False)


def tables(evaluation: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(task with its samples, rows of texts) for the table and for the page."""
    compared = (evaluation["compared"] or {}).get("tasks", {})
    found = []
    for task, known in evaluation["tasks"].items():
        rows = [
            _row(evaluation["metrics"][name], figure, compared.get(task, {}).get(name, {}))
            for name, figure in known["figures"].items()
        ]
        found.append((task or "no task", rows))
    return found


def _row(about: Any, figure: dict[str, Any], gap: dict[str, Any]) -> dict[str, Any]:
    told = "value" in gap
    sure = told and (gap["low"] > 0 or gap["high"] < 0)
    better = sure and (gap["value"] > 0) == about["higher_is_better"]
    return {
        "title": about["title"],
        "teacher_forced": about["teacher_forced"],
        "samples": figure["samples"],
        "figure": number(figure["value"]),
        "interval": span(figure["low"], figure["high"]),
        "other": number(gap["other"]) if told else "",
        "difference": f"{number(gap['value'], '+')} ({span(gap['low'], gap['high'], '+')})"
        if told
        else "",
        "p": f"{gap['p_value']:.3f}" if told else "",
        "paired": gap.get("samples", 0),
        "verdict": ("better" if better else "worse") if sure else "",
    }


def number(value: float, sign: str = "") -> str:
    """A figure of three decimals; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:{sign}.3f}"


def span(low: float, high: float, sign: str = "") -> str:
    """An interval; a dash where a single sample tells none."""
    known = not any(bound is None or math.isnan(bound) for bound in (low, high))
    return f"{number(low, sign)} to {number(high, sign)}" if known else "–"


def sentences(evaluation: dict[str, Any]) -> list[str]:
    """What has to be said beside the figures."""
    told = [f"{evaluation['samples']:,} samples answered by {evaluation['model']}."]
    if evaluation["adapter"]:
        told[0] = told[0].removesuffix(".") + f" with the adapter {evaluation['adapter']}."
    if evaluation["not_ended"]:
        told.append(
            f"{evaluation['not_ended']:,} answers were cut at --max-new-tokens "
            f"{evaluation['settings']['max_new_tokens']}."
        )
    if evaluation["bad"]:
        first = evaluation["bad"][0]
        told.append(
            f"{len(evaluation['bad']):,} samples could not be used, the first: {first['where']}: "
            f"{first['reason']}."
        )
    if evaluation["grounding_refused"]:
        told.append(f"Where it looks is not measured: {evaluation['grounding_refused']}.")
    if evaluation["compared"]:
        compared = evaluation["compared"]
        told.append(
            f"Compared with {compared['with']} on the {compared['samples']:,} samples that both "
            f"have; {compared['only_here']:,} are only here, {compared['only_there']:,} only there."
        )
    return told


def failures(rows: Sequence[Row], scoring: Scoring, most: int) -> dict[str, list[Row]]:
    """The worst samples of each task, by the first metric of their answers, at most `most`; none
    that is perfect."""
    found = {}
    for task, own in by_task(rows).items():
        if task == ALL and len(found):
            continue
        bad = [(scoring.badness(row), at) for at, row in enumerate(own)]
        bad = sorted((-how, at) for how, at in bad if how is not None)
        if chosen := [own[at] for _, at in bad[:most]]:
            found[task] = chosen
    return found


class Page:
    """The page of an evaluation.

    Args:
        evaluation: as it is written to evaluation.json.
        dataset: the samples.
        processor: the model's; None without heat maps.
        grounding: of `Grounding`, or None.
    """

    def __init__(
        self, evaluation: dict[str, Any], dataset: JsonLinesDataset, processor: Any, grounding: Any
    ) -> None:
        self._evaluation, self._dataset = evaluation, dataset
        self._processor, self._grounding = processor, grounding

    def render(self, worst: dict[str, list[Row]]) -> str:
        """The page's HTML, with the worst samples of each task as pictures."""
        return (
            environment()
            .get_template("evaluate.html")
            .render(
                evaluation=self._evaluation,
                sentences=sentences(self._evaluation),
                tables=tables(self._evaluation),
                counts={t or "no task": x["samples"] for t, x in self._evaluation["tasks"].items()},
                failures={task or "no task": self._cards(rows) for task, rows in worst.items()},
            )
        )

    def _cards(self, rows: list[Row]) -> list[dict[str, Any]]:
        looks = self._looks([row["sample"] for row in rows])
        return [self._card(row, looks.get(row["where"])) for row in rows]

    def _looks(self, indices: list[int]) -> dict[str, dict[str, Any]]:
        """The heat map of each sample that has one."""
        if self._grounding is None:
            return {}
        entries = heat_maps(
            self._grounding.model,
            self._processor,
            self._grounding.collator,
            {"": [i for i in indices if self._dataset.counts["regions"][i]]},
            self._dataset,
            limit=len(indices),
        )
        return {entry["name"]: entry for entry in entries}

    def _card(self, row: Row, look: dict[str, Any] | None) -> dict[str, Any]:
        about = self._evaluation["metrics"]
        pictures = []
        if look is not None:
            pictures.append((heat_picture(look, None), "the region"))
            for name, title in (("attention", "attention"), ("contribution", "contributions")):
                if name in look:
                    top = full_scale([look[name]])
                    pictures.append((heat_picture(look, look[name], top), title))
        else:
            pictures = _images(self._dataset.sample(row["sample"]))
        scored = [
            (about[name]["title"], number(total / count))
            for name, (total, count) in row["figures"].items()
            if count > 0 and not about[name]["teacher_forced"]
        ]
        return {
            "where": row["where"],
            "question": row["question"][:SHOWN],
            "gold": " | ".join(row["gold"])[:SHOWN],
            "prediction": row["prediction"][:SHOWN],
            "ended": row["ended"],
            "scored": scored,
            "pictures": pictures,
        }


def _images(sample: Sample) -> list[tuple[str, str]]:
    try:
        images = sample.load().images
    except SampleError as error:
        return [("", str(error))]
    found = []
    for at, image in enumerate(images):
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        found.append((data_uri(small), f"image {at + 1}" if len(images) > 1 else ""))
    return found
