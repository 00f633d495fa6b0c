"""`groundkern train`, `demo`, `look`, `prepare`, `inspect`, `doctor`, `evaluate`, `heads`,
`evidence`, `env`.

Only the chosen command is imported: torch and transformers take seconds, and most commands need
neither, or not at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError

_FIELDS = "Every field of the YAML file can also be given as --section.field VALUE:\n"
_TOOLS = {
    "inspect": "groundkern.trainer.inspection.command",
    "doctor": "groundkern.trainer.doctor.command",
    "evaluate": "groundkern.trainer.evaluation.command",
    "heads": "groundkern.trainer.heads.command",
    "evidence": "groundkern.trainer.evidence.command",
    "env": "groundkern.environment",
}
_COMMANDS = ("train", "demo", "prepare", "look", *_TOOLS)
_BY_SEVERAL = ("train", "evaluate", "evidence")  # that several processes may run together


def main(words: list[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status.

    0: done. 1: the data or the model stopped the run. 2: bad settings. 130, 143: stopped by Ctrl-C
    or SIGTERM.
    """
    words = sys.argv[1:] if words is None else words
    parser = _parser(words)
    arguments, overrides = parser.parse_known_args(words)
    if overrides and arguments.command not in ("train", "demo"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if _several() and arguments.command not in _BY_SEVERAL:
            raise ConfigError(
                f"groundkern {arguments.command} does not run under torchrun; "
                f"{', '.join(_BY_SEVERAL)} do"
            )
        if arguments.command == "train":
            if arguments.config is None and not overrides:
                raise ConfigError("train: give --config FILE, or --help for the fields")
            return _guarded(_train(arguments.config, overrides, words))
        if arguments.command == "demo":
            return _guarded(_demo(arguments.output, arguments.samples, overrides))
        return _guarded(lambda: arguments.run(arguments))
    except ConfigError as error:
        _say(error, f"error: {error}")
        return 2


def run() -> int:
    """`main` as the program: of several processes, one that fails ends at once."""
    status = main()
    if status and _several():  # the others notice, and torchrun takes this one's status
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _several() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _say(error: BaseException, sentence: str) -> None:
    """Prints what a command ends with: of several processes that end alike one does."""
    alone = os.environ.get("LOCAL_RANK", "0") == "0"  # of those that have not met yet
    if not getattr(error, "told", not alone):
        print(sentence, file=sys.stderr)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `words` choose; of all commands if they choose none."""
    parser = argparse.ArgumentParser(
        prog="groundkern",
        description="Fine-tune a vision-language model with grounding supervision.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name in _COMMANDS:
        if chosen in (None, name):
            _add(name, commands)
        else:
            commands.add_parser(name)  # an error names all
    return parser


def _add(name: str, commands: Any) -> None:
    """Adds one command with its arguments."""
    if name in _TOOLS:
        tool = import_module(_TOOLS[name])
        added = commands.add_parser(name, help=tool.HELP, allow_abbrev=False)
        tool.add_arguments(added)
        added.set_defaults(run=tool.run)
    elif name == "prepare":
        from groundkern.trainer import teaching
        from groundkern.trainer.prepare.command import add_commands

        made = commands.add_parser(name, help="make samples from images and texts")
        add_commands(made, {"teach": teaching})
    elif name == "look":
        from groundkern.trainer.command_line import add_look

        add_look(commands).set_defaults(run=_look)
    else:
        from groundkern.trainer.command_line import help_text

        texts = {
            "train": "run what a YAML file describes",
            "demo": "make data and a tiny model, train plain and grounded, compare",
        }
        added = commands.add_parser(
            name,
            help=texts[name],
            allow_abbrev=False,
            epilog=f"{_FIELDS}\n{help_text()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == "train":
            added.add_argument("--config", type=Path, help="YAML file of settings")
            return
        from groundkern.trainer.demo.make import SAMPLES

        added.add_argument(
            "--output", type=Path, required=True, help="folder for everything it makes"
        )
        added.add_argument("--samples", type=int, default=SAMPLES, help="training samples to make")


def _look(arguments: argparse.Namespace) -> None:
    from groundkern.trainer.look import run_look

    print(f"Picture: {run_look(arguments)}")


def _train(
    config_file: Path | None, overrides: list[str], words: list[str]
) -> Callable[[], int | None]:
    from groundkern.trainer import launching
    from groundkern.trainer.command_line import load_config

    config = load_config(config_file, overrides)
    if launching.wanted(config):
        return lambda: launching.launch(config, words)

    def run() -> None:
        from groundkern.trainer.train import train

        if (report := train(config)) is not None:
            print(f"Report: {report}")

    return run


def _demo(output: Path, samples: int, overrides: list[str]) -> Callable[[], None]:
    def run() -> None:
        from groundkern.trainer.comparison import demo

        print(f"Report: {demo(output, overrides, samples=samples)}")

    return run


def _guarded(run: Callable[[], int | None]) -> int:
    """Runs; a stop or a data error becomes one sentence and an exit status."""
    from groundkern.hf.watching.plain import DivergedError
    from groundkern.trainer.data.images import SampleError
    from groundkern.trainer.durable import StorageError
    from groundkern.trainer.errors import RankError
    from groundkern.trainer.stopping import Stopped, StopSignals

    try:
        with StopSignals().installed():
            return run() or 0
    except (DivergedError, RankError, SampleError, StorageError) as error:
        _say(error, f"error: {error}")
        return 1
    except OSError as error:  # a file that went away or cannot be read or written
        if error.filename is None:
            raise
        _say(error, f"error: {error.filename}: {error.strerror}")
        return 1
    except (ValueError, TypeError) as error:
        if not str(error).startswith("`"):  # groundkern's own errors are sentences for the user
            raise
        _say(error, f"error: {error}")
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        number, saved = getattr(stop, "number", signal.SIGINT), getattr(stop, "saved", "")
        where = f"saved in {saved}; the same command continues from there"
        name = signal.Signals(number).name
        _say(stop, f"Stopped by {name}: {where if saved else 'nothing was saved yet'}.")
        return 128 + number
