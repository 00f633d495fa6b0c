"""Seconds since a run began: by the machine's clock, or played for a rehearsal.

A played clock moves only when time is spent on it, so that a rehearsal of seconds shows where every
minute of a real run would go.
"""

import time


class Clock:
    """The machine's clock.

    Args:
        elapsed: seconds since the run began, when this process starts.
    """

    played = False

    def __init__(self, elapsed: float = 0.0) -> None:
        self._began = time.monotonic() - elapsed

    def now(self) -> float:
        return time.monotonic() - self._began

    def spend(self, seconds: float) -> None:
        """Advances the clock of a rehearsal; real time passes by itself."""


class PlayedClock(Clock):
    played = True

    def __init__(self, elapsed: float = 0.0) -> None:
        self._now = elapsed

    def now(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        self._now += seconds
