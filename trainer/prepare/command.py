"""The sub-commands of `python -m trainer prepare`, and the arguments that they share.

A command is a module or package `trainer.prepare.<name>` with `HELP` (one line),
`add_arguments(parser)` and `run(arguments) -> int` (the exit status), which imports what is heavy
inside `run`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.prepare.output import Output
    from trainer.prepare.pipeline import Work
    from trainer.prepare.sources import Source

COMMANDS = (
    "words",
    "render",
    "maps",
    "adapt",
)
# Arguments that decide how, not what: a rerun may change them.
FREE_TO_CHANGE = (
    "command",
    "prepare_command",
    "run",
    "output",
    "workers",
    "on_bad_sample",
    "overwrite",
)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds every command of `COMMANDS` below `prepare`."""
    commands = parser.add_subparsers(dest="prepare_command", required=True)
    for name in COMMANDS:
        module = import_module(f"trainer.prepare.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            allow_abbrev=False,
            formatter_class=_Defaults,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds `--output`, `--workers`, `--on-bad-sample` and `--overwrite`."""
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file to make")
    parser.add_argument("--workers", type=positive(int), default=_cores(), help="processes")
    parser.add_argument(
        "--on-bad-sample",
        choices=("skip", "stop"),
        default="skip",
        help="reject it and go on, or stop",
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, whatever is there")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the output, as plain values: the arguments but `FREE_TO_CHANGE`."""
    kept = {name: _plain(v) for name, v in vars(arguments).items() if name not in FREE_TO_CHANGE}
    return {"command": arguments.prepare_command, **kept}


def run_work(
    arguments: argparse.Namespace,
    source: Source,
    work: Work,
    *,
    root: Path | None = None,
    unit: str = "input",
) -> Output:
    """`trainer.prepare.pipeline.prepare` with the common arguments, and a summary at its end."""
    from trainer.images import SampleError
    from trainer.prepare.pipeline import prepare

    try:
        out = prepare(
            source,
            work,
            output=arguments.output,
            settings=settings_of(arguments),
            root=root,
            workers=arguments.workers,
            on_bad_sample=arguments.on_bad_sample,
            overwrite=arguments.overwrite,
            unit=unit,
        )
    except OSError as error:
        raise SampleError(f"{error}; the same command continues from what is done") from None
    print(f"{out.path}: {out.samples:,} samples of {out.inputs:,} {unit}s")
    if out.rejected:
        print(f"{out.rejects}: {out.rejected:,} {unit}s that were not used, each with its reason")
    if root is not None and root.resolve() != out.path.parent.resolve():
        print(f"Image paths start from {root}: train with --data.root {root}")
    return out


def show_counts(counts: Mapping[str, float], titles: Mapping[str, str]) -> None:
    """Prints the counts that have a title, aligned."""
    for name, title in titles.items():
        if name in counts:
            print(f"{counts[name]:>12,}  {title}")


def positive(kind: type) -> Callable[[str], Any]:
    """An argument type: an int or a float above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it for a text that is no number
    return convert


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: not those of switches, and not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
