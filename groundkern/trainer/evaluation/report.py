"""The table on the terminal, and report.html: figures, the comparison, and failures as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from groundkern.trainer.evaluation.figures import ALL, by_task
from groundkern.trainer.evaluation.rows import Row
from groundkern.trainer.evaluation.scoring import Scoring
from groundkern.trainer.metrics.intervals import CHANCE, ENOUGH, Difference, beyond_chance
from groundkern.trainer.templating import environment

WIDTH = 132  # columns of the table where there is no terminal
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
    sure = told and beyond_chance(Difference(*map(gap.get, Difference._fields)), gap["samples"])
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
        "p": ("<0.001" if gap["p_value"] < 0.001 else f"{gap['p_value']:.3f}") if told else "",
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


def page(
    evaluation: dict[str, Any], worst: dict[str, list[Row]], draw: Callable[[Row], Sequence]
) -> str:
    """The report's HTML.

    Args:
        evaluation: as it is written to evaluation.json.
        worst: of `failures`.
        draw: the pictures of a sample, (data URI, caption) each.
    """
    cards = {
        task or "no task": [_card(evaluation, row, draw(row)) for row in rows]
        for task, rows in worst.items()
    }
    template = environment().get_template("evaluate.html")
    return template.render(
        evaluation=evaluation,
        sentences=sentences(evaluation),
        tables=tables(evaluation),
        counts={task or "no task": x["samples"] for task, x in evaluation["tasks"].items()},
        failures=cards,
        chance=CHANCE,
        enough=ENOUGH,
    )


def _card(evaluation: dict[str, Any], row: Row, pictures: Sequence) -> dict[str, Any]:
    about = evaluation["metrics"]
    scored = [
        (about[name]["title"], number(total / count))
        for name, (total, count) in row["figures"].items()
        if count > 0 and not about[name]["teacher_forced"]
    ]
    return {
        "where": row["where"],
        "question": row["question"][:SHOWN],
        "gold": " | ".join(row["gold"])[:SHOWN],
        "prediction": row.get("raw", row["prediction"])[:SHOWN],
        "ended": row["ended"],
        "scored": scored,
        "pictures": pictures,
    }
