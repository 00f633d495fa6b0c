"""Step `peers`: ours beside plain torch, SDPA, FlexAttention and other libraries, interleaved."""

from __future__ import annotations

from benchmarks import problems
from benchmarks.gpu import calls
from benchmarks.gpu.devices.stand_in import PLAYED
from benchmarks.gpu.steps.ceilings import measured
from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.timing import suite

SECONDS, LEAST = 0.5, 8


def cases(context: Context) -> Cases:
    """Those that compile for every shape come in later cases, because they take long. Of side
    attention, which is also used without a backward, the forward alone too."""
    some = [(sized, "full") for sized in calls.compared()]
    some += [(sized, "forward") for sized, _ in some if sized.real.op == "side_attention"]
    for compiled in (False, True):
        for sized, mode in some:
            name = f"{sized.name}/{mode}{', with what compiles' if compiled else ''}"
            yield name, lambda s=sized, m=mode, c=compiled: _compare(context, s, m, c)


def _compare(context: Context, sized: calls.Sized, mode: problems.Mode, compiled: bool) -> None:
    device = context.device
    rows = suite.measure(
        device.problem(sized),
        mode,
        device.torch,
        backends=["triton"],
        compiled=compiled and not device.rehearsed,
        with_memory=not device.rehearsed,
        seconds=0.0 if device.rehearsed else SECONDS,
        least=2 if device.rehearsed else LEAST,
        ceilings=measured(context),
    )
    device.spend((30 if compiled else 3) + SECONDS + PLAYED["first"] * len(rows))
    for row in rows:
        context.write("row", case=sized.name, row=row)
