"""Settings of a run: a YAML file with `--section.field value` laid over it, and their help.

pydantic-settings makes a flag of every field of `Config` and reads the command line; this file adds
one sentence for each mistake, with the line of the file or the flag it is in.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from groundkern.trainer.config import Config, ConfigError, Loc, validate
from groundkern.trainer.fields import unknown_field
from groundkern.trainer.settings_file import parse_yaml, read_yaml
from groundkern.trainer.video_options import add_videos
from groundkern.trainer.wording import cut, short

_NULL = "default: null (undefined)"  # what pydantic-settings says of a section that is off
MAPPINGS = ("training.arguments", "model.image_options")  # fields with names of others
LISTS_OR_WORDS = ("data.train", "objectives.klal.chosen_heads", "objectives.distill.layers")
SHORT_FLAGS = {"data.on_bad_sample": "on-bad-sample"}


class _Flags(BaseSettings, Config):
    """The fields of `Config`, as pydantic-settings wants them."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def load_config(path: Path | None, words: list[str]) -> Config:
    """The `Config` of a YAML file with command line overrides laid over it.

    Args:
        path: the YAML file; None starts from nothing.
        words: command line words, `--a.b value` or `--a.b=value`.

    Raises:
        ConfigError: one sentence that says where, which field, what was wanted and what was given.
    """
    given = parse_flags(words)
    values, lines = read_yaml(path) if path is not None else ({}, {})
    return validate(merged(values, given), where=Places(path, lines, given))


class Places:
    """Where a field was given, as the start of an error message.

    Args:
        path: the YAML file, if any.
        lines: the line of each of its fields, by path from the root.
        given: nested values of the command line.
    """

    def __init__(self, path: Path | None, lines: dict[Loc, int], given: dict) -> None:
        self._path, self._lines, self._given = path, lines, given

    def __call__(self, loc: Loc) -> str:
        inner: Any = self._given
        for name in loc:
            inner = inner.get(name) if isinstance(inner, dict) else inner
        if inner is not None or self._path is None:
            return "command line"
        while loc and loc not in self._lines:
            loc = loc[:-1]
        return f"{self._path}:{self._lines[loc]}" if loc else str(self._path)


def parse_flags(words: list[str]) -> dict[str, Any]:
    """The nested values of command line words; texts, which pydantic converts later.

    Raises:
        ConfigError: a word that is no flag, no such field, or a flag without its value.
    """
    source = _source()
    try:
        source(args=[_json(word) for word in _within(words)])
        return source()
    except SettingsError as error:  # not a list or a mapping
        raise ConfigError(f"command line: {cut(str(error))}") from None


def merged(values: dict, over: dict) -> dict:
    """Nested values with others laid over them; a section that is off (null) is switched on."""
    inner = {
        name: merged(values.get(name) or {}, value) if isinstance(value, dict) else value
        for name, value in over.items()
    }
    return values | inner


def help_text() -> str:
    """All fields with type, meaning and default, section by section."""
    text = _source().root_parser.format_help().replace(_NULL, "off unless a field is given:")
    return text.partition("\n\n")[2].rstrip()  # without its usage, which names every flag again


@cache
def _source() -> CliSettingsSource:
    parser = argparse.ArgumentParser(
        usage="", add_help=False, allow_abbrev=False, exit_on_error=False
    )
    return CliSettingsSource(
        _Flags,
        root_parser=parser,
        parse_args_method=_parse,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_shortcuts=SHORT_FLAGS,
    )


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").removeprefix("--")
        raise ConfigError(f"command line: `{name}`: expected a value, got none") from None
    if rest and not rest[0].startswith("--"):
        raise ConfigError(f"command line: expected --section.field, got {short(rest[0])}")
    if rest:
        raise ConfigError(f"command line: {unknown_field(rest[0][2:].partition('=')[0], Config)}")
    for name, value in vars(found).items():
        if isinstance(value, list) and value[-1] == "null":  # else a list of one null
            setattr(found, name, "null")
        elif name in LISTS_OR_WORDS and isinstance(value, list) and not value[-1].startswith("["):
            setattr(found, name, json.dumps(value[-1]))  # one word or path, maybe with a comma
    return found


def _within(words: list[str]) -> list[str]:
    """The words with `--training.arguments.NAME VALUE` as `--training.arguments {NAME: VALUE}`."""
    found: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        flag, equals, value = word.partition("=")
        field, _, name = flag.removeprefix("--").rpartition(".")
        if not word.startswith("--") or field not in MAPPINGS:
            found.append(word)
            continue
        if not equals and not pending:
            raise ConfigError(f"command line: `{field}.{name}`: expected a value, got none")
        value = value if equals else pending.pop(0)
        try:
            found += [f"--{field}", json.dumps({name: yaml.safe_load(value)})]
        except (yaml.YAMLError, TypeError, ValueError, RecursionError):
            wanted = "expected a YAML value"
            raise ConfigError(
                f"command line: {field}.{name}: {wanted}, got {short(value)}"
            ) from None
    return found


def _json(word: str) -> str:
    """A word whose value is a list or mapping in YAML, `[q_proj, v_proj]`, with it in JSON."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if not value.startswith(("[", "{")):
        return word
    try:
        found, _ = parse_yaml(value, lambda line: "command line")
        return f"{flag}{equals}{json.dumps(found)}"
    except (yaml.YAMLError, TypeError, ValueError):
        raise ConfigError(f"command line: expected a YAML value, got {short(value)}") from None


def add_look(commands: Any) -> argparse.ArgumentParser:
    """The `look` sub-command, added to a parser's sub-commands."""
    look = commands.add_parser(
        "look",
        help="draw where a model looks when it answers",
        description="Attention, GradCAM and logit contributions of an answer's tokens, drawn over "
        "the image (docs/running/look.md).",
        allow_abbrev=False,
    )
    look.add_argument("--model", required=True, help="folder of a model with its processor")
    seen = look.add_mutually_exclusive_group(required=True)
    seen.add_argument("--image", type=Path, nargs="+", help="image file, one")
    seen.add_argument("--video", type=Path, help="video file, or folder of frames, as --video-fps")
    add_videos(look)
    look.add_argument("--time", metavar="T0,T1", help="seconds of the video that are the target")
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
    look.add_argument(
        "--mask",
        action="append",
        type=Path,
        default=[],
        metavar="PNG",
        help="pixels that the answer speaks of, for the metrics; may be repeated",
    )
    look.add_argument(
        "--mask-value", type=int, help="of the pixels of --mask that are inside; default: not 0"
    )
    look.add_argument(
        "--heat",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="grey PNG or .npy: inside is what is at least half as hot as its hottest pixel",
    )
    look.add_argument("--layers", help="layers that count, for example 0,8,15-20; default: all")
    look.add_argument("--per-layer", action="store_true", help="one row of pictures per layer too")
    look.add_argument("--output", type=Path, default=Path("look.png"), help="PNG to write")
    look.add_argument("--max-new-tokens", type=int, default=32, help="of the model's own answer")
    look.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    look.add_argument("--device", default="cpu", help="for example cuda")
    return look
