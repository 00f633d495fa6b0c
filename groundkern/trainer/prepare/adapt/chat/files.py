"""Files of records: JSON arrays, JSON lines, Parquet, Arrow, folders of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE, read_lines
from groundkern.trainer.data.file_kinds import ADVICE, HEAD, kind_of
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import decode_line
from groundkern.trainer.prepare.adapt.chat.dialects import dialect_of, is_preference
from groundkern.trainer.prepare.adapt.common import Options, tables
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import TABLES, Source, json_lines, listed
from groundkern.trainer.wording import short

KEYS = ("data", "annotations", "samples", "train")  # that a file may have its array under
FIRST, BYTES = 256, 4 * 2**20  # records, and about as many bytes, that say what a file is
PACKED = (
    (b"\x1f\x8b", "a gzip archive, which has to be unpacked first"),
    (b"PK\3\4", "a zip archive, which has to be unpacked first"),
    (b"BZh", "a bzip2 archive, which has to be unpacked first"),
    (b"\xfd7zXZ", "an xz archive, which has to be unpacked first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive, which has to be unpacked first"),
    (b"PAR1", "Parquet, whose name has to end with .parquet"),
    (b"\xff\xfe", "a text in UTF-16, which has to be saved as UTF-8 first"),
    (b"\xfe\xff", "a text in UTF-16, which has to be saved as UTF-8 first"),
)
LONG, MANY = 1000, 100  # characters of a text and parts of a list that are looked at for that


def open_records(options: Options) -> Source:
    """The records of a file or folder; no more is read than where each begins.

    Raises:
        ConfigError: it cannot be read, or is none of these.
    """
    path = options.data
    if (rows := tables(options)) is not None:
        return rows
    if path.is_dir():
        raise ConfigError(f"{path}: expected Parquet or Arrow files in the folder, got none")
    if is_lines(path):
        return json_lines(path, unique=None)
    key = None if _begin(path) == "[" else _key(path)

    def read() -> Iterator[tuple[str, Any]]:
        for i, record in enumerate(json_array(path, key)):
            yield f"{path.name}[{i}]", record

    return listed(read, [path])


def first_records(options: Options) -> list[Any]:
    """The first records that can be read, with long texts cut: enough to tell what they are."""
    if not options.data.is_dir() and is_lines(options.data):
        found = _first_lines(options.data)
    else:
        items = islice(open_records(options).read(), FIRST)
        found = (item.value for item in items if item.problem is None)
    return list(map(_light, found))


def is_lines(path: Path) -> bool:
    """Whether a file is read as JSON lines: all that is not a table, an array, or an object with
    one.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.suffix in TABLES:
        return False
    begin = _begin(path)
    if begin == "[":  # an array on a line of its own with more behind it is a bad line
        return len(list(islice(read_lines(path, BYTES), 2))) == 2 and _value(path) is not None
    return begin != "{" or _key(path) is None


def unlike_json(path: Path) -> str | None:
    """What a file without a readable record is instead of JSON; None: it is JSON, but damaged, or
    it is empty.

    Raises:
        ConfigError: it cannot be read.
    """
    begin = _begin(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = next((kind for start, kind in PACKED if head.startswith(start)), None)
    if kind is None and (known := kind_of(head)) is not None:
        kind = ADVICE.get(known, f"a {known} image")
    line = head.strip().partition(b"\n")[0].rstrip()
    shown = short(line[:80].decode("utf-8", "replace"))
    if kind is None and begin not in ("", "{", "["):
        kind = f"a file that begins with {shown}"
    if kind is None and line.endswith((b"{", b"[", b",")) and _value(path) is None:
        kind = f"an object over several lines, the first of them {shown}"
    return kind and f"expected a JSON array, one JSON object a line, Parquet or Arrow, got {kind}"


def _begin(path: Path) -> str:
    """The first character of a file that is not space; "" if there is none."""
    try:
        with path.open("rb") as file:
            while block := file.read(4096):
                if text := block.removeprefix(b"\xef\xbb\xbf").strip():
                    return chr(text[0])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return ""


def _value(path: Path) -> Any:
    """The value of the first line that is not blank; None if it is not JSON."""
    _, _, line = next(read_lines(path, MAX_LINE))
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        return None


def _key(path: Path) -> str | None:
    """The name under which a JSON object has the array of records; None if it has none."""
    first = _value(path)
    if dialect_of(first) or is_preference(first):
        return None
    return next((key for key in KEYS if _has_array(path, key)), None)


def _has_array(path: Path, key: str) -> bool:
    try:
        next(json_array(path, key), None)
    except (ConfigError, SampleError):
        return False
    return True


def _first_lines(path: Path) -> Iterator[Any]:
    for _, offset, line in islice(read_lines(path), FIRST):
        try:
            yield decode_line(line, path.name)
        except SampleError:
            continue
        if offset > BYTES:
            return


def _light(value: Any) -> Any:
    """A plain value with the beginnings of its texts and lists."""
    try:
        if isinstance(value, str | bytes):
            return value[:LONG]
        if isinstance(value, list):
            return [_light(each) for each in value[:MANY]]
        if isinstance(value, dict):
            return {name: _light(each) for name, each in value.items()}
    except RecursionError:
        return None
    return value
