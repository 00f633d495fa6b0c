"""The measuring loop: contestants timed in rounds, each round in a new random order.

On a shared machine only ratios within a round mean something, so every contestant runs once per
round and ratios are taken round by round.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch


def cpu_timer(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cache_flush(device: torch.device) -> Callable[[], object]:
    """A function that overwrites the GPU's L2 cache."""
    properties = torch.cuda.get_device_properties(device)
    return torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device).zero_


def cuda_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Times a call by device events, with the L2 cache overwritten before it."""
    flush = cache_flush(device)

    def timer(run: Callable[[], object]) -> float:
        flush()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    return timer


def interleave(
    runs: dict[str, Callable[[], object]],
    timer: Callable[[Callable[[], object]], float],
    *,
    before: dict[str, Callable[[], object]] | None = None,
    seconds: float,
    least: int = 3,
    most: int = 100,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every run in every round: each round times all of them once, in random order.

    Rounds go on until `seconds` have passed, at least `least` and at most `most`. The runs are
    warm: `contestants` has run each once. An error in a run ends the measurement; no contestant
    drops out silently.
    """
    order, dice = list(runs), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        dice.shuffle(order)
        for name in order:
            if before and name in before:
                before[name]()
            samples[name].append(timer(runs[name]))
    assert len({len(s) for s in samples.values()}) <= 1, "every contestant runs in every round"
    return samples


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def ratio(samples: list[float], others: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80 of samples over others, round by round."""
    return quantiles([a / b for a, b in zip(samples, others, strict=True)])
