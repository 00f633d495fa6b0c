"""A JSON-lines file as a map-style data set: checked up front, images loaded late.

In memory there are 16 bytes a sample (where its line starts, which line it is) and its task, since
parsed samples of a large file would not fit into every worker process. So an item reads and parses
its line again when it is asked for, which costs a small part of decoding its images.
"""

from __future__ import annotations

import logging
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset
from tqdm import tqdm

from groundkern.hf.data.example import GroundedExample
from trainer import durable
from trainer.images import MAX_PIXELS, SampleError
from trainer.sample import Sample, parse_sample

logger = logging.getLogger(__name__)

MAX_LINE = 16 * 2**20  # bytes
SHOWN = 20  # bad samples that are logged one by one


@dataclass(frozen=True)
class BadSample:
    """A line that cannot be used: `file:line`, and why."""

    where: str
    reason: str


def read_lines(path: Path, max_line: int = MAX_LINE) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file that are not blank, with at most `max_line` bytes of one in memory.

    Args:
        path: the file.
        max_line: bytes of a line that are read; what is beyond is skipped.

    Yields:
        Number from 1, offset in bytes, and at most `max_line` + 1 bytes of the line.
    """
    with path.open("rb") as file:
        number = offset = 0
        while line := file.readline(max_line + 1):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(2**16)):
                pass
            if line.strip():
                yield number, offset, line
            offset = file.tell()


def check_length(line: bytes, where: str, max_line: int = MAX_LINE) -> None:
    """Refuse a line that `read_lines` had to cut.

    Raises:
        SampleError: a line of more than `max_line` bytes.
    """
    if len(line) > max_line:
        raise SampleError(f"{where}: expected a line of at most {max_line} bytes, got more")


class JsonLinesDataset(Dataset):
    """The usable samples of a JSON-lines file (docs/data-format.md), in the file's order.

    Items are `GroundedExample`. Building the data set reads every line and every image's header
    once, under a progress bar. Pixels are decoded only in `dataset[i]`. An image that turns out to
    be corrupt only then raises with "stop"; with "skip" it is reported, added to `bad`, and the
    next sample that can be decoded replaces it, so that batches keep their size. (In a worker
    process `bad` is the worker's own.)

    Args:
        path: JSON-lines file, UTF-8; blank lines are skipped.
        root: the folder that image paths are relative to and may not leave; default: the file's.
        on_bad_sample: "skip" reports bad samples and goes on, "stop" raises at the first.
        max_pixels: width x height that an image may have.
        max_line: bytes that a line may have; of a longer one only these are ever in memory.

    Attributes:
        tasks: the task of each usable sample.
        bad: the samples left out.

    Raises:
        SampleError: with "stop", the first bad sample.
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
    ) -> None:
        if on_bad_sample not in ("skip", "stop"):
            raise ValueError(f"`on_bad_sample`: expected skip or stop, got {on_bad_sample!r}")
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.on_bad_sample, self.max_pixels, self.max_line = on_bad_sample, max_pixels, max_line
        self.bad: list[BadSample] = []
        self.tasks: list[str] = []
        self._offsets, self._numbers = array("Q"), array("Q")
        self._check()

    def __len__(self) -> int:
        return len(self._offsets)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file, in hex."""
        return durable.digest(self.path)

    def __getitem__(self, index: int) -> GroundedExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        for step in range(len(self)):
            try:
                return self.sample((index + step) % len(self)).load()
            except SampleError as error:
                self._report(error)
        raise SampleError(f"{self.path}: expected images that can be decoded, got none")

    def sample(self, index: int) -> Sample:
        """The sample without its pixels."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(self.max_line + 1), self._numbers[index])

    def _check(self) -> None:
        with tqdm(
            total=self.path.stat().st_size,
            desc=f"check {self.path.name}",
            unit="B",
            unit_scale=True,
            disable=None,  # unless on a terminal
        ) as bar:
            for number, offset, line in read_lines(self.path, self.max_line):
                try:
                    sample = self._parse(line, number)
                except SampleError as error:
                    self._report(error)
                else:
                    self._offsets.append(offset)
                    self._numbers.append(number)
                    self.tasks.append(sys.intern(sample.task))
                bar.update(offset + len(line) - bar.n)
                bar.set_postfix(samples=len(self), bad=len(self.bad), refresh=False)
            bar.update(bar.total - bar.n)
        if self.bad:
            total = len(self) + len(self.bad)
            logger.warning("%s: skipped %d of %d samples", self.path, len(self.bad), total)

    def _parse(self, line: bytes, number: int) -> Sample:
        where = f"{self.path.name}:{number}"
        check_length(line, where, self.max_line)
        return parse_sample(line, root=self.root, where=where, max_pixels=self.max_pixels)

    def _report(self, error: SampleError) -> None:
        if self.on_bad_sample == "stop":
            raise error
        where, _, reason = str(error).partition(": ")
        bad = BadSample(where, reason)
        if bad in self.bad[-SHOWN:]:
            return
        self.bad.append(bad)
        if len(self.bad) <= SHOWN:
            logger.warning("bad sample skipped: %s", error)
