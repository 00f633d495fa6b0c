"""The shim: each way to change a file is seen, and each fault is what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import shim
from tests.faults.client import REPOSITORY

_REASON = shim.reason_not_to()
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)

# Runs with a folder and, by op, what its calls are answered with; prints what was called.
PROGRAM = """
import ctypes, errno, json, os, shutil, sys
from pathlib import Path
from tests.faults import shim

folder, answers = Path(sys.argv[1]), json.loads(sys.argv[2])
seen = []

def before(call):
    seen.append([call.op, os.path.relpath(call.path, folder), call.size])
    return answers.get(call.op, shim.GO)

shim.watch(folder, before, lambda call, result: seen[-1].append(result))
try:
    exec(sys.argv[3])
except OSError as error:
    print(errno.errorcode[error.errno], file=sys.stderr)
print(json.dumps(seen))
"""


def run(folder: Path, program: str, **answers: int) -> tuple[list, str, int]:
    """What a program called in a folder, what it said, and its status."""
    words = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(answers), program]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    return json.loads(done.stdout or "[]"), done.stderr.strip(), done.returncode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


WAYS = """
(folder / "a").write_text("hello")
with open(folder / "a", "a") as file:
    file.write("world")
fd = os.open(folder / "a", os.O_RDWR)
os.pwrite(fd, b"J", 0), os.writev(fd, [b"xy", b"z"]), os.fsync(fd), os.ftruncate(fd, 9)
os.posix_fallocate(fd, 0, 10), os.close(fd)
os.rename(folder / "a", folder / "b"), os.link(folder / "b", folder / "c"), os.unlink(folder / "c")
os.symlink("b", folder / "s"), os.mkdir(folder / "d"), shutil.copy(folder / "b", folder / "d" / "e")
os.truncate(folder / "b", 1), shutil.rmtree(folder / "d"), (folder / "b").read_text()
"""


def test_every_way_to_change_a_file_is_seen(folder):
    seen, said, status = run(folder, WAYS)
    assert (said, status) == ("", 0)
    assert [call[:2] for call in seen if call[0] not in ("close", "copy")] == [
        ["open", "a"],
        ["write", "a"],
        ["open", "a"],
        ["write", "a"],
        ["open", "a"],
        ["write", "a"],
        ["write", "a"],
        ["fsync", "a"],
        ["truncate", "a"],
        ["allocate", "a"],
        ["rename", "a"],
        ["link", "b"],
        ["unlink", "c"],
        ["symlink", "s"],
        ["mkdir", "d"],
        ["open", "d/e"],
        ["truncate", "b"],
        ["unlink", "d/e"],
        ["rmdir", "d"],
    ]
    assert sum(call[3] for call in seen if call[:2] == ["copy", "d/e"]) == 10
    assert [call[2:] for call in seen if call[0] == "write"] == [[5, 5], [5, 5], [1, 1], [3, 3]]
    assert [call[1] for call in seen if call[0] == "close"] == ["a", "a", "a", "d/e"]


# glibc's stdio writes without going through any function that a library could stand in for, and
# Rust's rustix (safetensors renames with it) calls the kernel itself.
HIDDEN = """
libc = ctypes.CDLL(None, use_errno=True)
libc.fopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fopen(os.fsencode(folder / "a"), b"w"))
libc.fputs(b"hello", stream), libc.fclose(stream)
number = {"x86_64": 264, "aarch64": 38}[os.uname().machine]
names = [ctypes.c_char_p(os.fsencode(folder / name)) for name in "ab"]
if libc.syscall(number, -100, names[0], -100, names[1]):
    raise OSError(ctypes.get_errno(), "rename")
"""


def test_calls_that_no_library_function_makes_are_seen(folder):
    seen, said, status = run(folder, HIDDEN)
    assert (said, status) == ("", 0)
    assert [call[0] for call in seen] == ["open", "write", "close", "rename"]
    assert (folder / "b").read_text() == "hello"
    _, said, _ = run(folder, HIDDEN, rename=shim.error_number("EIO"))
    assert said == "EIO"
    assert (folder / "a").exists()


WRITE = "(folder / 'a').write_bytes(bytes(range(100)))"


def test_a_short_write_writes_a_part_and_the_rest_is_up_to_the_writer(folder):
    seen, said, status = run(folder, WRITE, write=shim.SHORT)
    assert (said, status) == ("", 0)
    assert [call[2:] for call in seen if call[0] == "write"][:2] == [[100, 50], [50, 25]]
    assert (folder / "a").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("op", ["open", "write", "close"])
def test_an_error_is_the_call_s_own(folder, op):
    _, said, _ = run(folder, WRITE, **{op: shim.error_number("ENOSPC")})
    assert said == "ENOSPC"
    assert (folder / "a").exists() == (op != "open")
    assert op == "open" or (folder / "a").stat().st_size == (100 if op == "close" else 0)


@pytest.mark.parametrize(
    ("answer", "size"), [(shim.KILL_BEFORE, 0), (shim.KILL_INSIDE, 50), (shim.KILL_AFTER, 100)]
)
def test_a_kill_leaves_what_was_written_until_then(folder, answer, size):
    _, _, status = run(folder, WRITE, write=answer)
    assert status == -signal.SIGKILL
    assert (folder / "a").stat().st_size == size


def test_other_folders_are_left_alone(folder):
    (folder / "watched").mkdir()
    program = "(folder.parent / 'b').write_text('x'); Path(str(folder) + 'x').write_text('y')"
    seen, said, _ = run(folder / "watched", program, write=shim.error_number("EIO"))
    assert (seen, said) == ([], "")
    assert sorted(os.listdir(folder)) == ["b", "watched", "watchedx"]
