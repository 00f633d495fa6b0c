"""The demo: one data set and one tiny model, trained plain and grounded, and compared."""

from __future__ import annotations

import shutil
from math import isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from groundkern.trainer import durable
from groundkern.trainer import run_folder as folder
from groundkern.trainer.command_line import Places, merged, parse_flags, read_yaml
from groundkern.trainer.config import Config, validate
from groundkern.trainer.demo.generate import SEEDS
from groundkern.trainer.demo.make import SAMPLES, make_demo
from groundkern.trainer.metrics.intervals import ENOUGH, Interval
from groundkern.trainer.metrics.tally import interval_of, paired_of, sampled
from groundkern.trainer.train import train

MADE = "made.json"  # in the data folder, written last
CONFIG = Path(__file__).parent / "demo" / "config.yaml"


class Wanted(NamedTuple):
    """What one metric of the grounded run should be: above or below a limit.

    Args:
        metric, name: its key, and what the reader sees.
        text: the wish in words.
        direction: +1 above the limit, -1 below it.
        scale: the limit is this times a metric of the plain run or, with `than`, of the grounded
            run itself. With `constant` it is that number.
        than: the key of such a metric; empty: the same metric of the plain run.
        constant: the limit itself.
    """

    metric: str
    name: str
    text: str
    direction: int = 1
    scale: float = 1.0
    than: str = ""
    constant: float | None = None


class Check(NamedTuple):
    """One figure that grounding should reach, plain SFT beside it.

    Args:
        what: task and metric.
        plain, grounded: the figures.
        wanted: what is asked of the grounded one.
        beyond: how far it is on the wanted side of its limit (below 0: it is not), with the 95 %
            interval of that; no bounds: the records do not tell.
        holds: it is there, with the whole interval if there is one and on enough samples.
    """

    what: str
    plain: float
    grounded: float
    wanted: str
    beyond: Interval
    holds: bool

    @property
    def verdict(self) -> str:
        """yes; not sure, for a figure on the wanted side that may be there by chance; no."""
        if self.holds:
            return "yes"
        return "not sure" if self.beyond.value > 0 else "no"


def demo(output: Path, overrides: list[str], *, samples: int = SAMPLES) -> Path:
    """Makes the demo data and model under `output` (or reuses them), trains twice and compares.

    Args:
        output: gets data/, plain/, grounded/ and report.html.
        overrides: `--section.field value` words laid over both runs' settings.
        samples: training samples, all tasks together.

    Returns:
        The path of the report.
    """
    torch.set_num_threads(1)  # layers this small take longer to hand to threads than to compute
    plain, grounded = demo_configs(output, overrides)
    _make_data(output / "data", samples)
    print("Plain SFT:")
    train(plain)
    print("Grounded:")
    before = durable.read_json(plain.training.output / folder.BEFORE)
    report = train(grounded, before=before)
    evaluations = [
        durable.read_json(config.training.output / folder.AFTER)["tasks"]
        for config in (plain, grounded)
    ]
    show(checks(*evaluations))
    return Path(shutil.copy(report, output / folder.REPORT))


def _make_data(data: Path, samples: int) -> None:
    made = {"samples": samples, "groundkern": folder.versions()["groundkern"], "splits": [*SEEDS]}
    if (data / MADE).exists() and durable.read_json(data / MADE) == made:
        print(f"Using the data in {data}.")
        return
    make_demo(data, samples=samples)
    durable.write_json(data / MADE, made)


def demo_configs(output: Path, overrides: list[str]) -> tuple[Config, Config]:
    """(plain, grounded): the demo's settings twice, differing in their objectives and folders."""
    values, lines = read_yaml(CONFIG)
    given = parse_flags(overrides)
    data, compare = output / "data", str(output / "plain")
    made = {
        "model": {"path": str(data / "model")},
        "data": {"train": str(data / "train.jsonl"), "test": str(data / "test.jsonl")},
    }
    values, where = merged(merged(values, made), given), Places(CONFIG, lines, given)

    def run(name: str, **changed: Any) -> Config:
        changed["training"] = {"output": str(output / name)}
        return validate(merged(values, changed), where=where)

    plain = run("plain", objectives=None, evaluation={"compare": None})
    return plain, run("grounded", evaluation={"compare": compare})


def checks(plain: dict, grounded: dict) -> list[Check]:
    """What grounding should do, task by task.

    Args:
        plain, grounded: {task: figures} of the two runs on the same held-out samples.
    """
    found = []
    for task in plain:
        left, right = plain[task], grounded[task]
        for one in _wanted(task, right):
            if one.metric in left and one.metric in right:
                values = (_number(figures[one.metric]) for figures in (left, right))
                beyond, sure = _beyond(one, left, right)
                holds = beyond.value > 0 and sure
                found.append(Check(f"{task}: {one.name}", *values, one.text, beyond, holds))
    return found


def _wanted(task: str, right: dict) -> list[Wanted]:
    words = f"above {right.get('word_baseline', 0.0):.3f}, always guessing the most frequent"
    wanted = [
        Wanted("peak_in_mask", "contribution peak on the target", "above plain SFT"),
        Wanted("word_accuracy", "visual label accuracy", words, than="word_baseline"),
        Wanted("answer_loss", "answer loss", "less than 5 % above plain SFT", -1, 1.05),
    ]
    if task == "pointing":
        twice = "above twice plain SFT"
        wanted += [
            Wanted("number_accuracy", "accuracy per coordinate", twice, scale=2.0),
            Wanted("attention_ratio", "attention ratio", "above 10", constant=10.0),
        ]
    return wanted


def _beyond(one: Wanted, left: dict, right: dict) -> tuple[Interval, bool]:
    """How far a figure is beyond its limit, and whether chance alone would not take it there."""
    found = sampled(right, one.metric)
    samples = 0 if found is None else int((found.counts > 0).sum())
    if one.constant is not None:
        limit, gap = one.constant, interval_of(right, one.metric)
        bounds = None if gap is None else (gap.low - limit, gap.high - limit)
    else:
        base = right if one.than else left
        limit = one.scale * _number(base.get(one.than or one.metric, 0.0))
        paired = paired_of(base, right, one.metric, than=one.than, scale=one.scale)
        bounds, samples = (None, 0) if paired is None else (paired[0][1:3], paired[1])
    value = one.direction * (_number(right[one.metric]) - limit)
    if bounds is None:
        return Interval(value, nan, nan), True
    low, high = sorted(one.direction * bound for bound in bounds)
    return Interval(value, low, high), low > 0 and samples >= ENOUGH


def _number(value: float | None) -> float:
    return nan if value is None else value  # null in a record: it was not finite


def show(found: list[Check]) -> None:
    """Prints the checks as a table and the outcome as a sentence."""
    table = Table("held out", "plain SFT", "grounded", "wanted", "beyond it by, 95 %", "holds")
    for row in found:
        value, low, high = row.beyond
        beyond = f"{value:+.3f}" + ("" if isnan(low) else f" [{low:+.3f}, {high:+.3f}]")
        figures = (f"{row.plain:.3f}", f"{row.grounded:.3f}")
        table.add_row(row.what, *figures, row.wanted, beyond, row.verdict)
    Console().print(table)
    missed = [row.what for row in found if row.verdict == "no"]
    unsure = [row.what for row in found if row.verdict == "not sure"]
    if not missed and not unsure:
        print(f"All {len(found)} hold.")
        return
    told = [f"{len(found) - len(missed) - len(unsure)} of {len(found)} hold"]
    if missed:
        told.append(f"not: {'; '.join(missed)}")
    if unsure:
        told.append(f"not beyond chance: {'; '.join(unsure)}")
    print(". ".join(told) + ".")
