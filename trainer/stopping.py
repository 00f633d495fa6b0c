"""SIGTERM and Ctrl-C: during training finish the step and save; at any other time stop at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback


class Stopped(Exception):
    """Signal `number` asked the program to stop; `saved` is its newest checkpoint, or empty."""

    def __init__(self, number: int, saved: str = ""):
        super().__init__(number)
        self.number, self.saved = number, saved


class StopSignals(TrainerCallback):
    """Turns the first SIGTERM or SIGINT during training into "finish this step and save".

    A signal outside training, or a second one, raises `Stopped` at once. One more while the program
    unwinds from that ends it on the spot: it may hang in what it cleans up.
    """

    def __init__(self) -> None:
        self.number = 0
        self._training = self._unwinding = False
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
        if self._unwinding:
            os._exit(128 + number)
        if not self._training or self.number:
            self._unwinding = True
            raise Stopped(number)
        self.number = number

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._unwinding = True, False

    def on_step_end(self, args, state, control, **kwargs):
        if self.number:
            control.should_log = control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
