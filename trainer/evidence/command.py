"""`python -m trainer evidence --output DIR`: every curve that is not done yet, then the tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from trainer import run_folder as folder
from trainer.evidence.plan import Preset
from trainer.evidence.presets import PRESETS, chosen

HELP = "fine-tune with and without each method on drawn tasks: answers right against steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sub-command."""
    parser.add_argument("--output", type=Path, required=True, help="folder for everything it makes")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="how large, see docs/evidence.md (cpu)"
    )
    parser.add_argument(
        "--studies", nargs="+", metavar="NAME", help="only these, by the names of their tables"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="only these, and plain: klal, dv_sft, ..."
    )
    parser.add_argument("--seeds", type=int, help="runs of each method (the preset's)")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="a Markdown page that gets tables, pictures and curves; its curves are not made again",
    )
    parser.add_argument(
        "--tables", action="store_true", help="train nothing: the tables of the curves there are"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs what is not done, and writes the tables after every curve and the pictures last.

    Tables and page are always of the whole preset, whatever part of it is run. The same command may
    be started once for every core: each process makes curves that no other one makes.

    Raises:
        ConfigError: the output holds curves of other settings, or the page those of another preset.
        Stopped: Ctrl-C or SIGTERM; the same command continues.
    """
    import torch

    from trainer.evidence.curves import JSON, stored, take
    from trainer.evidence.tables import check_page, plot, put_on_page, write_tables
    from trainer.stopping import Stopped

    torch.set_num_threads(1)  # layers this small take longer to hand to threads than to compute
    picked = chosen(arguments.preset, arguments.studies, arguments.methods, arguments.seeds)
    preset = PRESETS[arguments.preset]
    wanted = arguments.seeds or 0
    studies = (replace(s, seeds=max(preset.seeds_of(s), wanted)) for s in preset.studies)
    preset = replace(preset, studies=tuple(studies))
    output = arguments.output
    if arguments.page is not None:
        check_page(arguments.page, preset)
    tables = output / JSON  # what all processes write: one at a time
    with folder.claimed(tables, wait=True):
        if arguments.page is not None and (taken := take(arguments.page, output, preset)):
            print(f"{taken} curves of {arguments.page} are taken as they are")
        table = write_tables(output, preset)
    if not arguments.tables:
        try:
            for _ in _curves(output, picked):
                with folder.claimed(tables, wait=True):
                    write_tables(output, preset)
        except Stopped as stopped:
            stopped.saved = str(output)
            raise
    with folder.claimed(tables, wait=True):
        write_tables(output, preset)  # with the last curves of other processes
        picture = plot(output, preset, stored(output, preset))
        if arguments.page is not None:
            put_on_page(arguments.page, output, preset)
    print(f"Table: {table}\nPicture: {picture}")


def _curves(output: Path, preset: Preset) -> Iterator[None]:
    """Makes every curve that is not done and no other process makes, and yields after each."""
    from trainer.evidence.runs import Desk

    runs, others = list(preset.runs()), 0
    desks: dict[str, Desk] = {}
    for number, (study, method, seed) in enumerate(runs, start=1):
        desk = desks.setdefault(study.name, Desk(output, study))
        with folder.claimed(desk.path(method, seed)) as own:
            others += not own
            if own and not desk.finished(method, seed):
                where = f"{study.name}, {method}, seed {seed}"
                print(f"Curve {number} of {len(runs)}: {where}", flush=True)
                desk.curve(method, seed)
                yield
    if others:
        print(f"{others} curves are being made by other processes; --tables shows them later")
