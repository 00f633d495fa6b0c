"""Steps `replay` and `loss`: device time by CUDA-graph replay, forward and full, kernel by kernel.

Several copies of each call's inputs take turns within a graph, so that no call finds its own in the
L2 cache; the cache is also overwritten before each replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.contestants import admission
from benchmarks.contestants.admission import Contestant
from benchmarks.costs import floors
from benchmarks.gpu import calls
from benchmarks.gpu.calls import Sized
from benchmarks.gpu.devices.device import Timed
from benchmarks.gpu.reporting.sessions import EAGER, GRAPH
from benchmarks.gpu.steps.ceilings import measured
from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.timing import machine, suite

GEMMS = {"forward": ("logits",), "full": ("logits", "dhidden", "dweight")}
SECONDS, LEAST = 0.25, 10  # of timing per call and mode; rounds at least
CACHE = 2**28  # bytes: larger inputs need no copies, being several times any L2
SETS = 3
DEFAULT = {"bandwidth": 3.0e12, "bfloat16": 7.5e14}  # only for a rehearsal's clock


def cases(context: Context) -> Cases:
    some = calls.attention() if context.step.name == "replay" else calls.loss()
    for sized in some:
        for mode in ("forward", "full"):
            name = f"{sized.name}/{mode}"
            yield name, lambda sized=sized, mode=mode: _measure(context, sized, mode)


def _measure(context: Context, sized: Sized, mode: str) -> None:
    device, real = context.device, sized.real
    problem = device.problem(sized)
    runs = _runs(context, problem, mode)
    got, seen = device.noted_run(runs[0])
    device.settle()
    got = device.observed(got)
    finite = all(bool(x.isfinite().all()) for part in got for x in part)
    if not finite:
        raise FloatingPointError("results or gradients are not finite: nothing was timed")
    del got
    peak = device.peak(runs[0])
    floor, ceilings = real.floor(mode), measured(context)
    known = {**DEFAULT, **ceilings}
    expected = floor.seconds(known["bandwidth"], known[_name(real.dtype)])
    replay, _ = device.capture(lambda: [run() for run in runs])
    products = floors.plain_gemms(problem.floor(mode), problem.dtype, device.torch)
    gemm_replay, _ = device.capture(products)
    timed = {
        admission.FLOOR: Timed(gemm_replay, 1, expected),
        GRAPH: Timed(replay, len(runs), expected),
        EAGER: Timed(runs[0], 1, 3 * expected + 1e-4),
    }
    if real.op == "linear_cross_entropy":
        timed |= _each_gemm(context, problem, real, mode, known)
    samples = device.samples(timed, seconds=SECONDS, least=LEAST)
    kinds = {admission.FLOOR: "floor", GRAPH: "ours", EAGER: "ours"}
    found = [Contestant(name, kinds.get(name, "gemm"), timed[name].run) for name in timed]
    peaks = {EAGER: peak}
    stamp = (device.torch, ceilings, machine.load())
    for row in suite.rows_of(real, mode, found, samples, peaks, *stamp):
        context.write("row", case=sized.name, row=row)
    for name, count, us in device.kernels(replay, len(runs), seen):
        context.write("kernel", case=sized.name, mode=mode, kernel=name, calls=count, us=us)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runs(context: Context, problem, mode: str) -> list[Callable[[], tuple[list, list]]]:
    """The call on several sets of inputs, or on one that is too large for any cache."""
    first = problem.make(context.device.torch)
    size = sum(x.numel() * x.element_size() for x in first.inputs.values())
    sets = [first] + [problem.make(context.device.torch) for _ in range(SETS - 1) if size < CACHE]
    return [admission.runner(call, admission.ours(call, "triton"), mode)[0] for call in sets]


def _each_gemm(context: Context, problem, real, mode: str, known: dict) -> dict[str, Timed]:
    """Every matrix product of the loss by itself."""
    found = {}
    products = zip(GEMMS[mode], problem.floor(mode).gemms, real.floor(mode).gemms, strict=False)
    for name, gemm, true in products:
        run = floors.plain_gemms(floors.Floor(0, (gemm,)), problem.dtype, context.device.torch)
        b, m, n, k = true
        expected = 2 * b * m * n * k / known[_name(real.dtype)]
        replay, _ = context.device.capture(run)
        found[f"GEMM {name}"] = Timed(replay, 1, expected)
    return found
