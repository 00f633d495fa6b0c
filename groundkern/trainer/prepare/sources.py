"""What a prepare command reads: JSON lines, a Hugging Face data set, values.

JSON lines are streamed here and not with `datasets.load_dataset("json")`, which infers one schema
for all rows (a region with `points` gives every other region a null `points`), stops the whole load
at the first bad line without naming it, and copies the file to its cache. `datasets` is used where
its own formats are the input: a folder of `save_to_disk`, Parquet and Arrow files.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE, check_length, read_lines
from groundkern.trainer.data.images import SampleError, wrong
from groundkern.trainer.data.sample import decode_line
from groundkern.trainer.wording import cut

TABLES = (".parquet", ".arrow")
ROWS = 16  # of a table in memory at once
LONGEST_PLACE = 300  # characters of `Item.where`


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        index: from 0, counted over all inputs, the unusable ones included.
        where: what starts every message about it, for example `train.jsonl:17`.
        value: the record, or whatever else the command reads.
        original: what goes to the rejected file if it cannot be used; None: `value`.
        problem: why it cannot be used, found while reading; starts with `where`.
        kind: see `Unusable`.
    """

    index: int
    where: str
    value: Any
    original: Any = None
    problem: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Source:
    """Inputs in a fixed order.

    Args:
        read: starts a fresh pass over the items.
        total: how many there are, None if that is not known.
        identity: plain values that differ when the inputs do; a continued run compares them.
        passed_over: what is no input, by the reason why; for the record.
    """

    read: Callable[[], Iterator[Item]]
    total: int | None
    identity: dict[str, Any]
    passed_over: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unusable:
    """Something in a source that is not an input, and why.

    Args:
        original: goes to the rejected file.
        reason: one sentence.
        kind: of things that are passed over by intent, such as crowds: counted under this name,
            and never what stops a run. None: the source is at fault.
    """

    original: Any
    reason: str
    kind: str | None = None


def open_source(path: Path, *, split: str | None = None, unique: str | None = "id") -> Source:
    """The source that a path means: a `save_to_disk` folder, `.parquet`, `.arrow`, or JSON lines.

    Args:
        path: file or folder.
        split: of a Hugging Face data set that has several.
        unique: see `json_lines`.

    Raises:
        ConfigError: not there, or not readable as what it is.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a file or folder to read, which is not there")
    if path.is_dir() or path.suffix in TABLES:
        return hugging_face(path, split=split)
    return json_lines(path, unique=unique)


def json_lines(path: Path, *, max_line: int = MAX_LINE, unique: str | None = "id") -> Source:
    """The lines of a file that are not blank, as JSON objects; bad ones come with their problem.

    Args:
        path: JSON-lines file, UTF-8.
        max_line: bytes a line may have; of a longer one only these are ever in memory.
        unique: a field whose value no two records may share; None: no such field.

    Raises:
        ConfigError: the file cannot be read.
    """
    _readable(path)

    def read() -> Iterator[Item]:
        seen = _Seen(unique)
        for index, (number, offset, line) in enumerate(read_lines(path, max_line)):
            where = f"{path.name}:{number}"
            original: Any = line.rstrip(b"\r\n")
            try:
                if len(line) > max_line:
                    original = {"file": path.name, "offset": offset}
                check_length(line, where, max_line)
                value = original = decode_line(line, where)
                seen.check(value, where)
            except SampleError as error:
                yield Item(index, where, None, original, str(error))
            else:
                yield Item(index, where, value)

    total = sum(1 for _ in read_lines(path, max_line))
    return Source(read, total, _identity(path))


def values(
    read: Callable[[], Iterable[tuple[str, Any]]], *, total: int | None, identity: dict[str, Any]
) -> Source:
    """Inputs that are not in a file.

    Args:
        read: yields (where, value) pairs, the same ones in the same order each time.
        total, identity: see `Source`.
    """

    def items() -> Iterator[Item]:
        for index, (where, value) in enumerate(read()):
            yield Item(index, where, value)

    return Source(items, total, identity)


def listed(read: Callable[[], Iterable[tuple[str, Any]]], files: Sequence[Path]) -> Source:
    """A source of (where, value) pairs from files; a value may be `Unusable`."""

    def items() -> Iterator[Item]:
        for index, (where, value) in enumerate(read()):
            where = cut(where, LONGEST_PLACE)
            if isinstance(value, Unusable):
                problem = cut(f"{where}: {value.reason}")
                yield Item(index, where, None, value.original, problem, value.kind)
            else:
                yield Item(index, where, value)

    return Source(items, None, {"files": len(files), "state": digest(map(_state, files))})


def members(record: Any, name: str, wanted: str, where: str) -> Iterator[tuple[str, Any]]:
    """(where, element) of the list that a record has under `name`; without one, `Unusable`."""
    if isinstance(record, Unusable):
        yield where, record
        return
    found = record.get(name) if isinstance(record, dict) else None
    if isinstance(found, list):
        yield from ((f"{where}.{name}[{i}]", element) for i, element in enumerate(found))
    else:
        yield where, Unusable(record, f"`{name}`: expected {wanted}, got none")


def hugging_face(path: Path, *, split: str | None = None) -> Source:
    """Rows of a `save_to_disk` folder, a Parquet file or an Arrow file, read a few at a time.

    Images are not decoded: they come as `{"bytes": ..., "path": ...}`, so that the checks of
    `groundkern.trainer.data.images` apply to them. Rows are called `name[row]`. Nothing is copied
    to a cache.

    Raises:
        ConfigError: not a data set, no such split, or `datasets` is not installed.
    """
    try:
        import datasets
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"{path}: needs the package datasets (pip install datasets)") from None
    try:
        if path.suffix == ".parquet":
            found = ParquetFile(path, pre_buffer=False)  # the default keeps the file in memory
        elif path.is_file():
            found = datasets.Dataset.from_file(str(path))
        else:
            found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected a Hugging Face data set ({reason})") from None
    name = path.name
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise ConfigError(f"{path}: expected --split, one of {', '.join(found)}, got {split}")
        found, name = found[split], f"{path.name}/{split}"

    def rows() -> Iterator[tuple[str, Any]]:
        if isinstance(found, ParquetFile):
            tables = found.iter_batches(ROWS)
        else:
            tables = found.with_format("arrow").iter(ROWS)
        yield from table_rows(tables, name, total)

    total = found.metadata.num_rows if isinstance(found, ParquetFile) else len(found)
    parts = sorted(path.rglob("*.arrow")) if path.is_dir() else [path]
    identity = {"data_set": name, "rows": total, "files": [_identity(part) for part in parts]}
    return values(rows, total=total, identity=identity)


def table_rows(tables: Iterable[Any], name: str, total: int) -> Iterator[tuple[str, Any]]:
    """(`name[row]`, row) of Arrow tables or batches.

    Raises:
        SampleError: a damaged file, or one with other than `total` rows; says at which row.
    """
    number = 0
    tables = iter(tables)
    while True:
        try:
            rows = next(tables).to_pylist()
        except StopIteration:
            break
        except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            why = cut(" ".join(str(error).split()), 300)
            wanted = "expected a row that can be read"
            raise SampleError(f"{name}[{number}]: {wanted} ({why})") from None
        for row in rows:
            yield f"{name}[{number}]", row
            number += 1
    if number != total:
        raise SampleError(f"{name}: expected {total} rows, got {number}")


def counted(source: Source) -> int:
    """How many inputs a source has; one that does not know is read once."""
    return sum(1 for _ in source.read()) if source.total is None else source.total


def digest(parts: Iterable[str]) -> str:
    """A short hash of texts in their order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


class _Seen:
    """Which ids were used and where, in a temporary file to keep memory constant."""

    def __init__(self, field: str | None) -> None:
        self.field = field
        self._places = sqlite3.connect("")
        self._places.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")

    def check(self, value: dict, where: str) -> None:
        """Raises `SampleError` if an earlier record has the same id."""
        if self.field is None or self.field not in value:
            return
        key = ascii(value[self.field])  # 1 and "1" are two ids
        new = self._places.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, where))
        if not new.rowcount:
            query = "SELECT place FROM ids WHERE id = ?"
            (place,) = self._places.execute(query, (key,)).fetchone()
            raise wrong(where, self.field, "an id of its own", f"{key[:80]}, which {place} has")


def _readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _identity(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"file": path.name, "bytes": found.st_size, "modified": found.st_mtime_ns}


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"
