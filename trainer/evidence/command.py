"""`python -m trainer evidence --output DIR`: every run that is not done yet, then the tables."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from trainer.evidence.runs import METHODS, Plan, draw, make_models
from trainer.evidence.runs import run as run_one
from trainer.prepare.maps.tasks import DIFFICULTIES, TASKS

HELP = "train plain and by every method on drawn tasks, and table the held-out figures"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Plan)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument("--output", type=Path, required=True, help="folder for everything it makes")
    for name, text in (
        ("seeds", "runs of each task and method"),
        ("steps", "optimizer steps of every run"),
        ("batch_size", "samples in a step"),
        ("samples", "training drawings of each task"),
        ("test", "held-out drawings of each task"),
        ("size", "pixels of a drawing's side"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=int, default=DEFAULTS[name], help=f"{text} ({DEFAULTS[name]})"
        )
    parser.add_argument(
        "--difficulty", choices=DIFFICULTIES, default=DEFAULTS["difficulty"], help="of the drawings"
    )
    for name, known in (("tasks", TASKS), ("methods", METHODS)):
        text = f"some of {', '.join(known)} (all)"
        parser.add_argument(f"--{name}", nargs="+", default=tuple(known), metavar="NAME", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Draws, runs what is not done, and writes the tables after every run and the picture last."""
    import torch

    from trainer.evidence.tables import plot, write_tables

    torch.set_num_threads(1)  # layers this small take longer to hand to threads than to compute
    values = {name: getattr(arguments, name) for name in DEFAULTS}
    plan = Plan(**{**values, "tasks": tuple(values["tasks"]), "methods": tuple(values["methods"])})
    draw(plan)
    make_models(plan)
    pairs = plan.pairs()
    todo = [(task, method, seed) for seed in range(plan.seeds) for task, method in pairs]
    results: list[dict[str, Any]] = []
    for number, (task, method, seed) in enumerate(todo, start=1):
        print(f"Run {number} of {len(todo)}: {task}, {method}, seed {seed}", flush=True)
        results.append(run_one(plan, task, method, seed))
        table = write_tables(plan, results, _command(plan))
    print(f"Table: {table}\nPicture: {plot(plan, results)}")


def _command(plan: Plan) -> str:
    """The command line of a plan, without the folder."""
    words = ["python -m trainer evidence --output DIR"]
    for name, default in DEFAULTS.items():
        value = getattr(plan, name)
        if name != "output" and value != default:
            shown = " ".join(value) if isinstance(value, tuple) else value
            words.append(f"--{name.replace('_', '-')} {shown}")
    return " ".join(words)
