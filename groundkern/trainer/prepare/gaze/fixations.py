"""Fixations of a CSV, JSON or JSON-lines file, by the image or video they are on."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from groundkern.trainer.config import ConfigError
from groundkern.trainer.wording import short

FIELDS = ("path", "x", "y", "time", "frame", "duration")


class Fixation(NamedTuple):
    """Where somebody looked.

    Args:
        x, y: in the file's unit.
        time: seconds of the video at which it begins.
        frame: the frame of the video at which it begins, in the place of a time.
        duration: seconds; None: not known of any fixation of the file.
    """

    x: float
    y: float
    time: float | None
    frame: int | None
    duration: float | None


def read_fixations(path: Path) -> tuple[dict[str, list[Fixation]], str]:
    """All fixations of a file.

    Args:
        path: `.json` (a list), `.jsonl`, or anything else as CSV with a head line. Records have
            `path`, `x`, `y`, of a video `time` or `frame`, and perhaps `duration`; other fields are
            passed over.

    Returns:
        Fixations by `path`, in the file's order, and the SHA-256 of the file.

    Raises:
        ConfigError: the file cannot be read, or a record is wrong: its number and its field.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a file of fixations in UTF-8 ({error})") from None
    found: dict[str, list[Fixation]] = {}
    for number, record in enumerate(_records(path, text), 1):
        where = f"{path.name}: record {number}"
        place = record.get("path")
        if not isinstance(place, str) or not place:
            raise ConfigError(f"{where}: `path`: expected an image or video, got {short(place)}")
        found.setdefault(place, []).append(_fixation(record, where))
    if not found:
        raise ConfigError(f"{path}: expected one fixation at least, got none")
    known = {each.duration is not None for fixations in found.values() for each in fixations}
    if len(known) > 1:
        raise ConfigError(f"{path}: expected a `duration` of every fixation or of none, got some")
    return found, hashlib.sha256(data).hexdigest()


def _records(path: Path, text: str) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".json":
            records = json.loads(text)
            wanted = isinstance(records, list) and all(isinstance(r, dict) for r in records)
        elif path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
            wanted = all(isinstance(record, dict) for record in records)
        else:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            records = [{k: v for k, v in row.items() if v != ""} for row in reader]
            wanted = {"path", "x", "y"} <= set(reader.fieldnames or ())
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path}: expected fixations, got {short(str(error))}") from None
    if not wanted:
        raise ConfigError(f"{path}: expected fixations with {', '.join(FIELDS[:3])}, got others")
    yield from records


def _fixation(record: dict[str, Any], where: str) -> Fixation:
    x, y = (_number(record, name, where) for name in ("x", "y"))
    time, frame, duration = (
        _number(record, name, where) if record.get(name) is not None else None
        for name in ("time", "frame", "duration")
    )
    if time is not None and frame is not None:
        raise ConfigError(f"{where}: expected `time` or `frame`, got both")
    if time is not None and time < 0:
        raise ConfigError(f"{where}: `time`: expected 0 or more, got {time:g}")
    if frame is not None and (frame < 0 or frame != int(frame)):
        raise ConfigError(f"{where}: `frame`: expected a whole number from 0, got {frame:g}")
    if duration is not None and duration <= 0:
        raise ConfigError(f"{where}: `duration`: expected a number above 0, got {duration:g}")
    return Fixation(x, y, time, None if frame is None else int(frame), duration)


def _number(record: dict[str, Any], name: str, where: str) -> float:
    value = record.get(name)
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ConfigError(f"{where}: `{name}`: expected a number, got {short(value)}")
    return number
