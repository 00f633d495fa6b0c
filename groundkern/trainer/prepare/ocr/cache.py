"""One reading for each image, kept beside the output, however many samples share the image.

A reading belongs to the image's bytes and the settings, so a moved file or a second command finds
it, and a changed one does not. Processes share the file; the one that is first reads, the others
wait for its reading. One that is killed leaves nothing half-written and no lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from groundkern.trainer.prepare.ocr import engines
from groundkern.trainer.prepare.ocr.settings import OcrSettings, OcrWord

VERSION = 2  # of how words are made of what engines find; another one reads again
WAIT = 60.0  # seconds for another process's write
LOCKS = 2**20  # images are spread over so many


@dataclass(frozen=True)
class Readings:
    """Readings on disk.

    Args:
        path: of the SQLite file; its locks are in a file beside it.
        settings: how images are read.
        engine: what reads, with its version.
        drawn: what is done to an image before it is read, in a word.
    """

    path: Path
    settings: OcrSettings
    engine: str
    drawn: str = ""

    @classmethod
    def beside(cls, output: Path, settings: OcrSettings, drawn: str = "") -> Readings:
        """Those of a command, in `OUT.readings`.

        Raises:
            ConfigError: the engine or its language is not installed.
        """
        engines.engine(settings)
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.with_name(output.name + ".readings")
        return cls(path, settings, engines.version(settings), drawn)

    def words(self, image: Path, read: Callable[[], list[OcrWord]]) -> tuple[list[OcrWord], bool]:
        """The words of an image, and whether they were read before.

        Args:
            image: the file.
            read: reads it.

        Raises:
            OSError: they cannot be kept.
            Whatever `read` raises; nothing is kept then.
        """
        key = self._key(image)
        try:
            return self._kept(key, read)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error

    def _kept(self, key: bytes, read: Callable[[], list[OcrWord]]) -> tuple[list[OcrWord], bool]:
        with self._alone(key), closing(self._open()) as store:
            row = store.execute("SELECT words FROM readings WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return _unpacked(row[0]), True
            words = read()
            with store:
                row = (key, _packed(words))
                store.execute("INSERT OR REPLACE INTO readings VALUES (?, ?)", row)
            return words, False

    def _key(self, image: Path) -> bytes:
        digest = hashlib.sha256(
            json.dumps([VERSION, self.engine, astuple(self.settings), self.drawn]).encode()
        )
        with image.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.digest()

    @contextmanager
    def _alone(self, key: bytes) -> Iterator[None]:
        """No other process is in here for the same image."""
        place = int.from_bytes(key[:8], "big") % LOCKS
        file = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, place)
            yield
        finally:
            os.close(file)  # and the lock with it

    def _open(self) -> sqlite3.Connection:
        store = sqlite3.connect(self.path, timeout=WAIT)
        store.execute("CREATE TABLE IF NOT EXISTS readings (key BLOB PRIMARY KEY, words BLOB)")
        return store


def _packed(words: list[OcrWord]) -> bytes:
    return zlib.compress(json.dumps(words, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def _unpacked(packed: bytes) -> list[OcrWord]:
    rows = json.loads(zlib.decompress(packed).decode("utf-8", "surrogatepass"))
    return [OcrWord(text, tuple(box), *rest) for text, box, *rest in rows]
