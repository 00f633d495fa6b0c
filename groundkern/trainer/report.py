"""One self-contained report.html from the output folder of a run, or of two side by side."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.controls import control_of
from groundkern.trainer.metrics.intervals import CHANCE, ENOUGH, beyond_chance
from groundkern.trainer.metrics.tally import PER_SAMPLE, interval_of, paired_of
from groundkern.trainer.pictures import (
    SERIES,
    close_up,
    colour_scale,
    full_scale,
    heat_picture,
    loss_curves,
)
from groundkern.trainer.templating import environment

# key, what the reader sees, printf format, +1 if higher is better, -1 if lower
FIGURES = (
    ("answer_loss", "answer loss", "%.3f", -1),
    ("token_accuracy", "answer token accuracy", "%.3f", 1),
    ("answer_accuracy", "whole answers right", "%.3f", 1),
    ("number_accuracy", "accuracy on numbers in the answer", "%.3f", 1),
    ("attention_ratio", "attention ratio (1 = looks anywhere)", "%.2f", 1),
    ("attention_mass", "attention mass on the target", "%.3f", 1),
    ("attention_argmax", "attention peak on the target", "%.3f", 1),
    ("peak_in_mask", "contribution peak on the target", "%.3f", 1),
    ("roc_auc", "contribution ROC-AUC", "%.3f", 1),
    ("word_accuracy", "visual label accuracy", "%.3f", 1),
)
LOOKS = ("attention_ratio", "attention_mass", "attention_argmax", "peak_in_mask", "roc_auc")
OBJECTIVES = {
    "smam": "SMAM",
    "dv_sft": "DV-SFT",
    "klal": "KLAL",
    "hist": "HIST",
    "margins": "margins",
    "logit_lens": "logit lens",
    "basic": "BASIC",
    "patch_text": "patch-text contrast",
    "distill": "distillation",
}
TERMS = {
    "loss": "total loss",
    "text": "text",
    "smam_grounding": "SMAM: grounding",
    "smam_cross_entropy": "SMAM: masked cross entropy",
    "word": "DV-SFT: visual labels",
    "map_kl": "KLAL: map KL",
    "phrase": "HIST: phrases",
    "subject": "HIST: subjects",
    "composition": "HIST: composition",
    "margin_mean": "margins: means",
    "margin_max": "margins: maxima",
    "lens_raise": "logit lens: on the object",
    "lens_suppress": "logit lens: off the object",
    "basic_direction": "BASIC: directions",
    "basic_logits": "BASIC: logits",
    "patch_text": "patch-text contrast: visual tokens",
    "text_patch": "patch-text contrast: words",
    "distill_attention": "distillation: attention",
    "distill_tokens": "distillation: tokens",
}


@dataclass(frozen=True)
class Run:
    """What one output folder holds."""

    name: str
    record: dict[str, Any]
    metrics: list[dict]
    before: dict | None
    after: dict | None


@dataclass(frozen=True)
class Cell:
    """A figure and its 95 % interval, which is empty if the record does not tell."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One metric of one task; a cell is None if its column does not have it.

    Args:
        label: what the reader sees.
        cells: one for each column.
        best: the column that is better than every other beyond chance; None: none is.
    """

    label: str
    cells: list[Cell | None]
    best: int | None


def load_run(output: Path) -> Run:
    """Reads a finished run.

    Raises:
        FileNotFoundError: the folder holds no record of a finished run.
    """
    record = durable.read_json(output / folder.RECORD)
    before, after = (
        durable.read_json(output / name) if (output / name).exists() else None
        for name in (folder.BEFORE, folder.AFTER)
    )
    return Run(run_name(record["config"]), record, folder.read_metrics(output), before, after)


def run_name(config: dict[str, Any]) -> str:
    """A run's objectives in words: "SMAM + KLAL", or "plain SFT"."""
    on = [title for key, title in OBJECTIVES.items() if config["objectives"].get(key)]
    control = control_of(config["objectives"])
    return (" + ".join(on) or "plain SFT") + (f" (control: {control})" if control else "")


def write_report(output: Path, beside: Path | None = None) -> Path:
    """Writes `report.html` into `output`.

    Args:
        output: folder of a finished run.
        beside: folder of another finished run to compare with, usually plain SFT.

    Returns:
        The path of the report.
    """
    run, other = load_run(output), load_run(beside) if beside else None
    series = {run.name: run.metrics}
    if other is not None:
        series[_apart(other, run)] = other.metrics
    terms = [*folder.loss_terms(run.metrics), *folder.other_terms(run.metrics)]
    held_out = any(name.startswith("eval_") for row in run.metrics for name in row)
    page = (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            other=other,
            sentences=sentences(run, other),
            columns=[name for name, _ in columns(run, other)],
            compared=how_compared(run, other),
            tables=tables(run, other),
            colours=dict(zip(series, SERIES)),
            curves=[(_curve_title(term), loss_curves(series, term)) for term in terms],
            held_out=held_out,
            pictures=pictures(columns(run, other)),
            scale=colour_scale(),
            versions=run.record["versions"],
        )
    )
    path = output / folder.REPORT
    durable.write_text(path, page)
    return path


def _curve_title(term: str) -> str:
    norm = term.removeprefix("grad_norm_")
    title = TERMS.get(norm, norm.replace("_", " "))
    return title if norm == term else f"gradient norm, {title}"


def columns(run: Run, other: Run | None) -> list[tuple[str, dict]]:
    """(heading, evaluation) of every column: before, the run beside, this run.

    One that another version measured by another rule comes without where its model looks.
    """
    found = [("before training", run.before)]
    if other is not None:
        found.append((_apart(other, run), other.after))
    found.append((run.name, run.after))
    there = [(name, evaluation) for name, evaluation in found if evaluation is not None]
    return [(name, _alike(evaluation, there[-1][1])) for name, evaluation in there]


def _alike(evaluation: dict, last: dict) -> dict:
    if evaluation.get("measured") == last.get("measured"):
        return evaluation
    tasks = {
        task: {name: value for name, value in figures.items() if name not in LOOKS}
        for task, figures in evaluation["tasks"].items()
    }
    return {**evaluation, "tasks": tasks, "heat_maps": []}


def tables(run: Run, other: Run | None) -> dict[str, list[Row]]:
    """The metric rows of each task."""
    evaluations = [evaluation["tasks"] for _, evaluation in columns(run, other)]
    tasks = dict.fromkeys(task for tasks in evaluations for task in tasks)
    return {_title(task, evaluations): list(_rows(task, evaluations)) for task in tasks}


def _title(task: str, evaluations: list[dict]) -> str:
    count = next(tasks[task]["samples"] for tasks in evaluations if task in tasks)
    return f"{task or 'all samples'}, {count:,} held out"


def _rows(task: str, evaluations: list[dict]):
    for key, label, form, better in FIGURES:
        figures = [tasks.get(task, {}) for tasks in evaluations]
        values = [one.get(key) for one in figures]
        if any(value is not None for value in values):
            if key == "word_accuracy":
                baseline = figures[-1].get("word_baseline")
                label += "" if baseline is None else f" (most frequent label: {form % baseline})"
            cells = [
                None if value is None else Cell(form % value, _interval(one, key, form))
                for value, one in zip(values, figures)
            ]
            yield Row(label, cells, _best(figures, key, better))


def _interval(figures: dict, key: str, form: str) -> str:
    found = interval_of(figures, key)
    if found is None or not (isfinite(found.low) and isfinite(found.high)):
        return ""
    return f"[{form % found.low}, {form % found.high}]"


def _best(figures: list[dict], key: str, better: int) -> int | None:
    """The column that beats the best of the others on the same samples beyond chance."""
    there = [(better * one[key], i) for i, one in enumerate(figures) if one.get(key) is not None]
    if len(there) < 2:
        return None
    (_, best), (_, second), *_ = sorted(there, reverse=True)
    compared = paired_of(figures[second], figures[best], key)
    if compared is None:
        return None
    difference, samples = compared
    beyond = beyond_chance(difference, samples) and better * difference.value > 0
    return best if beyond else None


def how_compared(run: Run, other: Run | None) -> str:
    """How the held-out figures' columns are compared, in sentences; empty if there are none."""
    shown = [evaluation for _, evaluation in columns(run, other)]
    evaluations = [evaluation["tasks"] for evaluation in shown]
    kept = [PER_SAMPLE in one for tasks in evaluations for one in tasks.values()]
    if not kept:
        return ""
    if not all(kept):
        return (
            "Some of these records are of a version that kept means only: their figures have no "
            "interval, and nothing is marked as better than them."
        )
    told = "In brackets: the 95 % interval of a figure, from drawing the samples again."
    if len(evaluations) < 2:
        return told
    if any(one.get("measured") != shown[-1].get("measured") for one in shown):
        told += " Where a model looks is left out where it was measured by another rule."
    of = [{task: one[PER_SAMPLE]["of"] for task, one in tasks.items()} for tasks in evaluations]
    if any(one != of[0] for one in of):
        return told + " The columns are of different samples: none is marked as better."
    return (
        f"{told} A figure is green where it is better than the best of the others on the same "
        f"samples, paired one by one, with p < {CHANCE} and at least {ENOUGH} samples; of twenty "
        "rows without any difference, about one is green by chance."
    )


def pictures(evaluated: list[tuple[str, dict]]) -> list[dict]:
    """For each shown sample its text, its image with the target, and one heat map per column."""
    if not evaluated:
        return []
    entries = [{entry["name"]: entry for entry in e["heat_maps"]} for _, e in evaluated]
    shown = []
    for name, entry in entries[-1].items():
        maps = []
        for kind, title in (("attention", "attention"), ("contribution", "logit contribution")):
            there = [
                (heading, found[name])
                for (heading, _), found in zip(evaluated, entries)
                if kind in found.get(name, {})
            ]
            top = full_scale([one[kind] for _, one in there])
            panels = [(heading, _views(one, one[kind], top)) for heading, one in there]
            if panels:
                maps.append((title, f"{top:.2g}", panels))
        shown.append({**entry, "target": _views(entry, None), "maps": maps})
    return shown


def _views(entry: dict, values: list[float] | None, top: float = 1.0) -> list[str]:
    """The whole picture and, if it is drawn smaller than it is, the target's surroundings."""
    close = close_up(entry, values, top)
    return [*([close] if close else []), heat_picture(entry, values, top)]


def sentences(run: Run, other: Run | None) -> list[str]:
    """What was run, in plain sentences."""
    record, config = run.record, run.record["config"]
    training = config["training"]
    how = "LoRA adapters" if config["model"]["lora"] else "all weights"
    batch = training["batch_size"] * training["accumulation"]
    told = [
        f"{record['samples']['train']:,} samples of {config['data']['train']} trained "
        f"{record['trained_parameters']:,} of {record['parameters']:,} parameters ({how}) of "
        f"{config['model']['path']} for {record['steps']:,} steps of {batch} samples with "
        f"{run.name}."
    ]
    if other is not None:
        same = all(
            other.record["config"]["training"][key] == training[key]
            for key in ("batch_size", "accumulation", "seed", "learning_rate")
        ) and (other.record["steps"] == record["steps"])
        told.append(
            f"It is shown beside {_apart(other, run)}: {other.record['steps']:,} steps, "
            + ("with the same batches in the same order." if same else "with other settings.")
        )
    if record["continued_from"]:
        told.append(f"The run was continued from {Path(record['continued_from']).name}.")
    if record.get("best"):
        told.append(
            f"The model is that of step {record['best']['step']:,}, which had the best "
            f"{record['best']['metric']} on held-out samples: {record['best']['value']:.4g}."
        )
    if run.after is None:
        told.append("There was no held-out data, so nothing was evaluated.")
    return told


def _apart(other: Run, run: Run) -> str:
    return other.name if other.name != run.name else f"{other.name} (other run)"
