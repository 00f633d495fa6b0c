"""Where a prepare command writes: all or nothing at the end; a rerun continues unfinished files.

Until a run is finished, its lines are in `OUT.partial` and `OUT.rejected.jsonl.partial`. The record
`OUT.prepare.json` says which inputs and settings they belong to and up to where they are complete.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.differences import differences
from groundkern.trainer.durable import write_json
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.sources import Item

SAVE_EVERY = 2.0  # seconds between records
BLOCK = 2**20


class Output:
    """The output of one command, begun or continued; use it in a `with` block.

    Args:
        path: the JSON-lines file to make; its folder is made too.
        settings: plain values that decide what is written.
        overwrite: start again, whatever is there.

    Attributes:
        inputs: how many inputs are done.
        samples, rejected: how many lines were written.
        counts: what the command counted.
        passed_over: see `groundkern.trainer.prepare.sources.Source`; in the record, if there is
            any.
        finished: nothing is left to do.

    Raises:
        ConfigError: finished or partial output of other settings, or another process writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.rejects = path.with_name(path.name + ".rejected.jsonl")
        self.record = path.with_name(path.name + ".prepare.json")
        self.inputs = self.samples = self.rejected = 0
        self.counts: Counter[str] = Counter()
        self.passed_over: Mapping[str, Any] = {}
        self.finished = False
        self._files: list[IO[bytes]] = []
        self._saved = time.monotonic()
        self._good: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._begin(overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, lines: Iterable[bytes], counts: Mapping[str, float]) -> None:
        """Adds the samples of the next input."""
        for line in lines:
            self._files[0].write(line)
            self.samples += 1
        self.counts.update(counts)
        self._advance()

    def reject(self, item: Item, reason: str) -> None:
        """Adds the next input to the rejected ones, with why."""
        entry = {"where": item.where, "reason": reason.removeprefix(f"{item.where}: ")}
        original = item.value if item.original is None else item.original
        self._files[1].write(_line({**entry, "original": original}))
        if item.kind is not None:
            self.counts[f"passed over: {item.kind}"] += 1
        self.rejected += 1
        self._advance()

    def append(self, shard: Path) -> None:
        """Adds all of a finished output: its samples, its rejected inputs, its counts."""
        state = recorded(shard)
        rejects = shard.with_name(shard.name + ".rejected.jsonl")
        for path, file, size in zip((shard, rejects), self._files, state["bytes"]):
            if size:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file, BLOCK)
        for name in ("inputs", "samples", "rejected"):
            setattr(self, name, getattr(self, name) + state[name])
        self.counts.update(state["counts"])
        self._good = self._state()
        self.save()

    def save(self) -> None:
        """Writes to disk, and records how far the files are complete: to the last whole input."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.record, self._good)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Puts the files in their places; without rejected inputs there is no rejected file."""
        self.finished = True
        self._good = self._state()
        self.save()
        self._place()

    def close(self) -> None:
        """Closes the files; the next run redoes what was not saved."""
        for file in self._files:
            file.close()

    def _begin(self, overwrite: bool) -> None:
        state = None if overwrite else self._read()
        if self.finished:
            self._place()
            if not self.path.exists():
                self._refuse(f"{self.record.name} tells of it, but it is gone")
            return
        there = [path.name for path in (self.path, self.rejects) if path.exists()]
        if state is None and there and not overwrite:
            self._refuse(f"{there[0]} is there already")
        for path in (self.path, self.rejects):
            descriptor = os.open(_partial(path), os.O_RDWR | os.O_CREAT, 0o666)
            self._files.append(os.fdopen(descriptor, "r+b"))
        self._lock()
        if overwrite:
            for old in (self.path, self.rejects, self.record):
                old.unlink(missing_ok=True)
        sizes = state["bytes"] if state else [0, 0]
        for file, size in zip(self._files, sizes):
            if file.seek(0, os.SEEK_END) < size:
                self._refuse(f"{file.name} is shorter than {self.record.name} says")
            file.truncate(size)
            file.seek(size)
        self._good = self._state()
        if state is None:
            self.save()

    def _read(self) -> dict[str, Any] | None:
        try:
            state = recorded(self.path)
        except (OSError, ValueError) as error:
            self._refuse(f"{self.record.name} is damaged ({error})")
        if state is None:
            return None
        self._compare(state["settings"])
        for name in ("inputs", "samples", "rejected", "finished"):
            setattr(self, name, state[name])
        self.counts.update(state["counts"])
        return state

    def _lock(self) -> None:
        """Keeps a second process from mixing its lines in."""
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(self._files[0].fileno()), _partial(self.path).stat())
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise ConfigError(f"{self.path}: another process is writing it")

    def _refuse(self, why: str) -> None:
        raise ConfigError(f"{self.path}: {why}; choose another --output, or --overwrite")

    def _compare(self, saved: dict[str, Any]) -> None:
        changed = differences(saved, self.settings)
        if changed:
            self._refuse(f"made with other settings or inputs ({'; '.join(changed)})")

    def _advance(self) -> None:
        self.inputs += 1
        self._good = self._state()  # one assignment: a signal may come at any time
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def _state(self) -> dict[str, Any]:
        names = ("settings", "inputs", "samples", "rejected", "finished")
        state = {name: getattr(self, name) for name in names}
        passed_over = {"passed_over": dict(self.passed_over)} if self.passed_over else {}
        return {
            **state,
            **passed_over,
            "counts": dict(self.counts),
            "bytes": [file.tell() for file in self._files],
        }

    def _place(self) -> None:
        self.close()
        if self.rejected == 0:
            _partial(self.rejects).unlink(missing_ok=True)
        for path in (self.rejects, self.path):
            if _partial(path).exists():
                os.replace(_partial(path), path)


def recorded(path: Path) -> dict[str, Any] | None:
    """What the record of an output says, begun or finished; None: it has none.

    Args:
        path: its JSON-lines file.

    Raises:
        OSError, ValueError: it cannot be read, or is damaged.
    """
    record = path.with_name(path.name + ".prepare.json")
    return _checked(plain_json(record.read_bytes())) if record.exists() else None


def made_with(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether there is an output, begun or finished, of these settings.

    Args:
        path: its JSON-lines file.
        settings: see `Output`.
    """
    try:
        state = recorded(path)
    except (OSError, ValueError):
        return False
    if state is None:
        return False
    there = path.exists() or not state["finished"] or _partial(path).exists()
    return there and not differences(state["settings"], json.loads(json.dumps(settings)))


def rejected_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, reason) of each input that a finished output could not use.

    Args:
        path: its JSON-lines file.
    """
    rejects = path.with_name(path.name + ".rejected.jsonl")
    if not rejects.exists():
        return
    with rejects.open("rb") as file:
        for line in file:
            entry = json.loads(line)
            yield entry["where"], entry["reason"]


def _checked(state: Any) -> dict[str, Any]:
    """A record's values, known to be what `Output._state` wrote.

    Raises:
        ValueError: something else.
    """
    kinds = {"settings": dict, "counts": dict, "bytes": list, "finished": bool}
    for name, kind in kinds.items():
        found = state.get(name) if isinstance(state, dict) else None
        if not isinstance(found, kind):
            raise ValueError(f"expected `{name}` in it, got {found!r:.60}")
    numbers = [state.get(name) for name in ("inputs", "samples", "rejected")] + state["bytes"]
    if len(state["bytes"]) != 2 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"expected counts of inputs and bytes, got {numbers!r:.60}")
    counts = state["counts"].values()
    if not all(type(n) in (int, float) and abs(n) < 1e15 for n in counts):
        raise ValueError("expected numbers as `counts`, got something else")
    return state


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _line(entry: dict[str, Any]) -> bytes:
    """One line of JSON for any original."""
    original = entry["original"]
    if isinstance(original, bytes):
        try:
            entry["original"] = original.decode("utf-8")
        except UnicodeDecodeError:
            entry["original"] = {"base64": base64.b64encode(original).decode()}
    try:
        return json.dumps(entry, default=_plain).encode() + b"\n"
    except RecursionError:
        return json.dumps({**entry, "original": "nested too deeply to be copied"}).encode() + b"\n"


def _plain(value: Any) -> Any:
    """For what JSON cannot hold, such as the bytes of an image in a table."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)
