"""`groundkern evidence --output DIR`: every curve that is not done yet, then the tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from groundkern.trainer import run_folder as folder
from groundkern.trainer.evidence.plan import Preset
from groundkern.trainer.evidence.presets import PRESETS, chosen

if TYPE_CHECKING:
    from groundkern.trainer.ranks import Ranks

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

    Tables and page are always of the whole preset, whatever part of it is run (`next` is a part of
    `cpu`). The same command may
    be started once for every core, or under `torchrun`: each process makes curves that no other one
    makes. Under `torchrun` the first one writes the page, when the others are done.

    Raises:
        ConfigError: the output holds curves of other settings, or the page those of another preset.
        RankError: another process ended.
        Stopped: Ctrl-C or SIGTERM; the same command continues.
    """
    from groundkern.trainer.ranks import joined

    with joined(accelerator=True) as ranks:
        _run(arguments, ranks)


def _run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    import torch

    from groundkern.trainer.evidence.curves import JSON, take
    from groundkern.trainer.evidence.tables import check_page, write_tables
    from groundkern.trainer.stopping import Stopped

    torch.set_num_threads(1)  # layers this small take longer to hand to threads than to compute
    picked = chosen(arguments.preset, arguments.studies, arguments.methods, arguments.seeds)
    preset = PRESETS[PRESETS[arguments.preset].of or arguments.preset]
    wanted = arguments.seeds or 0
    studies = (replace(s, seeds=max(preset.seeds_of(s), wanted)) for s in preset.studies)
    preset = replace(preset, studies=tuple(studies))
    output = arguments.output
    tables = output / JSON  # what all processes write: one at a time

    def begin() -> None:
        if arguments.page is not None:
            check_page(arguments.page, preset)
        with folder.claimed(tables, wait=True):
            if arguments.page is not None and (taken := take(arguments.page, output, preset)):
                print(f"{taken} curves of {arguments.page} are taken as they are")
            write_tables(output, preset)

    ranks.alone(begin, "the curves of the page")
    if not arguments.tables:
        try:
            for _ in _curves(output, picked):
                with folder.claimed(tables, wait=True):
                    write_tables(output, preset)
        except Stopped as stopped:
            stopped.saved = str(output)
            raise
    ranks.wait("the last curve")
    ranks.alone(lambda: _finish(output, preset, arguments.page), "the page")


def _finish(output: Path, preset: Preset, page: Path | None) -> None:
    """Writes tables, pictures and page with the last curves of all processes."""
    from groundkern.trainer.evidence.clips import draw_clips
    from groundkern.trainer.evidence.curves import JSON, stored
    from groundkern.trainer.evidence.tables import plot, put_on_page, write_tables

    with folder.claimed(output / JSON, wait=True):
        table, curves = write_tables(output, preset), stored(output, preset)
        picture = plot(output, preset, curves)
        draw_clips(output, preset, curves)
        if page is not None:
            put_on_page(page, output, preset)
    print(f"Table: {table}\nPicture: {picture}")


def _curves(output: Path, preset: Preset) -> Iterator[None]:
    """Makes every curve that is not done and no other process makes, and yields after each."""
    from groundkern.trainer.evidence.runs import Desk

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
