"""Annotation files of any size, read safely: lines, elements of a JSON array, plain pickles.

A JSON file of hundreds of megabytes holds one array of records; `json.load` would hold them all.
`json_array` holds one. NaN and Infinity are read as Python's json does, so that a bad number costs
one record and not the file; so does an object that has a name twice, of which json keeps the last.

Not ijson (3.6): it ends at the first NaN, its C parser says no position and takes gigabytes for
100 kB of opening brackets, and its Python parser needs seven times as long.
"""

from __future__ import annotations

import codecs
import json
import pickle
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.dataset import MAX_LINE
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.sources import Unusable
from groundkern.trainer.wording import cut

_CHUNK = 1 << 16  # characters read at a time, twice as many for each time a value does not fit
_SPACE = " \t\r\n"
_AFTER = _SPACE + ",:]}"


def json_array(path: Path, key: str | None = None) -> Iterator[Any]:
    """The elements of a JSON file's array, one at a time.

    What follows the array is read too: a file that was cut off must not pass for a whole one.

    Args:
        path: UTF-8; the array is the whole file, or what the top object has under `key`.
        key: see `path`; a file that is an array is read as one even with a key.

    Yields:
        Plain values; `Unusable` for an element in which an object has a name twice.

    Raises:
        ConfigError: not readable, or no such array.
        SampleError: not JSON, an element of more than 16 Mi characters, or a top object that has a
            name twice; says at which character.
    """
    try:
        with path.open("rb") as file:
            scan = _Scan(file, path.name)
            inside = scan.next() == "{" and key is not None
            if inside:
                scan.find(key)
            if scan.next() != "[":
                wanted = "a JSON array" if key is None else f"a JSON array, or one under {key!r}"
                raise ConfigError(f"{path}: expected {wanted}, got {scan.shown()}")
            for element in scan.elements():
                twice = f"`{scan.repeated}`: expected each name once, got it twice"
                yield element if scan.repeated is None else Unusable(element, twice)
            scan.finish(inside)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


class _Scan:
    """A position in a JSON text of which only a window is in memory."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder(object_pairs_hook=self._object)
        self._names: set[str] = set()  # of the top object, so far
        self.repeated: str | None = None  # a name that the last value has twice in one object
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def next(self) -> str:
        """The next character that is not space, "" at the end; the position stays before it."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK):
                return ""

    def take(self, wanted: str) -> None:
        if self.next() != wanted:
            raise self._wrong(f"expected {wanted!r}")
        self._at += 1

    def shown(self) -> str:
        return repr(self._text[self._at : self._at + 20]) if self.next() else "nothing"

    def value(self) -> Any:
        """The next value; moves behind it."""
        self.next()
        size = _CHUNK
        while True:
            self.repeated = None
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                # a number may go on beyond the window
                if self._ended or (end < len(self._text) and self._text[end] in _AFTER):
                    self._at = end
                    return value
                problem = ""
            except (ValueError, RecursionError) as error:
                problem = str(error).partition(":")[0]
                if "integer string" in problem and self._json.parse_int is int:
                    self._json = json.JSONDecoder(
                        object_pairs_hook=self._object, parse_int=_whole_number
                    )
                    continue
            if len(self._text) - self._at > MAX_LINE:
                wanted = f"values of at most {MAX_LINE} characters"
                raise self._wrong(f"expected JSON with {wanted} ({problem or 'too long'})")
            if not self._more(size) and problem:
                raise self._wrong(f"expected JSON ({problem})")
            size *= 2

    def elements(self) -> Iterator[Any]:
        """The values of the array that begins here; moves behind it."""
        self.take("[")
        if self.next() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self.next() == "]":
                self._at += 1
                return
            self.take(",")

    def find(self, key: str) -> None:
        """Moves to the value that the object that begins here has under `key`."""
        self.take("{")
        while self.next() == '"':
            if self._named() == key:
                self.next()
                return
            self._skip()
            if self.next() != ",":
                break
            self._at += 1
        self.take("}")
        raise ConfigError(f"{self._name}: expected an array under {key!r}, got none")

    def finish(self, inside: bool) -> None:
        """Reads on to the end of the file, from within the top object if `inside`."""
        while inside and self.next() == ",":
            self._at += 1
            if self.next() != '"':
                raise self._wrong("expected a name")
            self._named()
            self._skip()
        if inside:
            self.take("}")
        if self.next():
            raise self._wrong("expected the end of the file")

    def _named(self) -> str:
        """The next name of the top object; moves behind its colon."""
        name = self.value()
        if name in self._names:
            raise self._wrong(f"expected each name once, got {name!r} twice")
        self._names.add(name)
        self.take(":")
        return name

    def _skip(self) -> None:
        if self.next() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.repeated = repeated(pairs)
        return found

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        data = self._file.read(size)
        self._ended = not data
        try:
            new = self._decode(data, self._ended)
        except UnicodeDecodeError as error:
            raise self._wrong(f"expected UTF-8 text ({error.reason})") from None
        self._before += self._at
        self._text, self._at = self._text[self._at :] + new, 0
        return bool(data)

    def _wrong(self, problem: str) -> SampleError:
        return SampleError(f"{self._name}: character {self._before + self._at:,}: {problem}")


def _whole_number(digits: str) -> float:
    """Python refuses to read more than 4300 digits; so many are beyond every limit anyway."""
    return int(digits) if len(digits) < 1000 else float(digits)


def repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first name that is there twice, as messages show it."""
    names = [name for name, _ in pairs]
    return cut(next(name for name in names if names.count(name) > 1), 80)


def plain_json(data: bytes | str) -> Any:
    """The value of a short JSON text, with or without a byte order mark.

    Raises:
        ValueError: one sentence: not UTF-8, not JSON, nested too deeply, or an object that has a
            name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"expected each name once, got `{repeated(pairs)}` twice")
        return found

    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got {error.reason}") from None
    except RecursionError:
        raise ValueError("expected values nested less deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON, got none ({error})") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text: only \\n and \\r\\n end one, the last may do without.

    `str.splitlines` also cuts at U+2028, U+0085, \\x1c and others, which stand within captions.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


class _PlainUnpickler(pickle.Unpickler):
    """Containers, texts and numbers; whatever would import or call anything is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        raise pickle.UnpicklingError(f"it would load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def plain_pickle(path: Path) -> Any:
    """What a pickle of builtin containers, texts and numbers holds (Python 2's too).

    Loading a pickle can run any code. Here it may name nothing but `set` and `frozenset`.

    Raises:
        ConfigError: not readable, not a pickle, or one of anything else.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin-1").load()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: expected a pickle of plain values ({why})") from None


class Table:
    """Values by key in a temporary file, so that a join does not need memory."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute("CREATE TABLE t (key TEXT, value TEXT)")
        self._indexed = False

    def add(self, key: Any, value: Any) -> None:
        """Adds a value that JSON can hold; a key may have several."""
        row = (json.dumps(key), json.dumps(value))
        self._rows.execute("INSERT INTO t VALUES (?, ?)", row)

    def get(self, key: Any) -> list[Any]:
        """The values of a key in the order they were added."""
        self._index()
        query = "SELECT value FROM t WHERE key = ? ORDER BY rowid"
        return [json.loads(value) for (value,) in self._rows.execute(query, (json.dumps(key),))]

    def groups(self) -> Iterator[tuple[Any, list[Any]]]:
        """Every key with its values, keys in the order they were first added."""
        self._index()
        query = "SELECT key FROM t GROUP BY key ORDER BY min(rowid)"
        for (key,) in self._rows.execute(query):
            yield json.loads(key), self.get(json.loads(key))

    def _index(self) -> None:
        if not self._indexed:
            self._rows.execute("CREATE INDEX keys ON t (key)")
            self._indexed = True
