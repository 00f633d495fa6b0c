"""Progress with a rate: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

_PAUSE = 30.0  # seconds between lines in a log file


class _Lines(tqdm):
    """A bar's text as lines of a log, with nothing that redraws."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write((str(self) if msg is None else msg).strip() + "\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        if not self.disable:
            if self.last_print_t >= self.start_t + self.delay:  # it has said something before
                self.display()
            self.disable = True  # tqdm's own would add an empty line
            self._decr_instances(self)

    def clear(self, nolock: bool = False) -> None:
        """There is nothing to clear."""

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        print(s, file=file or sys.stdout, end=end, flush=True)


def progress(title: str, *, total: int, unit: str, done: int = 0, shown: bool = True) -> tqdm:
    """A bar on stderr: ten times a second on a terminal, a line every 30 seconds elsewhere.

    Of several processes that torchrun started the first one has it.

    Args:
        title: what is being done.
        total, done: units in all, and those done before.
        unit: what is counted; bytes, "B", are shown with a prefix.
        shown: false for a bar that says nothing.
    """
    common = {
        "desc": title,
        "total": total,
        "initial": done,
        "unit": unit,
        "unit_scale": unit == "B",
        "disable": not shown or os.environ.get("RANK", "0") != "0",
    }
    if sys.stderr.isatty():
        return tqdm(**common)
    return _Lines(**common, mininterval=_PAUSE, ncols=100, ascii=True, delay=_PAUSE)
