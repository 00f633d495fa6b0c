"""pytest-benchmark: every problem with every contestant, a case each.

    pytest benchmarks/microbenchmarks.py --dtype float32 -k "side_attention and not compile"
    pytest benchmarks/microbenchmarks.py --shape quick --benchmark-json now.json
    pytest-benchmark compare before.json now.json

The problems and contestants are those of `python -m benchmarks`, and so are the options that choose
problems. A contestant's values and gradients are compared with ours before it is timed: one that
cannot run is skipped with its reason, one that disagrees fails. Cases run one after the other:
compare a case with itself over time, and take ratios between contestants from `python -m
benchmarks`, which interleaves them.
"""

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from benchmarks import choosing, problems
from benchmarks.contestants import admission
from benchmarks.contestants.admission import Contestant, Entry
from benchmarks.problems import Mode, Problem
from benchmarks.timing import rounds
from groundkern.ops.cases import Call

MOST = 100  # rounds
CASES = pytest.StashKey[dict[str, "Case"]]()
OURS, GRAPH = "groundkern", "groundkern, CUDA graph"


class Case(NamedTuple):
    """entry: a contestant, or the name of one that is prepared from ours."""

    problem: Problem
    mode: Mode
    entry: Entry | str

    @property
    def name(self) -> str:
        return self.entry if isinstance(self.entry, str) else self.entry.name

    @property
    def identifier(self) -> str:
        """Of word characters and without versions, so that runs can be compared:
        `issue-5-side_attention-S4096xN64-float32-full-SDPA-boolean-mask`."""
        name = re.sub(r":.*| \(.*| \d[\w.]*$", "", self.name)
        return re.sub(r"[^\w.]+", "-", f"{self.problem.key}/{self.mode}/{name}").strip("-")


def cases(config: pytest.Config) -> list[Case]:
    """Of the problems that the options choose: the floor, ours, baselines and peers."""
    options = config.option
    own = [admission.FLOOR, OURS] + [GRAPH] * (options.device != "cpu")
    return [
        Case(problem, mode, entry)
        for problem in choosing.chosen(options, list(problems.OPS))
        for mode in options.mode
        for entry in (*own, *admission.others(problem, not options.no_compile))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A case's parameter is its identifier, which is all that the JSON should say of it."""
    found = {case.identifier: case for case in cases(metafunc.config)}
    metafunc.config.stash[CASES] = found
    metafunc.parametrize("case", list(found), ids=list(found))


class Ours(NamedTuple):
    """Our own call of a problem: what the others are compared with."""

    call: Call
    contestant: Contestant
    outcome: admission.Outcome | None


@lru_cache(maxsize=1)  # the cases of a problem follow one another
def ours(problem: Problem, mode: Mode, device: torch.device, backend: str) -> Ours:
    call = problem.make(device)
    entry = admission.ours_on(admission.resolve(call, backend, device))
    return Ours(call, *entry.admitted(call, mode, problem.dtype, None))


def admitted(case: Case, device: torch.device, backend: str) -> Contestant:
    """The case's contestant, which agrees with ours; skips or fails if it cannot be timed."""
    problem, mode, entry = case
    if entry == admission.FLOOR:
        return admission.floor(problem, mode, device)
    us = ours(problem, mode, device, backend)
    found = us.contestant
    if us.outcome is None:
        pytest.fail(f"{found.name}: {found.status}")
    if entry == GRAPH:
        if not admission.can_replay(found, device):
            pytest.skip("a CUDA graph holds a call of the Triton kernels alone")
        found = admission.replayed(found, us.outcome, problem.dtype)
    elif isinstance(entry, Entry):
        found, _ = entry.admitted(us.call, mode, problem.dtype, us.outcome)
    if found.status.startswith(("refused", "out of memory")):
        pytest.skip(found.status)
    if found.run is None:
        pytest.fail(found.status)
    return found


def timed(
    found: Contestant, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(a round, what comes before it outside the clock): on a GPU the round ends when the device is
    done, and starts with an idle device and none of the inputs in the L2 cache."""
    before = found.before or (lambda: None)
    if device.type != "cuda":
        return found.run, before
    flush = rounds.cache_flush(device)

    def run() -> None:
        found.run()
        torch.cuda.synchronize(device)

    def setup() -> None:
        before()
        flush()
        torch.cuda.synchronize(device)

    return run, setup


def test_speed(case: str, request: pytest.FixtureRequest, benchmark) -> None:
    options = request.config.option
    device = torch.device(options.device)
    problem, mode, _ = chosen = request.config.stash[CASES][case]
    found = admitted(chosen, device, options.backend)
    floor = problem.floor(mode)
    benchmark.group = f"{problem.key}/{mode}"
    benchmark.extra_info |= {
        "contestant": found.name,
        "kind": found.kind,
        "problem": problem.name,
        "shape": problem.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "mode": mode,
        "device": str(device),
        "floor_bytes": floor.bytes,
        "floor_flops": floor.flops,
    }
    run, setup = timed(found, device)
    setup()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    fitting = int(float(options.benchmark_max_time) / seconds)
    count = max(options.benchmark_min_rounds, min(fitting, MOST))
    benchmark.pedantic(run, setup=setup, rounds=count, warmup_rounds=1)
