"""Folders that go with the process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def temporary_folder() -> Path:
    """A new folder that is removed at the end of this process, and not by its forks."""
    folder = Path(tempfile.mkdtemp(prefix="groundkern-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
