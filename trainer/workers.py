"""Worker processes: how many, and how they leave Ctrl-C to their parent and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import connection


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
