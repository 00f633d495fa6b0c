"""The page on disk, or several that link to each other where one would be too large to open.

Cards go to an unnamed file until it is known how many pages there are; what is in memory does not
grow with the number of samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from markupsafe import Markup

from groundkern.trainer import durable
from groundkern.trainer.inspection.showing import Shown
from groundkern.trainer.templating import environment

MOST = 40_000_000  # bytes of cards and pictures on a page
BLOCK = 2**20
MARK = b'<meta name="generator" content="groundkern inspect">'


@dataclass
class Page:
    """One page: its file's path, its cards, and the samples on it."""

    path: Path
    cards: IO[bytes]
    samples: list[str]
    pictures: set[str]


class Pages:
    """Collects pieces, and writes the pages; use it in a `with` block.

    Args:
        output: the first page; the others are numbered, `data.inspect.2.html`.
        most: bytes on a page, unless a single sample has more.

    Raises:
        StorageError: the disk refuses.
    """

    def __init__(self, output: Path, most: int = MOST) -> None:
        self.output, self.most = output, most
        self.pages: list[Page] = []
        self._open = ExitStack()
        self._begin()

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, piece: Shown) -> None:
        """Adds a sample to the last page, or to a new one if that is full."""
        page = self.pages[-1]
        new = [name for name in piece.pictures if name not in page.pictures]
        size = len(piece.html) + sum(len(piece.pictures[name]) for name in new)
        if page.samples and page.cards.tell() + size > self.most:
            page = self._begin()
            new = list(piece.pictures)
        stored = "".join(piece.pictures[name] for name in new)
        try:
            page.cards.write((stored + piece.html).encode("utf-8", "replace"))
        except OSError as error:
            raise durable.cannot_write(page.path, error) from error
        page.samples.append(piece.where)
        page.pictures.update(new)

    def write(self, values: dict[str, Any]) -> list[Path]:
        """Writes all pages and removes those that an earlier, longer run left behind them.

        Args:
            values: what the template shows beside the samples.

        Returns:
            Their paths.
        """
        template = environment().get_template("inspect.html")
        for number, page in enumerate(self.pages):
            body = _blocks(page.cards)
            pieces = template.generate(pages=self.pages, number=number, body=body, **values)
            durable.write_pieces(page.path, (p.encode("utf-8", "replace") for p in pieces))
        number = len(self.pages) + 1
        while _is_page(old := self._path(number)):
            old.unlink()
            number += 1
        return [page.path for page in self.pages]

    def _begin(self) -> Page:
        path = self._path(len(self.pages) + 1)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unnamed = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
        except OSError as error:
            raise durable.cannot_write(path, error) from error
        self.pages.append(Page(path, self._open.enter_context(unnamed), [], set()))
        return self.pages[-1]

    def _path(self, number: int) -> Path:
        return self.output if number == 1 else self.output.with_suffix(f".{number}.html")


def _is_page(path: Path) -> bool:
    """Whether a file is a page that this module wrote, and nobody else's."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK in file.read(BLOCK)


def _blocks(cards: IO[bytes]) -> Iterator[Markup]:
    """What was written, in blocks that end with a line."""
    cards.seek(0)
    while block := cards.read(BLOCK):
        yield Markup((block + cards.readline()).decode("utf-8"))
