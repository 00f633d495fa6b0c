"""Progress bars with a rate that do not flood a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress(title: str, *, total: int, unit: str, done: int = 0) -> tqdm:
    """A bar on stderr: ten times a second on a terminal, every ten seconds elsewhere."""
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, initial=done, unit=unit, mininterval=pause)
