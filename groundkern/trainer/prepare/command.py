"""The sub-commands of `groundkern prepare`.

A command is a module with `HELP` (one line), `add_arguments(parser)` and `run(arguments) -> int`
(the exit status), which imports what is heavy inside `run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import ModuleType

from groundkern.trainer.prepare import render, words
from groundkern.trainer.prepare.adapt import command as adapt
from groundkern.trainer.prepare.gaze import command as gaze
from groundkern.trainer.prepare.maps import command as maps
from groundkern.trainer.prepare.marks import command as marks
from groundkern.trainer.prepare.phrases import command as phrases

COMMANDS = {
    "words": words,
    "render": render,
    "marks": marks,
    "phrases": phrases,
    "maps": maps,
    "adapt": adapt,
    "gaze": gaze,
}


def add_commands(parser: argparse.ArgumentParser, more: Mapping[str, ModuleType]) -> None:
    """Adds every command of `COMMANDS` below `prepare`.

    Args:
        parser: of `prepare`.
        more: commands that are on top of others of the program, and so not in this package.
    """
    commands = parser.add_subparsers(dest="prepare_command", required=True)
    for name, module in {**COMMANDS, **more}.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            allow_abbrev=False,
            formatter_class=_Defaults,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: not those of switches, and not None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)
