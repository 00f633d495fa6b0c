"""Measures problems: one flat row of results per contestant."""

import gc
import time
from collections.abc import Iterator

import torch

from benchmarks.contestants import admission
from benchmarks.problems import Problem
from benchmarks.timing import machine, memory, rounds
from benchmarks.timing.results import FIELDS, Row

MILLI, MIB = 1e3, 2**20


def rows_of(
    problem: Problem,
    mode: str,
    found: list[admission.Contestant],
    samples: dict[str, list[float]],
    peaks: dict[str, int],
    device: torch.device,
    ceilings: dict[str, float],
    load: float | None,
) -> Iterator[Row]:
    """One row per contestant, including those that could not run."""
    dtype = str(problem.dtype).removeprefix("torch.")
    floor = problem.floor(mode)
    us = next(c.name for c in found if c.kind == "ours")
    bandwidth, rate = ceilings.get("bandwidth"), ceilings.get(dtype)
    seconds = floor.seconds(bandwidth, rate) if bandwidth and rate else None
    for c in found:
        row: Row = dict.fromkeys(FIELDS)
        row |= {"op": problem.op, "problem": problem.name, "shape": problem.shape, "dtype": dtype}
        row |= {"mode": mode, "swept": problem.swept}
        row |= {n: getattr(problem, n) for n in ("rows", "keys", "columns", "vocabulary")}
        row |= {"contestant": c.name, "kind": c.kind, "status": c.status, "load": load}
        row |= {"floor_flops": floor.flops, "floor_bytes": floor.bytes}
        row |= {"bandwidth": bandwidth, "matmul_rate": rate}
        row["floor_ms"] = seconds and round(seconds * MILLI, 5)
        times = samples.get(c.name)
        if times:
            row["rounds"] = len(times)
            named = (
                ("", times, None, "_ms", MILLI),
                ("to_gemms_", times, samples[admission.FLOOR], "", 1),
                ("ours_over_this_", samples.get(us, times), times, "", 1),
            )
            for prefix, a, b, suffix, unit in named:
                three = rounds.quantiles(a) if b is None else rounds.ratio(a, b)
                for p, x in zip(("p20", "p50", "p80"), three, strict=True):
                    row[f"{prefix}{p}{suffix}"] = round(x * unit, 5)
            if seconds:
                percent = 100 * seconds * MILLI / row["p50_ms"]
                row["percent_of_floor"] = float(f"{percent:.3g}")
        if c.name in peaks:
            row["peak_mib"] = round(peaks[c.name] / MIB, 2)
            row["memory_counts"] = memory.COUNTS[device.type]
        yield row


def measure(
    problem: Problem,
    mode: str,
    device: torch.device,
    *,
    backends: list[str],
    compiled: bool,
    with_memory: bool,
    seconds: float,
    least: int,
    ceilings: dict[str, float],
) -> list[Row]:
    """Checks and times the contestants of one problem, and measures their memory."""
    load = machine.load()
    found = admission.contestants(problem, mode, device, backends=backends, compiled=compiled)
    runs = {c.name: c.run for c in found if c.run is not None}
    timer = rounds.cuda_timer(device) if device.type == "cuda" else rounds.cpu_timer
    before = {c.name: c.before for c in found if c.before is not None}
    samples = rounds.interleave(runs, timer, before=before, seconds=seconds, least=least)
    peaks: dict[str, int] = {}
    if with_memory and device.type == "cuda":
        peaks = memory.of_contestants(found, device)
    del runs, before
    if with_memory and device.type == "cpu":
        peaks = memory.in_fresh_process(problem, mode, backends=backends, compiled=compiled)
    rows = list(rows_of(problem, mode, found, samples, peaks, device, ceilings, load))
    del found
    gc.collect()
    return rows


def suite(
    problems: list[Problem],
    modes: list[str],
    device: torch.device,
    *,
    deadline: float | None,
    left_out: list[str],
    **options,
) -> Iterator[list[Row]]:
    """The rows of each problem in turn; the names of those that the deadline (in seconds) cuts are
    appended to `left_out`."""
    start = time.perf_counter()
    for problem in problems:
        for mode in modes:
            if deadline is not None and time.perf_counter() - start > deadline:
                left_out.append(f"{problem.key}/{mode}")
                continue
            yield measure(problem, mode, device, **options)
