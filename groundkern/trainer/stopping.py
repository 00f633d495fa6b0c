"""SIGTERM and Ctrl-C: during training finish the step and save; at any other time stop at once.

A second signal ends the process on the spot. That loses nothing that is on disk, since files are
whole or absent at any moment; an exception instead would be raised somewhere in a destructor or in
a lock of other code, which drops it or prints a traceback.

Of several processes that train together all stop after the same step (`agree`), whichever of them
a signal reached first.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS_OF_TORCHRUN = "PET_SIGNALS_TO_HANDLE"
"""The environment's name for torchrun's --signals-to-handle."""


class Stopped(Exception):
    """Signal `number` asked the program to stop; `saved` is its newest checkpoint, or empty.

    `agreed`: every process of the command stops at the same place.
    """

    def __init__(self, number: int, saved: str = "", agreed: bool = False):
        super().__init__(number)
        self.number, self.saved, self.agreed = number, saved, agreed


class StopSignals:
    """Turns the first SIGTERM or SIGINT into `Stopped`, and a second one into the process's end.

    Attributes:
        number: of the signal that came, to this process or to another of the command; 0: none.
        training: a first signal is only noted in `number`, and a step is finished first
            (`groundkern.trainer.last_step`).
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._received = 0
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

    def agree(self, number: int) -> None:
        """Stop as another process was asked to; the signal may still come to this one too.

        Args:
            number: of the signal; 0: none has asked.
        """
        self.number = self.number or number

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent decides about Ctrl-C
            if number == signal.SIGTERM and not (_several() and _in_group_of_another()):
                os._exit(128 + number)
            return
        self._received += 1
        if self._received > 1:
            _say("Stopped at once: nothing that is on disk is lost.")
            os._exit(128 + number)
        if self.number:  # the same stop, which reached another process first
            return
        self.number = number
        if not self.training:
            raise Stopped(number)
        if os.environ.get("RANK", "0") != "0":
            return
        if self._torchrun_waits(number):
            _say(
                "Stopping after this step, which is saved; torchrun ends what takes longer than "
                "its --shutdown-timeout (30 seconds)."
            )
        else:
            _say("Stopping after this step, which is saved; once more stops at once, without that.")

    def _torchrun_waits(self, number: int) -> bool:
        """Whether a launcher ends the processes itself some time after such a signal to it."""
        name = signal.Signals(number).name
        return _several() and name in os.environ.get(SIGNALS_OF_TORCHRUN, name)


def _several() -> bool:
    """Whether this process is one of several of the command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _in_group_of_another() -> bool:
    """Whether a signal to this process may be meant for its parent: torchrun signals whole groups,
    and a worker that has just been forked has no group of its own yet
    (`groundkern.trainer.counting`)."""
    return hasattr(os, "getpgrp") and os.getpgrp() != os.getpid()


def _say(sentence: str) -> None:
    """Writes to stderr from a signal handler, where print might find its buffer in use."""
    os.write(2, f"\n{sentence}\n".encode())
