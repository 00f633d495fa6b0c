"""The options in docs/api/command-line.md, from the parsers that read them: `make docs-options`.

With `--check` nothing is written, and the exit status says whether the page is what it would be.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from groundkern.trainer import command_line, program

PAGE = Path(__file__).resolve().parents[1] / "api" / "command-line.md"
BLOCK = re.compile(r"(<!-- options:begin -->\n).*(?=<!-- options:end -->)", re.DOTALL)
DEFAULT = re.compile(r" *\((?:default: (.*)|required)\)$", re.DOTALL)
MOST = 100  # characters of a default that are shown


def page(text: str) -> str:
    """The page with its generated block made anew."""
    made = "\n".join([*_fields(), *_commands()])
    return BLOCK.sub(lambda match: f"{match[1]}\n{made}\n", text)


def _fields() -> Iterator[str]:
    """The fields of `groundkern train`, a table for each section."""
    yield "## groundkern train\n"
    yield "`--config CONFIG` names the YAML file. Its fields, each also `--section.field VALUE`:\n"
    parser = command_line._source().root_parser
    for group in parser._action_groups:
        title = (group.title or "").removesuffix(" options")
        rows = [row for action in group._group_actions if (row := _field(action, title))]
        if rows:
            yield f"### {title}\n"
            if group.description and "default: null" in group.description:
                yield "Off unless a field is given.\n"
            yield "| field | meaning | value | default |\n|---|---|---|---|"
            yield "\n".join(rows) + "\n"


def _field(action: argparse.Action, section: str) -> str | None:
    """The row of a field; None for a section as a whole, which its own table describes."""
    name = max(action.option_strings, key=len, default="").removeprefix("--")
    metavar = _metavar(action)
    if not name or (action.help or "").startswith("set ") or action.help is argparse.SUPPRESS:
        return None
    default = DEFAULT.search(action.help or "")
    meaning = DEFAULT.sub("", action.help or "")
    shown = "**required**" if default and default[1] is None else _code(default and default[1])
    shown = "`null`" if shown == "`None`" else shown
    name = _code(name.removeprefix(f"{section}."))
    return f"| {name} | {_cell(meaning)} | {_code(metavar)} | {shown} |"


def _commands() -> Iterator[str]:
    """The options of all other commands."""
    for name, parser in _subparsers(program._parser([]), "groundkern"):
        if name == "groundkern train":
            continue
        options = [
            action
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        yield f"## {name}\n"
        about = parser.description or parser.about
        yield _cell(about[0].upper() + about[1:]).rstrip(".") + ".\n"
        if name == "groundkern demo":
            yield "Every field of `groundkern train` can be given too.\n"
        if options:
            yield "| option | meaning | default |\n|---|---|---|"
            yield "\n".join(map(_option, options)) + "\n"


def _subparsers(
    parser: argparse.ArgumentParser, name: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, inner in action.choices.items():
                inner.about = texts.get(word, "")
                yield f"{name} {word}", inner
                yield from _subparsers(inner, f"{name} {word}")


def _option(action: argparse.Action) -> str:
    name = max(action.option_strings, key=len, default=action.dest)
    given = "" if action.nargs == 0 else f" {_metavar(action)}"
    empty = action.default is None or isinstance(action.default, bool) or action.default == []
    default = "**required**" if action.required else "" if empty else _code(str(action.default))
    return f"| {_code((name + given).strip())} | {_cell(action.help or '')} | {default} |"


def _metavar(action: argparse.Action) -> str:
    """What an option takes, as its help shows it: `FILE`, `{a,b}`."""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.rpartition(".")[2].upper() if action.option_strings else ""


def _code(text: str | None) -> str:
    text = "" if text is None else " ".join(text.split())
    text = text if len(text) <= MOST else text[: MOST - 4] + " ..."
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    text = " ".join(text.replace("%%", "%").split())
    parts = re.split(r"(`[^`]*`)", text)  # code at odd places
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*\[])", r"\\\1", parts[number]).replace("<", "&lt;")
    return "".join(parts).replace("|", r"\|")


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    made = page(text)
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    return made != text


if __name__ == "__main__":
    sys.exit(main())
