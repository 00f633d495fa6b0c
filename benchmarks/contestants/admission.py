"""Prepares contestants outside the clock, and admits those that run and agree with ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contestants import baselines, peers
from benchmarks.contestants.baselines import Refused, Step
from benchmarks.costs import floors
from benchmarks.problems import Mode, Problem, randn
from groundkern.ops.cases import Call

Outcome = tuple[list[Tensor], list[Tensor]]  # results, gradients
PREFERRED = {"cuda": "triton", "cpu": "native"}
FLOOR = "floor: the GEMMs alone"
# ||a - b|| / ||b|| of values and gradients, between ours and a baseline in the same dtype. Loose:
# rounding passes, another function does not. tests/closeness.py compares ours with fp64.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Contestant:
    """One timed call, or the reason why there is none.

    kind: "floor", "ours", "baseline" or "peer". run: the call; None if it cannot run, and status
    says why. before: what each call needs first, outside the clock. allocates: whether the call
    allocates its outputs itself, so that its peak memory means something.
    """

    name: str
    kind: str
    run: Callable[[], object] | None
    status: str = "timed"
    before: Callable[[], object] | None = None
    allocates: bool = True


def leaves(call: Call) -> dict[str, Tensor]:
    return {n: x.detach().requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}


def runner(
    call: Call, step: Step, mode: Mode
) -> tuple[Callable[[], Outcome], Callable[[], object] | None]:
    """A function that runs one step, and what it needs before each call.

    It returns (results, gradients). "forward" has no gradients; "backward" has no results, and its
    forward is what comes before.
    """
    inputs = leaves(call)
    trained = [x for x in inputs.values() if x.requires_grad]
    upstream: list[Tensor] = []
    waiting: list[tuple[Tensor, ...]] = []  # the forward whose backward is timed next

    def forward() -> Outcome:
        with torch.no_grad():
            return list(step(inputs)), []

    def gradients(results: tuple[Tensor, ...]) -> list[Tensor]:
        if not upstream:  # drawn once; not all equal, which would hide errors
            upstream.extend(
                randn(9 + i, *x.shape, dtype=x.dtype, device=x.device)
                for i, x in enumerate(results)
            )
        return list(torch.autograd.grad(results, trained, upstream))

    def full() -> Outcome:
        results = step(inputs)
        return list(results), gradients(results)

    match mode:
        case "forward":
            return forward, None
        case "backward":
            return lambda: ([], gradients(waiting.pop())), lambda: waiting.append(step(inputs))
    return full, None


def resolve(call: Call, backend: str, device: torch.device) -> str:
    """The backend that `auto` chooses for this call; a named one is returned as it is."""
    if backend != "auto":
        return backend
    name = PREFERRED.get(device.type, "reference")
    try:
        with torch.no_grad():
            call.run(backend=name)
    except ValueError as error:
        if not str(error).startswith("`backend`"):
            raise
        return "reference"
    return name


def ours(call: Call, backend: str) -> Step:
    return lambda x: call.run(backend=backend, **x)[: call.differentiable]


def _distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; NaN never passes a comparison."""
    a, b = a.detach().float(), b.detach().float()
    norm = float(b.norm())
    return float((a - b).norm()) / norm if norm else float(a.norm())


def disagreement(got: Outcome, wanted: Outcome, dtype: torch.dtype) -> str:
    """What differs between two runs by more than the tolerance; empty if nothing does."""
    allowed = TOLERANCE[dtype]
    for kind, some, others in zip(("result", "gradient"), got, wanted, strict=True):
        for i, (a, b) in enumerate(zip(some, others, strict=True)):
            distance = _distance(a, b)
            if not distance <= allowed:
                return f"{kind} {i} is {distance:.1e} away from ours ({allowed:.0e} allowed)"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


class Entry(NamedTuple):
    """A contestant that is not prepared yet; kind as in Contestant."""

    name: str
    kind: str
    adapter: Callable[[Call], Step]

    def admitted(
        self, call: Call, mode: Mode, dtype: torch.dtype, wanted: Outcome | None
    ) -> tuple[Contestant, Outcome | None]:
        """Prepares and runs it once; returns (the contestant, what it returned). It can be timed
        only if that agrees with `wanted`."""
        try:
            run, before = runner(call, self.adapter(call), mode)
            if before:
                before()
            got = run()
        except Refused as reason:
            return self._left_out(f"refused: {reason}"), None
        except torch.OutOfMemoryError:
            return self._left_out("out of memory"), None
        except Exception as error:
            return self._left_out(f"failed: {_first_line(error)}"), None
        wrong = disagreement(got, wanted, dtype) if wanted else ""
        if wrong:
            return self._left_out(f"disagrees: {wrong}"), None
        return Contestant(self.name, self.kind, run, before=before), got

    def _left_out(self, status: str) -> Contestant:
        return Contestant(self.name, self.kind, None, status)


def ours_on(backend: str) -> Entry:
    """Ours on a named backend."""
    return Entry(f"groundkern {backend}", "ours", lambda call: ours(call, backend))


def others(problem: Problem, compiled: bool = True) -> list[Entry]:
    """Baselines, then peers; without `compiled`, not those that compile for every shape."""
    baseline = baselines.BASELINES[problem.op] | (baselines.WHOLE if problem.whole else {})
    peer = peers.peers(problem.op).items()
    return [
        *(Entry(name, "baseline", adapter) for name, adapter in baseline.items()),
        *(Entry(n, "peer", a) for n, a in peer if compiled or not n.startswith(peers.COMPILED)),
    ]


def floor(problem: Problem, mode: Mode, device: torch.device) -> Contestant:
    """The matrix products alone, which have run once."""
    gemms = floors.plain_gemms(problem.floor(mode), problem.dtype, device)
    gemms()
    return Contestant(FLOOR, "floor", gemms, allocates=False)


def contestants(
    problem: Problem,
    mode: Mode,
    device: torch.device,
    *,
    backends: list[str],
    compiled: bool = True,
) -> list[Contestant]:
    """The floor, ours on each backend, then baselines and peers.

    If the first of our backends fails, only these two: there is nothing to compare with.
    """
    call = problem.make(device)
    found, wanted = [floor(problem, mode, device)], None
    for backend in dict.fromkeys(resolve(call, b, device) for b in backends):
        one, got = ours_on(backend).admitted(call, mode, problem.dtype, wanted)
        found.append(one)
        wanted = wanted or got
        if wanted is None:
            return found
        if can_replay(one, device):
            found.append(replayed(one, wanted, problem.dtype))
    for entry in others(problem, compiled):
        found.append(entry.admitted(call, mode, problem.dtype, wanted)[0])
    return found


def can_replay(one: Contestant, device: torch.device) -> bool:
    """Whether a CUDA graph can capture the call: only Triton's, with nothing to do before it."""
    return device.type == "cuda" and "triton" in one.name and bool(one.run) and not one.before


def replayed(one: Contestant, wanted: Outcome, dtype: torch.dtype) -> Contestant:
    """The same call captured in a CUDA graph: device time without the host's launch overhead."""
    name = f"{one.name}, CUDA graph"
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            one.run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = one.run()
        graph.replay()
        wrong = disagreement(got, wanted, dtype)
    except Exception as error:
        return Contestant(name, "ours", None, f"failed: {_first_line(error)}")
    if wrong:
        return Contestant(name, "ours", None, f"disagrees: {wrong}")
    return Contestant(name, "ours", graph.replay, allocates=False)
