"""Which of several processes makes a file: one of them, also when others stop or wait."""

from __future__ import annotations

import errno
import os
import time

import pytest

from groundkern.trainer import durable, run_folder
from tests.trainer.claiming import claims, over


def told_to_wait(capfd) -> str:
    """What a child says before it waits, which it may take a while to say."""
    said, end = "", time.monotonic() + 60
    while not said.endswith("\n") and time.monotonic() < end:
        said += capfd.readouterr().out
        time.sleep(0.01)
    return said


def test_one_of_two_processes_makes_a_file_and_the_other_may_wait(tmp_path, capfd):
    path = tmp_path / "deep" / "0.json"
    with run_folder.claimed(path) as own:
        assert own
        child, told, end = claims(path)
        assert os.read(told, 9) == b"0 0"
        over(child, end)
        waiting, heard, go = claims(path, wait=True)
        assert told_to_wait(capfd) == f"Waiting for another process, which makes {path}\n"
        durable.write_text(path, "made")
    assert os.read(heard, 9) == b"1 1"
    over(waiting, go)
    child, told, end = claims(path)
    assert os.read(told, 9) == b"1 1"
    over(child, end)
    assert [p.name for p in path.parent.iterdir()] == ["0.json"]


def test_who_waited_for_one_that_stopped_has_the_file_to_itself(tmp_path, capfd):
    """The first removes the lock file for which the second waits; the third must not make its own
    beside it."""
    path = tmp_path / "0.json"
    with run_folder.claimed(path):
        waiting, heard, go = claims(path, wait=True)
        told_to_wait(capfd)
    assert os.read(heard, 9) == b"1 0"
    child, told, end = claims(path)
    assert os.read(told, 9) == b"0 0"
    over(child, end)
    over(waiting, go)
    with run_folder.claimed(path) as own:
        assert own
    assert not list(tmp_path.iterdir())


def test_a_disk_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", none)
    with pytest.raises(durable.StorageError, match="No locks"), run_folder.claimed(tmp_path / "x"):
        pass
