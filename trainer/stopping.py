"""SIGTERM and Ctrl-C: during training finish the step and save; at any other time stop at once.

A second signal ends the process on the spot. That loses nothing that is on disk, since files are
whole or absent at any moment; an exception instead would be raised somewhere in a destructor or in
a lock of other code, which drops it or prints a traceback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(Exception):
    """Signal `number` asked the program to stop; `saved` is its newest checkpoint, or empty."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(number)
        self.number, self.saved = number, saved


class StopSignals:
    """Turns the first SIGTERM or SIGINT into `Stopped`, and a second one into the process's end.

    Attributes:
        number: of the signal that came; 0: none.
        training: a first signal is only noted in `number`, and a step is finished first
            (`trainer.last_step`).
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handles both signals inside the block and restores the old handlers after it."""
        old = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent decides about Ctrl-C
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.number:
            _say("Stopped at once: nothing that is on disk is lost.")
            os._exit(128 + number)
        self.number = number
        if not self.training:
            raise Stopped(number)
        _say("Stopping after this step, which is saved; once more stops at once, without that.")


def _say(sentence: str) -> None:
    """Writes to stderr from a signal handler, where print might find its buffer in use."""
    os.write(2, f"\n{sentence}\n".encode())
