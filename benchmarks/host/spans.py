"""How long named functions take, each without the named functions that it calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps


@dataclass
class Spans:
    """Calls and seconds by name, since the last `clear`."""

    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _below: list[float] = field(default_factory=lambda: [0.0])  # time in named functions, by depth

    def clear(self) -> None:
        self.calls.clear()
        self.seconds.clear()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, which notes its time under a name."""

        @wraps(function)
        def run(*args, **kwargs):
            self._below.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                own = took - self._below.pop()
                self._below[-1] += took
                self.calls[name] = self.calls.get(name, 0) + 1
                self.seconds[name] = self.seconds.get(name, 0.0) + own

        return run
