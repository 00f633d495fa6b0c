"""The system calls of this process on one folder, seen and answered from Python: `shim.c`."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
GO, KILL_BEFORE, KILL_AFTER, KILL_INSIDE, SHORT = 0, -1, -2, -3, -4
# Calls that never fail for lack of space.
NEED_NO_SPACE = ("unlink", "rmdir")


@dataclass(frozen=True)
class Call:
    """One system call.

    Args:
        op: what it does; "copy" is sendfile or copy_file_range, whose bytes are not seen.
        path: the file, "" if it has no name.
        other: the new name of a rename or link.
        data: the bytes of a write.
        size: bytes of a write, length of a truncate.
        offset: where a write lands.
        flags: of an open.
    """

    op: str
    path: str
    other: str
    fd: int
    data: bytes
    size: int
    offset: int
    flags: int


Before = Callable[[Call], int]
After = Callable[[Call, int], None]
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    *(ctypes.c_char_p,) * 3,
    ctypes.c_int,
    ctypes.c_void_p,
    *(ctypes.c_long,) * 3,
)
_kept: list[object] = []  # what C still calls must not be collected


@cache
def reason_not_to() -> str:
    """Why the shim cannot be used here; empty if it can."""
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        return "needs Linux on x86_64 or aarch64 (system calls are trapped with seccomp)"
    if not _compiler():
        return "needs a C compiler ($CC or cc) and there is none on PATH"
    try:
        library()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{SOURCE.name} cannot be built: {error}"
    probe = f"from {__name__} import probe; probe()"
    root = SOURCE.parents[2]
    done = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no seccomp here: {done.stderr.strip()[-200:]}"


def probe() -> None:
    """Watch a folder and see one call: what `reason_not_to` tries in a process of its own."""
    seen: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        watch(Path(folder).resolve(), lambda call: seen.append(call.op) or GO, lambda *_: None)
        os.mkdir(os.path.join(os.path.realpath(folder), "x"))
    if "mkdir" not in seen:
        raise RuntimeError("a trapped call was not seen")


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc"))


@cache
def library() -> ctypes.CDLL:
    """The compiled shim, built once for each version of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    built = Path(tempfile.gettempdir()) / f"groundkern-shim-{os.getuid()}-{digest}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        words = [_compiler(), "-O1", "-shared", "-fPIC", "-o", str(partial), str(SOURCE)]
        subprocess.run(words, check=True, capture_output=True)
        partial.replace(built)
    return ctypes.CDLL(str(built))


def watch(folder: Path, before: Before, after: After) -> None:
    """From now on, call back around every call of this thread that changes files in a folder.

    There is no way back: a process watches until it ends.

    Args:
        folder: absolute and without symbolic links.
        before: answers with GO, a kill, SHORT, or an errno that the call then fails with.
        after: is told the result, or -errno.

    Raises:
        OSError: the kernel has no seccomp, or does not allow it.
    """
    pending: list[Call] = []

    @_HOOK
    def hook(phase, op, path, other, fd, data, size, offset, flags):
        try:
            if phase == 1:
                after(pending.pop(), size)
                return GO
            held = ctypes.string_at(data, size) if data else b""
            names = (os.fsdecode(path), os.fsdecode(other))
            call = Call(op.decode(), *names, fd, held, size, offset, flags)
            answer = before(call)
            if answer in (GO, SHORT):
                pending.append(call)
            return answer
        except BaseException:  # it cannot pass through C, and nothing after it can be trusted
            sys.excepthook(*sys.exc_info())
            os._exit(99)

    _kept.append(hook)
    failed = library().shim_watch(os.fsencode(folder), hook)
    if failed:
        raise OSError(failed, os.strerror(failed))


def forked() -> None:
    """To be called in a child after a fork, so that its calls go on being seen."""
    library().shim_forked()


def calls_of_other_threads() -> int:
    """Calls in the folder that were not hooked, since another thread made them."""
    count = library().shim_elsewhere
    count.restype = ctypes.c_long
    return count()


def error_number(name: str) -> int:
    """The errno of a name like ENOSPC."""
    return getattr(errno, name)
