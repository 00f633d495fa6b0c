"""Settings from the command line: `--section.field value` over a YAML file, and their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from trainer.config import (
    Config,
    ConfigError,
    members,
    read_yaml,
    section_of,
    show,
    unknown_field,
    validate,
    walk_fields,
)

SHORT_FLAGS = {"on-bad-sample": "data.on_bad_sample"}


def load_config(path: Path | None, words: list[str]) -> Config:
    """The `Config` of a YAML file with command line overrides laid over it.

    Args:
        path: the YAML file; None starts from nothing.
        words: command line words, `--a.b value` or `--a.b=value`.

    Raises:
        ConfigError: one sentence that names the field, what was wanted and what was given.
    """
    overrides = parse_overrides(words)
    values = read_yaml(path) if path is not None else {}
    for name, value in overrides:
        place(values, name, value)
    return validate(values, source=str(path) if path is not None else "command line")


def parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    """(dotted name, value) pairs of command line words; pydantic converts the values later."""
    known, pairs, rest = {name for name, _ in walk_fields()}, [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"command line: expected --section.field, got {word!r}")
        flag, equals, value = word[2:].partition("=")
        name = SHORT_FLAGS.get(flag, flag)
        if name not in known:
            raise ConfigError(f"command line: {unknown_field(name)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"command line: `{name}`: expected a value, got none")
            value = rest.pop(0)
        pairs.append((name, _plain(value)))
    return pairs


def place(values: dict, name: str, value: Any) -> None:
    """Sets a dotted name in nested dicts; a section that is off (null) is switched on."""
    *sections, last = name.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def help_text() -> str:
    """All fields with type, meaning and default, one line each."""
    lines = []
    for name, field in walk_fields():
        section = section_of(field)
        if section is None:
            default = (
                "required" if field.is_required() else f"default {show(_plain_default(field))}"
            )
            lines.append(f"  --{name} <{_type_name(field)}>  {field.description} ({default})")
        elif field.default is None:
            lines.append(f"  --{name} '{{}}'  {field.description} (off; any field switches it on)")
    return "\n".join(lines)


def _plain_default(field: Any) -> Any:
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _type_name(field: Any) -> str:
    names = []
    for kind in members(field.annotation):
        if kind is type(None):
            names.append("null")
        elif get_origin(kind) is Literal:
            names.extend(get_args(kind))
        elif get_origin(kind) in (list, tuple):
            names.append("list")
        else:
            names.append({Path: "path", str: "text", bool: "true|false"}.get(kind, kind.__name__))
    return "|".join(names)


def _plain(text: str) -> Any:
    if text == "null":
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"command line: expected a YAML value, got {text!r}") from None


def add_look(commands: Any) -> argparse.ArgumentParser:
    """The `look` sub-command, added to a parser's sub-commands."""
    look = commands.add_parser(
        "look",
        help="draw where a model looks when it answers",
        description="Attention, GradCAM and logit contributions of an answer's tokens, drawn over "
        "the image (docs/look.md).",
        allow_abbrev=False,
    )
    look.add_argument("--model", required=True, help="folder of a model with its processor")
    look.add_argument("--image", type=Path, required=True, help="image file")
    look.add_argument("--prompt", required=True, help="what the user asks")
    look.add_argument("--answer", help="the answer to explain; default: the model's own, greedy")
    look.add_argument(
        "--token",
        action="append",
        type=int,
        help="number of an answer token, as the table counts them; may be repeated; default: all",
    )
    look.add_argument(
        "--region",
        action="append",
        default=[],
        metavar="X0,Y0,X1,Y1",
        help="box that the answer speaks of, for the metrics; may be repeated",
    )
    look.add_argument(
        "--coord", choices=("pixel", "unit", "per_mille"), default="pixel", help="of --region"
    )
    look.add_argument("--layers", help="layers that count, for example 0,8,15-20; default: all")
    look.add_argument("--per-layer", action="store_true", help="one row of pictures per layer too")
    look.add_argument("--output", type=Path, default=Path("look.png"), help="PNG to write")
    look.add_argument("--max-new-tokens", type=int, default=32, help="of the model's own answer")
    look.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    look.add_argument("--device", default="cpu", help="for example cuda")
    return look
