"""The demo: one data set and one tiny model, trained plain and grounded, and compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from trainer import durable
from trainer import run_folder as folder
from trainer.command_line import Places, merged, parse_flags, read_yaml
from trainer.config import Config, validate
from trainer.demo.make import SAMPLES, make_demo
from trainer.train import train

MADE = "made.json"  # in the data folder, written last
CONFIG = Path(__file__).parent / "demo" / "config.yaml"


class Check(NamedTuple):
    """One figure that grounding should reach, plain SFT beside it."""

    what: str
    plain: float
    grounded: float
    wanted: str
    holds: bool


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
    made = {"samples": samples, "groundkern": folder.versions()["groundkern"]}
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
        plain, grounded: {task: {metric: value}} of the two runs on the same held-out samples.
    """
    found = []
    for task in plain:
        left, right = plain[task], grounded[task]
        for key, name, wanted, direction, limit in _wanted(task, left, right):
            if key in left and key in right:
                holds = direction * (right[key] - limit) > 0
                found.append(Check(f"{task}: {name}", left[key], right[key], wanted, holds))
    return found


def _wanted(task: str, left: dict, right: dict) -> list[tuple[str, str, str, int, float]]:
    """(metric, name, what is wanted, +1 above or -1 below, the limit) of one task's checks."""
    frequent = right.get("word_baseline", 0.0)
    words = f"above {frequent:.3f}, always guessing the most frequent"
    peak, loss = left.get("peak_in_mask", 0.0), 1.05 * left.get("answer_loss", 0.0)
    wanted = [
        ("peak_in_mask", "contribution peak on the target", "above plain SFT", 1, peak),
        ("word_accuracy", "visual label accuracy", words, 1, frequent),
        ("answer_loss", "answer loss", "less than 5 % above plain SFT", -1, loss),
    ]
    if task == "pointing":
        twice = 2 * left.get("number_accuracy", 0.0)
        wanted += [
            ("number_accuracy", "accuracy per coordinate", "above twice plain SFT", 1, twice),
            ("attention_ratio", "attention ratio", "above 10", 1, 10.0),
        ]
    return wanted


def show(found: list[Check]) -> None:
    """Prints the checks as a table and the outcome as a sentence."""
    table = Table("held out", "plain SFT", "grounded", "wanted", "holds")
    for row in found:
        holds = "yes" if row.holds else "no"
        table.add_row(row.what, f"{row.plain:.3f}", f"{row.grounded:.3f}", row.wanted, holds)
    Console().print(table)
    missed = [row.what for row in found if not row.holds]
    if missed:
        print(f"{len(found) - len(missed)} of {len(found)} hold; not: {'; '.join(missed)}.")
    else:
        print(f"All {len(found)} hold.")
