"""A JSON-lines file as a map-style data set: checked up front, images loaded late.

In memory there are 88 bytes a sample (`groundkern.trainer.data.index`), since parsed samples of a
large file would not fit into every worker process. So an item reads and parses its line again when
it is asked for, which costs a small part of decoding its images; a line whose bytes are not those
that were checked stops the run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from groundkern.hf.data.example import GroundedExample
from groundkern.trainer.data import index as data_index
from groundkern.trainer.data.bad_samples import BadSample, BadSamples
from groundkern.trainer.data.images import MAX_PIXELS, DataChanged, SampleError
from groundkern.trainer.data.index import COUNTS, Checked, Found, Index, Line, Rules, check_length
from groundkern.trainer.data.sample import Sample
from groundkern.trainer.data.videos import RULES, VideoRules
from groundkern.trainer.progress import progress

__all__ = ["MAX_LINE", "BadSample", "JsonLinesDataset", "check_length", "read_lines"]

logger = logging.getLogger(__name__)

MAX_LINE = 16 * 2**20  # bytes
_BLOCK = 2**20


def read_lines(
    path: Path,
    max_line: int = MAX_LINE,
    told: Callable[[bytes], Any] | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Line]:
    """The lines of a file that are not blank, with at most `max_line` bytes of one in memory.

    Args:
        path: the file.
        max_line: bytes of a line that are read; what is beyond is skipped.
        told: called with all the bytes of the file, piece by piece.
        start, stop: offsets; only lines whose first byte is in between are read.

    Yields:
        Number from 1 (of those read), offset in bytes, and at most `max_line` + 1 bytes of the
        line.
    """
    with path.open("rb") as file:
        number = offset = 0
        if start:  # within a line, unless the byte before ends one
            file.seek(start - 1)
            while (rest := file.readline(2**16)) and not rest.endswith(b"\n"):
                pass
            offset = file.tell()
        while (stop is None or offset < stop) and (line := file.readline(max_line + 1)):
            number += 1
            rest, size = line, len(line)
            if told is not None:
                told(line)
            while not rest.endswith(b"\n") and (rest := file.readline(2**16)):
                size += len(rest)
                if told is not None:
                    told(rest)
            if line.strip():
                yield number, offset, line
            offset += size


class JsonLinesDataset:
    """The usable samples of a JSON-lines file (docs/data/data-format.md), in the file's order.

    Items are `GroundedExample`. Building the data set reads every line and every image's header
    once, under a progress bar, or what an earlier start kept of that. Pixels are decoded only in
    `dataset[i]`. An image that turns out to be corrupt only then raises with "stop"; with "skip" it
    is reported, added to `bad`, and the next sample that can be decoded replaces it, so that
    batches keep their size. (In a worker process `bad` is the worker's own.)

    Args:
        path: JSON-lines file, UTF-8; blank lines are skipped.
        root: the folder that image paths are relative to and may not leave; default: the file's.
        on_bad_sample: "skip" reports bad samples and goes on, "stop" raises at the first.
        max_pixels: width x height that an image may have.
        max_line: bytes that a line may have; of a longer one only these are ever in memory.
        videos: which frames of a video are taken, and what it may be.
        max_bad_fraction: of all samples that may be bad, at the start and later.
        cache: a folder that keeps what was found, for the next start; None: nothing is kept.
        processes: that check the lines; None: by the size of the file and of the machine.
        lost: samples that were left out when the file was made; they count as bad ones.
        name: of the file in messages; None: without its folder.

    Attributes:
        name: as given, or the file's.
        tasks: the task of each usable sample.
        counts: by name of `data_index.COUNTS`, how many each usable sample has: [N] uint32.
        lines: the line number, from 1, of each usable sample: [N] uint64.
        hashes: 64 bits of a hash of each usable sample's line: [N] uint64.
        digest: sha256 of the file's bytes as they were checked, in hex.
        bad: the samples left out.

    Raises:
        SampleError: with "stop", the first bad sample; too many of them.
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        root: str | Path | None = None,
        on_bad_sample: Literal["skip", "stop"] = "skip",
        max_pixels: int = MAX_PIXELS,
        max_line: int = MAX_LINE,
        videos: VideoRules = RULES,
        max_bad_fraction: float = 1.0,
        cache: Path | None = None,
        processes: int | None = None,
        lost: Iterable[BadSample] = (),
        name: str | None = None,
    ) -> None:
        if on_bad_sample not in ("skip", "stop"):
            raise ValueError(f"`on_bad_sample`: expected skip or stop, got {on_bad_sample!r}")
        self.path = Path(path)
        self.name = name or self.path.name
        self.root = Path(root) if root is not None else self.path.parent
        self.on_bad_sample, self.max_pixels, self.max_line = on_bad_sample, max_pixels, max_line
        self.bad = BadSamples(max_bad_fraction)
        for bad in lost:
            self.bad.add(bad)
        self._rules = Rules(self.name, self.root, max_pixels, max_line, videos)
        index = self._kept(cache, processes) if cache else None
        if index is None:
            index = self._checked(processes)
            if cache:
                data_index.keep(self._place(cache), index, self._rules.key())
        self.digest, self._good = index.digest, index.good
        self.tasks = [index.tasks[task] for task in index.good["task"]]
        self.counts = {name: index.good[name] for name in COUNTS}
        self.lines, self.hashes = index.good["number"], index.good["hash"]
        self.bad.total = len(self) + len(self.bad)
        self.bad.take()
        if self.bad:
            logger.warning("%s: skipped %d of %d samples", self.path, len(self.bad), self.bad.total)
        self.bad.check()

    def __len__(self) -> int:
        return len(self._good)

    @property
    def in_epoch(self) -> int:
        """The samples that an epoch takes: all."""
        return len(self)

    def __getitem__(self, index: int) -> GroundedExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(len(self)):
            try:
                return self.sample((index + step) % len(self)).load()
            except DataChanged:
                raise
            except SampleError as error:
                found = error
            self._report(found)
        raise SampleError(f"{self.path}: expected samples that can be decoded, got none")

    def sample(self, index: int) -> Sample:
        """The sample without its pixels.

        Raises:
            DataChanged: its line is not the one that was checked.
            SampleError: an image is not what it was.
        """
        entry = self._good[index]
        offset, number = int(entry["offset"]), int(entry["number"])
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                line = file.readline(self.max_line + 1)
        except OSError as error:
            raise DataChanged(
                f"{self.path}: expected the file that was checked at the start, got none that can "
                f"be read ({error.strerror})"
            ) from None
        if data_index.line_hash(line) != int(entry["hash"]):
            raise DataChanged(
                f"{self.name}:{number}: expected the line that was checked at the start, got "
                "another one; the file was written or replaced while it was in use"
            )
        return self._rules.parse(line, number)

    def _place(self, cache: Path) -> Path:
        return data_index.kept_at(cache, self.path)

    def _checked(self, processes: int | None) -> Index:
        """The index, from every line."""
        digest, size = hashlib.sha256(), self.path.stat().st_size
        lines = read_lines(self.path, self.max_line, digest.update)
        checked = Checked(self._report)
        with progress(f"check {self.path.name}", total=size, unit="B") as bar:
            for found in self._collect(checked, lines, size, processes):
                bar.update(min(found.reached, size) - bar.n)
                bar.set_postfix(samples=checked.good, bad=len(self.bad), refresh=False)
            bar.update(size - bar.n)
        return checked.index(digest.hexdigest())

    def _kept(self, cache: Path, processes: int | None) -> Index | None:
        """The index that an earlier start kept of the same bytes, its bad lines checked again."""
        place = self._place(cache)
        if not place.exists():
            return None
        digest = self._digest()
        index = data_index.kept(place, self._rules.key(), digest)
        if index is None or not len(index.bad):
            return index
        again = Checked(self._report)
        lines, count = self._lines(index.bad), len(index.bad)
        size = self.path.stat().st_size * count // (count + len(index.good))
        with progress(f"check {self.path.name} again", total=count, unit="sample") as bar:
            for found in self._collect(again, lines, size, processes):
                bar.update(found.lines)
        if not again.good:
            return index
        index = data_index.joined(index, again.index(digest))
        data_index.keep(place, index, self._rules.key())
        return index

    def _lines(self, places: np.ndarray) -> Iterator[Line]:
        with self.path.open("rb") as file:
            for number, offset in places.tolist():
                file.seek(offset)
                yield number, offset, file.readline(self.max_line + 1)

    def _digest(self) -> str:
        found = hashlib.sha256()
        total = self.path.stat().st_size
        with (
            progress(f"read {self.path.name}", total=total, unit="B") as bar,
            self.path.open("rb", buffering=0) as file,
        ):
            while block := file.read(_BLOCK):
                found.update(block)
                bar.update(len(block))
        return found.hexdigest()

    def _collect(
        self, checked: Checked, lines: Iterator[Line], size: int, processes: int | None
    ) -> Iterator[Found]:
        """Checks lines, adds what is found, and yields it."""
        with closing(data_index.check_all(self._rules, lines, size, processes)) as parts:
            for found in parts:
                checked.add(found)
                yield found

    def _report(self, error: SampleError) -> None:
        self.bad.report(error, self.on_bad_sample)
