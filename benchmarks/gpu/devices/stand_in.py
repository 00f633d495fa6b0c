"""A device for rehearsals: calls of a few rows in Triton's interpreter, on a played clock.

Times are invented from each call's floor, so that the steps' own decisions (rounds, deadlines,
which tile is best) have something to decide on. Nothing here is a measurement: the record says
`rehearsed`, and `benchmarks.gpu.results` refuses it.
"""

from __future__ import annotations

import random
from zlib import crc32

import torch

from benchmarks.gpu.calls import Sized
from benchmarks.gpu.devices.device import Device, KernelTimes, Run, Timed
from benchmarks.gpu.supervising.clock import Clock
from benchmarks.gpu.supervising.schedule import START
from benchmarks.launches.noting import Launch, noted
from benchmarks.problems import Problem

# Guessed seconds on a card, of everything but the timed calls: a process's start, the first eager
# run, capture, a profile, an oracle in fp64, one compilation on one core, ceilings.
PLAYED = {
    "start": START,
    "first": 0.05,
    "capture": 0.04,
    "profile": 0.4,
    "oracle": 0.15,
    "compile": 2.0,
    "ceilings": 3.0,
    "round": 2e-4,  # besides the call: flush, events, synchronisation
}
MADE = 3  # calls of a sweep that run; the others return the last one's results
CORES = 14  # of the card's machine that are free to compile
CEILINGS = {"bandwidth": 3.0e12, "bfloat16": 7.5e14, "float16": 7.5e14, "float32": 5.0e13}


class StandIn(Device):
    """Plays a GPU.

    Args:
        spoiled: returns whether the current case is to return NaN.
    """

    rehearsed = True

    def __init__(self, clock: Clock, spoiled=lambda: False) -> None:
        super().__init__(clock)
        self.torch, self._spoiled = torch.device("cpu"), spoiled
        self._dice, self._made = random.Random(0), {}

    def stamp(self) -> dict[str, object]:
        return {"device": "stand-in", "torch": torch.__version__, "commit": "rehearsed"}

    def ceilings(self, dtypes: list[torch.dtype]) -> dict[str, float]:
        self.spend(PLAYED["ceilings"])
        names = ["bandwidth", *(str(x).removeprefix("torch.") for x in dtypes)]
        return {name: CEILINGS[name] for name in names}

    def problem(self, sized: Sized) -> Problem:
        return sized.small

    def observed(self, results):
        self.spend(PLAYED["first"])
        if not self._spoiled():
            return results
        return tuple([x * torch.nan if x.is_floating_point() else x for x in y] for y in results)

    def capture(self, run: Run) -> tuple[Run, object]:
        self.spend(PLAYED["capture"])
        return (lambda: None), run()

    def samples(
        self, runs: dict[str, Timed], *, seconds: float, least: int, most: int = 100
    ) -> dict[str, list[float]]:
        each = {name: self._played(name, timed.expected) for name, timed in runs.items()}
        for timed in runs.values():
            timed.run()
        round_ = sum(each[n] * t.calls + PLAYED["round"] for n, t in runs.items())
        rounds = max(least, min(most, int(seconds / round_)))
        self.spend(rounds * round_)
        shown = min(rounds, 5)
        return {
            n: [x * self._dice.uniform(1.0, 1.05) for _ in range(shown)] for n, x in each.items()
        }

    def _played(self, name: str, expected: float) -> float:
        """1.3 to 2.3 times what is expected, always the same for a name."""
        return expected * (1.3 + crc32(name.encode()) % 100 / 100)

    def noted_run(self, run: Run) -> tuple[object, list[Launch]]:
        """A sweep repeats a call with tile after tile: only the first few run, because the
        interpreter is slow."""
        made = self._made.setdefault(run, [])
        if len(made) < MADE:
            with noted() as seen:
                made.append((run(), seen))
        return made[-1]

    def seconds_of(self, launch: Launch, *, rounds: int, expected: float, label: str) -> float:
        played = self._played(f"{launch.name} {label}", expected)
        self.spend(PLAYED["capture"] + rounds * (12 * played + PLAYED["round"]))
        return played

    def kernels(self, replay: Run, calls: int, launched: list[Launch]) -> KernelTimes:
        self.spend(PLAYED["profile"])
        names = [x.name for x in launched]
        return [(name, names.count(name), 5.0) for name in dict.fromkeys(names)]

    def peak(self, run: Run) -> int:
        run()
        return 2**20

    def launch_costs(self) -> dict[str, float]:
        return {"graph_kernel_us": 2.0, "eager_launch_us": 8.0}
