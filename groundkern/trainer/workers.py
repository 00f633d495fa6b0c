"""Worker processes: how many, and how they leave Ctrl-C to their parent and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")


def cores() -> int:
    """How many processes can run here at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forks() -> bool:
    """Whether a process costs little here: one that does not fork imports everything anew."""
    return "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"


def follow_parent() -> None:
    """Call first in a worker: signals are the parent's to handle, and its death ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would wait for work forever."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def forked(
    work: Callable[[T], R], pieces: Iterable[T], processes: int, *, ahead: int
) -> Iterator[R]:
    """What `work` makes of each piece, in their order, by forked processes of one thread each.

    Args:
        work: a fork has it as it is, so that it need not be picklable; what it returns must be.
        pieces: picklable; at most `ahead` of them for each process are in work or waiting.
        processes: how many.
        ahead: see `pieces`.

    Raises:
        BrokenProcessPool: a process was killed.
        Whatever `work` raises.
    """
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin, (work,))
    waiting: deque = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work_on, piece))
            if len(waiting) >= ahead * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable | None = None  # of this process


def _begin(work: Callable) -> None:
    global _work
    follow_parent()
    one_thread()
    _work = work


def _work_on(piece: Any) -> Any:
    return _work(piece)


def one_thread() -> None:
    """Torch uses one core in this process, whether it is imported already or later."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
