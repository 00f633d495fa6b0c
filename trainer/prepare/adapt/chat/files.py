"""Files of records: JSON arrays, JSON lines, Parquet, Arrow, folders of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.data.dataset import MAX_LINE
from trainer.prepare.adapt.chat.dialects import dialect_of, is_preference
from trainer.prepare.adapt.common import Options, tables
from trainer.prepare.reading import json_array
from trainer.prepare.sources import Source, json_lines, listed

KEYS = ("data", "annotations", "samples", "train")  # that a file may have its array under


def open_records(options: Options) -> Source:
    """The records of a file or folder; nothing is read but its beginning.

    Raises:
        ConfigError: it cannot be read, or is none of these.
    """
    path = options.data
    if (rows := tables(options)) is not None:
        return rows
    if path.is_dir():
        raise ConfigError(f"{path}: expected Parquet or Arrow files in the folder, got none")
    begin = first_character(path)
    if begin == "[":
        return _array(path, None)
    if begin == "{" and (key := _key(path)) is not None:
        return _array(path, key)
    return json_lines(path, unique=None)


def first_character(path: Path) -> str:
    """The first character of a file that is not space; "" if there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while block := file.read(4096):
                text = block.removeprefix(b"\xef\xbb\xbf").strip()
                if text:
                    return chr(text[0])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return ""


def _key(path: Path) -> str | None:
    """The name under which a JSON object has the array of records; None for JSON lines."""
    with path.open("rb") as file:
        line = file.readline(MAX_LINE).strip()
    try:
        first: Any = json.loads(line)
    except (ValueError, RecursionError):
        first = None
    if dialect_of(first) or is_preference(first):
        return None
    return next((key for key in KEYS if _has_array(path, key)), None)


def _has_array(path: Path, key: str) -> bool:
    try:
        next(json_array(path, key), None)
    except (ConfigError, ValueError):
        return False
    return True


def _array(path: Path, key: str | None) -> Source:
    def read() -> Iterator[tuple[str, Any]]:
        for i, record in enumerate(json_array(path, key)):
            yield f"{path.name}[{i}]", record

    return listed(read, [path])
