"""Files and folders that are whole or absent, even after a crash: so a run writes all of them.

A file is written aside under another name, flushed to the disk (`fsync`) and renamed; then the
folder is flushed, since a rename is an entry of the folder. A reader sees the old one or the new
one, never half of either.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from groundkern.hf.watching.plain import finite_or_none

logger = logging.getLogger(__name__)

PARTIAL = ".partial"  # what a file is called until it is whole
_BLOCK = 2**20


class StorageError(Exception):
    """The disk refused; the message is one sentence for the user."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and its folder if that is missing.

    Raises:
        StorageError: the disk is full, say; what was at `path` is as it was.
    """
    write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """`write_bytes` of a content that is never in memory as a whole."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """`write_bytes` of a text in UTF-8.

    Args:
        path, text: the file and what it will hold.
        errors: as `str.encode` takes it.
    """
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a value as strict JSON: a number that is not finite becomes null."""
    write_text(
        path,
        json.dumps(finite_or_none(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def append_line(path: Path, line: str) -> None:
    """Append a line by one write, and take a part of it back if the disk did not take it all.

    The line is flushed by the next `sync_file`.

    Raises:
        StorageError: the file is as it was, or ends in a line without its end, which readers skip.
    """
    content = line.encode("utf-8") + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                written = file.write(content)
                while written < len(content):  # full, or a short write that another completes
                    written += file.write(content[written:])
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise cannot_write(path, error) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path, fits: Callable[[dict[str, Any]], bool], what: str) -> list[dict]:
    """The rows of a JSON-lines file that is appended to, in its order; none if there is no file.

    A last line that was cut off is no row. A whole one that is none is left out with a warning.

    Args:
        path: the file.
        fits: whether an object has a row's fields.
        what: what a row is called in the warning.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and fits(row):
            rows.append(row)
        else:
            logger.warning("%s:%d is no %s and is left out", path, number, what)
    return rows


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, durably; nothing may be at `target`."""
    os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Put a flushed folder in the place of another, which is removed (or back, if that fails)."""
    old = source.with_name(f"replaced-{source.name}")
    there = target.exists()
    if there:
        os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        if there:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    sync_folder(source.parent)
    if there:
        shutil.rmtree(old)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and flush the name of each that is new."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(new):
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk, if the file is there."""
    if path.exists():
        _sync(path)


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, every name, and the folder itself."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(path) / name)
        sync_folder(Path(path))


def digest(path: Path, told: Callable[[int], Any] | None = None) -> str:
    """The sha256 of a file's content, in hex.

    Args:
        path: the file.
        told: called with the bytes read since it was called last.
    """
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found.update(block)
            if told is not None:
                told(len(block))
    return found.hexdigest()


def cannot_write(path: Path, error: Exception) -> StorageError:
    """The error to raise where something could not be written, with the room that is left."""
    reason = getattr(error, "strerror", None) or f"not all of it was written ({error})"
    with suppress(OSError):
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        reason += f" ({shutil.disk_usage(there).free:,} bytes free)"
    return StorageError(f"{path} cannot be written: {reason}")


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
