"""The index of a JSON-lines file: where its samples are, what they carry, which lines are bad.

It is made by parsing every line and reading every image's header, in several processes, and kept in
a file that a later start reads instead. What a kept index says of a sample is true as long as the
data file has the same bytes and the rules of the format are the same; both are part of its key. A
line that was bad is checked again, since an image may have been repaired. A line that was good is
checked again when it is loaded, as every line is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pydantic

from groundkern.hf.data import example, video
from groundkern.hf.data.example import is_trained, message_text
from groundkern.trainer import durable
from groundkern.trainer.data import (
    arrays,
    file_kinds,
    finding,
    images,
    rasters,
    record,
    resolving,
    run_lengths,
    sample,
    video_files,
    videos,
)
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import Sample, parse_sample
from groundkern.trainer.data.videos import RULES, VideoRules
from groundkern.trainer.workers import cores, forked, forks

logger = logging.getLogger(__name__)

COUNTS = ("images", "videos", "regions", "words", "phrases", "answers", "answers_empty")
COUNTS += ("regions_wide", "words_twice", "gated")  # gated: regions, words, phrases of weight 0
COUNTS += ("characters", "width", "height")  # of all messages; of the largest image, in pixels
COUNTS += ("frames", "frame_width", "frame_height")  # of all videos; of the largest of these
WIDE = 0.5  # of an image: a region over more of it teaches little about where to look
ENTRY = np.dtype(
    [("offset", "<u8"), ("number", "<u8"), ("hash", "<u8"), ("task", "<u4")]
    + [(name, "<u4") for name in COUNTS]
)  # one sample: where its line starts, which line, its bytes' hash, which task, how many of each
LINES, BYTES = 256, 2**20  # of the data file that a process checks at a time
SMALL = 4 * 2**20  # bytes of a file that is checked without further processes
AHEAD = 4  # batches waiting for each process
_FORMAT = b"groundkern index "
_MAGIC = _FORMAT + b"5\n"

_CODE = (record, sample, resolving, images, file_kinds, rasters, run_lengths)  # of the format
_CODE += (arrays, finding, videos, video_files, example, video)
Line = tuple[int, int, bytes]  # number from 1, offset in bytes, content


@dataclass(frozen=True)
class Rules:
    """What decides, beside its bytes, whether a line is good.

    Args:
        name: the data file's, which starts every message.
        root: the folder of the images.
        max_pixels, max_line: limits of an image and of a line.
        videos: which frames of a video are taken, and what it may be.
    """

    name: str
    root: Path
    max_pixels: int
    max_line: int
    videos: VideoRules = RULES

    def parse(self, line: bytes, number: int) -> Sample:
        """The sample of a line.

        Raises:
            SampleError: a bad one.
        """
        where = f"{self.name}:{number}"
        check_length(line, where, self.max_line)
        limits = {"max_pixels": self.max_pixels, "videos": self.videos}
        return parse_sample(line, root=self.root, where=where, **limits)

    def key(self) -> dict[str, Any]:
        """Plain values that differ where a verdict could; the code of the format counts as one."""
        code = hashlib.sha256()
        for module in _CODE:
            code.update(Path(module.__file__).read_bytes())
        return {
            "root": os.path.realpath(self.root),
            "max_pixels": self.max_pixels,
            "max_line": self.max_line,
            "videos": asdict(self.videos),
            "format": code.hexdigest(),
            "pillow": PIL.__version__,
            "av": _installed("av"),
            "pydantic": pydantic.VERSION,
        }


@dataclass(frozen=True)
class Index:
    """What is known of a data file.

    Args:
        digest: sha256 of the file, in hex.
        good: [N] of `ENTRY`, in the order of the file.
        tasks: the names that `good["task"]` counts.
        bad: int64 [M, 2], number and offset of each line that is not good.
    """

    digest: str
    good: np.ndarray
    tasks: list[str]
    bad: np.ndarray


def joined(index: Index, again: Index) -> Index:
    """An index with the verdicts of `again` on all of its bad lines."""
    tasks = {task: i for i, task in enumerate(index.tasks)}
    for task in again.tasks:
        tasks.setdefault(task, len(tasks))
    found = again.good.copy()
    found["task"] = np.array([tasks[task] for task in again.tasks])[found["task"]]
    good = np.concatenate([index.good, found])
    return Index(index.digest, good[np.argsort(good["number"])], list(tasks), again.bad)


def check_length(line: bytes, where: str, max_line: int) -> None:
    """Refuse a line that had to be cut when it was read.

    Raises:
        SampleError: a line of more than `max_line` bytes.
    """
    if len(line) > max_line:
        raise SampleError(f"{where}: expected a line of at most {max_line} bytes, got more")


def line_hash(line: bytes) -> int:
    """64 bits of a hash of a line without its end."""
    return int.from_bytes(hashlib.blake2b(line.rstrip(b"\r\n"), digest_size=8).digest(), "little")


class Checked:
    """Collects verdicts on lines into an `Index`, in the order in which they come.

    Args:
        bad: called with each error.
    """

    def __init__(self, bad: Callable[[SampleError], Any]) -> None:
        self._bad = bad
        self._good: list[bytes] = []
        self._tasks: dict[str, int] = {}
        self._places: list[tuple[int, int]] = []
        self.good = 0

    def add(self, found: Found) -> None:
        """Add what a process found in a batch of lines."""
        for number, offset, reason in found.bad:
            self._places.append((number, offset))
            self._bad(SampleError(reason))
        entries = np.frombuffer(found.good, ENTRY).copy()
        for task in found.tasks:
            self._tasks.setdefault(task, len(self._tasks))
        numbers = np.array([self._tasks[task] for task in found.tasks], ENTRY["task"])
        entries["task"] = numbers[entries["task"]] if len(entries) else 0
        self._good.append(entries.tobytes())
        self.good += len(entries)

    def index(self, digest: str) -> Index:
        """The index of all that was added."""
        good = np.frombuffer(b"".join(self._good), ENTRY)
        bad = np.array(self._places, np.int64).reshape(-1, 2)
        return Index(digest, good, list(self._tasks), bad)


@dataclass(frozen=True)
class Found:
    """What a process found in a batch of lines.

    Args:
        lines: how many.
        reached: the offset behind the last one.
        good: entries of the good ones, as bytes.
        tasks: the names that their `task` counts.
        bad: number, offset and reason of the others.
    """

    lines: int
    reached: int
    good: bytes
    tasks: list[str]
    bad: list[tuple[int, int, str]]


def check_lines(rules: Rules, lines: list[Line]) -> Found:
    """The verdicts on some lines."""
    good, tasks, bad = [], {}, []
    for number, offset, line in lines:
        try:
            made = rules.parse(line, number)
        except SampleError as error:
            bad.append((number, offset, str(error)))
            continue
        task = tasks.setdefault(made.task, len(tasks))
        good.append((offset, number, line_hash(line), task, *counts_of(made)))
    reached = lines[-1][1] + len(lines[-1][2])
    return Found(len(lines), reached, np.array(good, ENTRY).tobytes(), list(tasks), bad)


def counts_of(made: Sample) -> tuple[int, ...]:
    """How many of each of `COUNTS` a sample has."""
    answers = [message_text(m) for m in made.messages if is_trained(m)]
    empty = sum(not answer.strip() for answer in answers)
    boxes = (region.boxes for region in made.regions)
    wide = sum(any((x1 - x0) * (y1 - y0) > WIDE for x0, y0, x1, y1 in each) for each in boxes)
    twice = len(made.words) - len(set(made.words))
    carried = (made.images, made.videos, made.regions, made.words, made.phrases, answers)
    parts = (*made.regions, *made.words, *made.phrases)
    gated = sum(made.grounding_weight * part.weight == 0 for part in parts)
    characters = sum(len(message_text(m)) for m in made.messages)
    frames = sum(video.planned for video in made.videos)
    films = [video.size for video in made.videos]
    sides = (*_largest(made.sizes), frames, *_largest(films))
    return *map(len, carried), empty, wide, twice, gated, characters, *sides


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _largest(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def check_all(
    rules: Rules, lines: Iterable[Line], size: int, processes: int | None = None
) -> Iterator[Found]:
    """The verdicts on many lines, batch by batch in their order; by several processes if many.

    Args:
        rules: of the format.
        lines: number, offset and content of each.
        size: bytes of all of them, roughly.
        processes: to use; None: by `size` and the cores of this machine.

    Yields:
        What was found.

    Raises:
        SampleError: a process was killed.
    """
    if processes is None:
        processes = min(cores(), size // SMALL + 1) if forks() else 1
    if processes <= 1 or size <= SMALL:
        yield from (check_lines(rules, batch) for batch in _batches(lines))
        return
    try:
        yield from forked(partial(check_lines, rules), _batches(lines), processes, ahead=AHEAD)
    except BrokenProcessPool:
        raise SampleError(
            f"{rules.name}: a process that checks it was killed (out of memory?)"
        ) from None


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch, size = [], 0
    for line in lines:
        batch.append(line)
        size += len(line[2])
        if len(batch) >= LINES or size >= BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def kept_at(folder: Path, path: Path) -> Path:
    """Where the index of a data file is kept in a folder."""
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:12]
    return folder / "index" / f"{path.name[:80]}-{place}.index"


def keep(file: Path, index: Index, key: dict[str, Any]) -> None:
    """Write an index; a disk that refuses costs a sentence and, next time, another check."""
    good, bad = index.good.tobytes(), index.bad.astype("<i8").tobytes()
    head = {"key": key, "digest": index.digest, "tasks": index.tasks}
    head |= {"good": len(index.good), "bad": len(index.bad)}
    body = json.dumps(head).encode() + b"\n" + good + bad
    try:
        durable.write_bytes(file, _MAGIC + hashlib.sha256(body).digest() + body)
    except durable.StorageError as error:
        logger.warning("%s (the data will be checked again at the next start)", error)


def kept(file: Path, key: dict[str, Any], digest: str) -> Index | None:
    """A kept index; None if there is none for this key and this digest, or a damaged one."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s): the data is checked again", file, error.strerror)
        return None
    if content.startswith(_FORMAT) and not content.startswith(_MAGIC):  # of another version
        return None
    start = len(_MAGIC) + 32
    body = memoryview(content)[start:]
    if content[:start] != _MAGIC + hashlib.sha256(body).digest():
        logger.warning("%s is damaged: the data is checked again", file)
        return None
    end = content.index(b"\n", start) + 1
    head = json.loads(content[start:end])
    if head["key"] != key or head["digest"] != digest:
        return None
    good = np.frombuffer(content, ENTRY, head["good"], end)
    bad = np.frombuffer(content, "<i8", 2 * head["bad"], end + good.nbytes)
    return Index(digest, good, head["tasks"], bad.reshape(-1, 2))
