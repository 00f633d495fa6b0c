"""Power failures: what POSIX promises after a crash, and nothing more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.power import KINDS, Disk, Logged, states
from tests.faults.shim import Call

ROOT = Path("/run")
WRITING = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def call(op: str, path: str = "", other: str = "", data: bytes = b"", flags: int = 0) -> Logged:
    """One call that went well."""
    names = (str(ROOT / path), str(ROOT / other) if other else "")
    return Logged(Call(op, *names, 3, data, len(data), 0, flags), len(data))


def written(path: str, data: bytes, *, flushed: bool) -> list[Logged]:
    """The calls that write a file."""
    calls = [call("open", path, flags=WRITING), call("write", path, data=data)]
    return calls + [call("fsync", path)] * flushed + [call("close", path)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "a").write_bytes(b"old")
    return tmp_path


def after(base: Path, log: list[Logged]) -> dict[str, list[dict]]:
    """The folders that a power failure may leave at the end of a log, by kind."""
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed in range(30):
        for state in states(base, ROOT, [*log, Logged(saved=seed + 1), call("close", "a")], seed):
            if state.saved:
                found[state.kind].append(state.files)
    return found


def all_of(found: dict[str, list[dict]]) -> list[dict]:
    return [files for of_kind in found.values() for files in of_kind]


def test_what_is_flushed_and_renamed_in_a_flushed_folder_is_there(base):
    log = [*written("b", b"new", flushed=True), call("rename", "b", "a"), call("fsync")]
    assert all(files == {"a": b"new"} for files in all_of(after(base, log)))


def test_without_a_flush_of_the_folder_the_old_name_may_be_back(base):
    log = [*written("b", b"new", flushed=True), call("rename", "b", "a")]
    found = all_of(after(base, log))
    assert {"a": b"new"} in found
    assert {"a": b"old"} in found
    assert all("a" in files for files in found)  # a rename never leaves neither


def test_without_a_flush_of_the_file_the_new_name_may_hold_anything(base):
    log = [*written("b", b"newer!", flushed=False), call("rename", "b", "a"), call("fsync")]
    held = {files["a"] for files in all_of(after(base, log))}
    assert {b"", bytes(6)} <= held
    assert b"old" not in held


def test_an_appended_line_may_be_zeros_but_what_was_flushed_stays(base):
    tail = Logged(Call("write", str(ROOT / "a"), "", 3, b"tail", 4, 3, 0), 4)
    states_ = list(states(base, ROOT, [tail], 0))
    held = {state.files["a"] for state in states_}
    assert {b"old", b"old" + bytes(4)} <= held
    assert all(content.startswith(b"old") for content in held)


def test_a_removed_folder_may_be_back_in_part(base):
    (base / "d").mkdir()
    for name in "xy":
        (base / "d" / name).write_bytes(b"1")
    log = [call("unlink", "d/x"), call("unlink", "d/y"), call("rmdir", "d")]
    found = all_of(after(base, log))
    for left in ({}, {"d": None}, {"d": None, "d/x": b"1"}, {"d": None, "d/x": b"1", "d/y": b"1"}):
        assert {"a": b"old", **left} in found


def test_a_folder_that_moved_does_not_come_back_where_it_was_made(base):
    log = [call("mkdir", "saving"), call("fsync"), call("mkdir", "saving/x")]
    log += [call("rename", "saving/x", "x"), call("fsync"), call("fsync", "saving")]
    whole = {"a": b"old", "saving": None, "x": None}
    assert all(files == whole for files in all_of(after(base, log)))


def test_a_failed_call_changes_nothing(base):
    disk = Disk(base, ROOT)
    failed = call("rename", "a", "b")
    disk.apply(Logged(failed.call, -5))
    assert disk.files("power: zeros", None) == {"a": b"old"}
