"""The files of a stream: found, told apart, cut for their readers, and read record by record.

Records leave here as bytes, so that all that a shuffle buffer holds is what is on disk: a line of
JSON, or a row of Parquet that is pickled. JSON lines are not read by `load_dataset("json")`, for
the reasons in `groundkern.trainer.prepare.sources`: one schema for all rows, and a bad line ends
the load.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE, read_lines
from groundkern.trainer.data.images import DataChanged
from groundkern.trainer.prepare.adapt.chat.files import is_lines, unlike_json

PARQUET = ".parquet"
LINES = (".jsonl", ".ndjson")  # what is taken of a folder, beside Parquet
ROWS = 16  # of a Parquet file in memory at a time
LOOKED_AT = 256  # lines that say how long a line is
EDGE = 2**16  # bytes at both ends of a file that tell it from another one

Shard = tuple[str, str, int, int | None]
"""(path, what messages call it, the first byte or row, the one behind the last or None)."""


@dataclass(frozen=True)
class Shards:
    """The files that one path means, all of one kind.

    Args:
        files: their paths, sorted.
        base: the folder that they are in.
    """

    files: tuple[Path, ...]
    base: Path

    @property
    def parquet(self) -> bool:
        """Whether these are Parquet files; else they are JSON lines."""
        return self.files[0].suffix == PARQUET

    def labels(self) -> list[str]:
        """What messages call the files: their paths from `base`."""
        return [os.path.relpath(file, self.base) for file in self.files]

    def cut(self, labels: Sequence[str], readers: int) -> list[Shard]:
        """Pieces of the files, a multiple of `readers` of them, of about the same size in a file.

        Args:
            labels: what messages call the files.
            readers: that share the pieces.
        """
        pieces = readers // math.gcd(len(self.files), readers)
        named = list(zip(map(str, self.files), labels, strict=True))
        if pieces == 1:
            return [(path, label, 0, None) for path, label in named]
        found: list[Shard] = []
        for path, label in named:
            size = _rows(path) if self.parquet else os.path.getsize(path)
            ends = [size * i // pieces for i in range(pieces + 1)]
            found += [(path, label, a, b) for a, b in pairwise(ends)]
        return found

    def estimate(self) -> float:
        """About how many records there are, by the size of the first of them."""
        size = sum(file.stat().st_size for file in self.files)
        first = self.files[0]
        if self.parquet:
            return size * _rows(first) / max(1, first.stat().st_size)
        lengths = [len(line) for _, _, line in islice(read_lines(first), LOOKED_AT)]
        return size * len(lengths) / max(1, sum(lengths))

    def digest(self) -> str:
        """A hash of every file's size and of the bytes at its two ends, not of all it holds."""
        found = hashlib.sha256()
        for file, label in zip(self.files, self.labels(), strict=True):
            size = file.stat().st_size
            with file.open("rb") as opened:
                head = opened.read(EDGE)
                opened.seek(max(0, size - EDGE))
                found.update(f"{label}\n{size}\n".encode() + head + opened.read(EDGE))
        return found.hexdigest()


def find_shards(path: Path) -> Shards:
    """The files that a path means: one, those of a folder, or those of a pattern such as a*.jsonl.

    Raises:
        ConfigError: none, files of both kinds, or one that cannot be read as a stream.
    """
    wanted = "`data.train`: expected JSON lines or Parquet files, as data.streaming reads them"
    if path.is_dir():
        base, found = path, sorted(p for p in path.rglob("*") if p.suffix in (*LINES, PARQUET))
    elif path.exists():
        base, found = path.parent, [path]
    else:
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        base = Path(os.path.commonpath([p.parent for p in found])) if found else path.parent
    if not found:
        raise ConfigError(f"{wanted}, got none at {path}")
    kinds = {file.suffix == PARQUET for file in found}
    if len(kinds) > 1:
        raise ConfigError(f"{wanted}, got both kinds at {path}; name them one by one")
    if kinds == {False} and not is_lines(found[0]):
        raise ConfigError(
            f"{wanted}, got {found[0]}, which has to be read whole; `groundkern prepare "
            "adapt chat` makes JSON lines of it"
        )
    if kinds == {False} and not next(read_lines(found[0]), None):
        raise ConfigError(f"{wanted}, got {found[0]}, which is empty")
    return Shards(tuple(found), base)


def refuse_unlike_json(file: Path) -> None:
    """Refuse a file none of whose first lines can be read and that is something else.

    Raises:
        ConfigError: says what it is.
    """
    if (what := unlike_json(file)) is not None:
        raise ConfigError(f"{file}: {what}")


def read_shards(shards: list[Shard], source: int, max_line: int = MAX_LINE) -> Iterator[dict]:
    """The raw records of some pieces, in their order.

    Args:
        shards: the pieces.
        source: goes with every record.
        max_line: bytes of a line that are read, and one more.

    Yields:
        `source`, `where` (what messages call the record) and `content`: a line, or a pickled row.

    Raises:
        DataChanged: a file that can no longer be read.
    """
    for path, label, start, stop in shards:
        try:
            if path.endswith(PARQUET):
                for number, row in _read_rows(path, start, stop):
                    content = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
                    yield {"source": source, "where": f"{label}[{number}]", "content": content}
                continue
            for number, offset, line in read_lines(Path(path), max_line, start=start, stop=stop):
                where = f"{label}:{number}" if start == 0 else f"{label}:byte {offset}"
                yield {"source": source, "where": where, "content": line}
        except (OSError, _arrow()) as error:
            why = " ".join(str(error).split())
            raise DataChanged(f"{label}: expected a file that can be read, got {why}") from None


def _read_rows(path: str, start: int, stop: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number from 0 and values of the rows from `start` to `stop`; other row groups stay unread."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False) as table:
        stop = table.metadata.num_rows if stop is None else stop
        number = 0
        for group in range(table.num_row_groups):
            behind = number + table.metadata.row_group(group).num_rows
            if behind <= start or number >= stop:
                number = behind
                continue
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group]):
                first, last = max(start - number, 0), min(stop - number, len(batch))
                for i, row in enumerate(batch.slice(first, max(0, last - first)).to_pylist()):
                    yield number + first + i, row
                number += len(batch)


def _rows(path: str | Path) -> int:
    try:
        from pyarrow.parquet import read_metadata
    except ImportError:
        raise ConfigError(f"{path}: needs the package pyarrow (pip install pyarrow)") from None
    try:
        return read_metadata(path).num_rows
    except (OSError, _arrow()) as error:
        why = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: expected a Parquet file, got one that cannot be read: {why}"
        ) from None


def _arrow() -> type[Exception]:
    try:
        from pyarrow import ArrowException
    except ImportError:
        return OSError
    return ArrowException
