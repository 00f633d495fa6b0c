"""The GPU as the steps use it. `stand_in.StandIn` has the same methods for a rehearsal."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from benchmarks.gpu.calls import Sized
from benchmarks.gpu.supervising.clock import Clock
from benchmarks.launches.noting import Launch, noted
from benchmarks.problems import Problem
from benchmarks.timing import machine, memory, rounds

Run = Callable[[], object]
KernelTimes = list[tuple[str, float, float]]  # (name, launches, microseconds) of one call


class DeviceLost(RuntimeError):
    """After an illegal access every later call of the process fails too: a new process has to go
    on."""


@dataclass(frozen=True)
class Timed:
    """What is timed: `run` makes `calls` calls. expected: seconds of one, for a rehearsal."""

    run: Run
    calls: int = 1
    expected: float = 1e-4


class Device:
    """What every step asks of a device. This base class has no device, for steps that only
    compile."""

    rehearsed = False

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def spend(self, seconds: float) -> None:
        """Advances the clock of a rehearsal; real time passes by itself."""
        self.clock.spend(seconds)

    def settle(self) -> None:
        """Waits for the device.

        Raises:
            DeviceLost: nothing more can run in this process.
        """

    def forget(self) -> None:
        """Frees memory of the device between cases."""


class Gpu(Device):
    """One CUDA device, the current one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device here")
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self._timer = None

    def stamp(self) -> dict[str, object]:
        """What the record says of the machine."""
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            **machine.stamp(self.torch),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }

    def ceilings(self, dtypes: list[torch.dtype]) -> dict[str, float]:
        return machine.ceilings(self.torch, dtypes)

    def problem(self, sized: Sized) -> Problem:
        return sized.real

    def observed(self, results):
        """The results unchanged; a rehearsal may spoil them."""
        return results

    def settle(self) -> None:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceLost(str(error).strip().splitlines()[0]) from error

    def forget(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def capture(self, run: Run) -> tuple[Run, object]:
        """(replay of a CUDA graph of `run`, what the captured run returned)."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        graph.replay()
        self.settle()
        return graph.replay, results

    def samples(
        self, runs: dict[str, Timed], *, seconds: float, least: int, most: int = 100
    ) -> dict[str, list[float]]:
        """Seconds of one call of each, interleaved, with the L2 cache overwritten before each."""
        self._timer = self._timer or rounds.cuda_timer(self.torch)
        plain = {name: timed.run for name, timed in runs.items()}
        found = rounds.interleave(plain, self._timer, seconds=seconds, least=least, most=most)
        return {name: [x / runs[name].calls for x in values] for name, values in found.items()}

    def noted_run(self, run: Run) -> tuple[object, list[Launch]]:
        """(what a call returned, its launches)."""
        with noted() as seen:
            return run(), seen

    def seconds_of(self, launch: Launch, *, rounds: int, expected: float, label: str) -> float:
        """Median seconds of one launch by graph replay, on copies of its tensors that are not in
        the L2 cache.

        Three sets of copies take turns in one graph, four times over, so that launching the graph
        itself takes a small part of the time. `expected` and `label` are for a rehearsal.
        """
        some = (launch, launch.aside(), launch.aside())

        def run() -> None:
            for _ in range(4):
                for one in some:
                    one.again()

        replay, _ = self.capture(run)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found = []
        for _ in range(rounds):
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) * 1e-3 / (4 * len(some)))
        return statistics.median(found)

    def kernels(self, replay: Run, calls: int, launched: list[Launch]) -> KernelTimes:
        """Kernel times by torch's profiler. `launched`: the launches of one call, which a stand-in
        uses instead."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        replays = 3
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(replays):
                replay()
            torch.cuda.synchronize()
        found: dict[str, tuple[int, float]] = {}
        for event in profile.events():
            if event.device_type == DeviceType.CUDA and event.name != "Context Sync":
                count, time = found.get(event.name, (0, 0.0))
                found[event.name] = (count + 1, time + event.time_range.elapsed_us())
        share = replays * calls
        return [(name, n / share, time / share) for name, (n, time) in found.items()]

    def peak(self, run: Run) -> int:
        """Bytes of one call beyond its inputs."""
        return memory._of_cuda(run)

    def launch_costs(self) -> dict[str, float]:
        """Microseconds of a kernel that does next to nothing, in a graph and from Python."""
        x = torch.zeros(32, device=self.torch)

        def some() -> None:
            for _ in range(50):
                x.add_(1.0)

        replay, _ = self.capture(some)
        timed = {"graph_kernel_us": Timed(replay, 50), "eager_launch_us": Timed(some, 50)}
        found = self.samples(timed, seconds=0.2, least=5)
        return {name: 1e6 * statistics.median(values) for name, values in found.items()}
