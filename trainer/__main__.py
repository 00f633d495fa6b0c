"""`python -m trainer train`, `demo`, `look`, `prepare`, `inspect`, `evaluate` and `evidence`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.command_line import add_look, help_text, load_config
from trainer.config import ConfigError
from trainer.demo.make import SAMPLES
from trainer.evaluation import command as evaluation
from trainer.evidence import command as evidence
from trainer.inspection import command as inspection
from trainer.prepare.command import add_commands

_FIELDS = "Every field of the YAML file can also be given as --section.field VALUE:\n"


def main(words: list[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status.

    0: done. 1: the data or the model stopped the run. 2: bad settings. 130, 143: stopped by Ctrl-C
    or SIGTERM.
    """
    parser = _parser()
    arguments, overrides = parser.parse_known_args(words)
    if overrides and arguments.command not in ("train", "demo"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.command != "evaluate":
            raise ConfigError(
                f"python -m trainer {arguments.command} does not run under torchrun; evaluate "
                "does, and training by groundkern.hf.GroundingTrainer"
            )
        if arguments.command == "train":
            if arguments.config is None and not overrides:
                raise ConfigError("train: give --config FILE, or --help for the fields")
            return _guarded(_train(arguments.config, overrides))
        if arguments.command == "demo":
            return _guarded(_demo(arguments.output, arguments.samples, overrides))
        return _guarded(lambda: arguments.run(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Fine-tune a vision-language model with grounding supervision.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    settings = {
        "allow_abbrev": False,
        "epilog": f"{_FIELDS}\n{help_text()}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    train = commands.add_parser("train", help="run what a YAML file describes", **settings)
    train.add_argument("--config", type=Path, help="YAML file of settings")
    demo = commands.add_parser(
        "demo", help="make data and a tiny model, train plain and grounded, compare", **settings
    )
    demo.add_argument("--output", type=Path, required=True, help="folder for everything it makes")
    demo.add_argument("--samples", type=int, default=SAMPLES, help="training samples to make")
    add_commands(commands.add_parser("prepare", help="make samples from images and texts"))
    add_look(commands).set_defaults(run=_look)
    tools = (("inspect", inspection), ("evaluate", evaluation), ("evidence", evidence))
    for name, tool in tools:
        added = commands.add_parser(name, help=tool.HELP, allow_abbrev=False)
        tool.add_arguments(added)
        added.set_defaults(run=tool.run)
    return parser


def _look(arguments: argparse.Namespace) -> None:
    from trainer.look import run_look

    print(f"Picture: {run_look(arguments)}")


def _train(config_file: Path | None, overrides: list[str]) -> Callable[[], None]:
    config = load_config(config_file, overrides)

    def run() -> None:
        from trainer.train import train

        print(f"Report: {train(config)}")

    return run


def _demo(output: Path, samples: int, overrides: list[str]) -> Callable[[], None]:
    def run() -> None:
        from trainer.comparison import demo

        print(f"Report: {demo(output, overrides, samples=samples)}")

    return run


def _guarded(run: Callable[[], int | None]) -> int:
    """Runs; a stop or a data error becomes one sentence and an exit status."""
    from groundkern.hf import DivergedError
    from trainer.data.images import SampleError
    from trainer.durable import StorageError
    from trainer.evaluation.ranks import RankError
    from trainer.stopping import Stopped, StopSignals

    try:
        with StopSignals().installed():
            return run() or 0
    except (DivergedError, RankError, SampleError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a file that went away or cannot be read or written
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except (ValueError, TypeError) as error:
        if not str(error).startswith("`"):  # groundkern's own errors are sentences for the user
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        number, saved = getattr(stop, "number", signal.SIGINT), getattr(stop, "saved", "")
        where = f"saved in {saved}; the same command continues from there"
        name = signal.Signals(number).name
        print(f"Stopped by {name}: {where if saved else 'nothing was saved yet'}.", file=sys.stderr)
        return 128 + number


if __name__ == "__main__":
    sys.exit(main())
