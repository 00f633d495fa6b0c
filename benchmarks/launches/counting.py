"""How often a call launches each kernel, forward and backward apart."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.costs import loss_times
from benchmarks.launches.cases import CASES
from benchmarks.launches.kernels import torch_kernels
from benchmarks.launches.recording import Recorder, recording
from groundkern.ops.cases import Call


class Counts(NamedTuple):
    """How often each kernel is launched."""

    triton: Counter[str]
    gemms: Counter[str]
    torch: Counter[str]


def _counts(recorder: Recorder) -> Counts:
    return Counts(
        Counter(x.name for x in recorder.triton),
        Counter(recorder.gemms),
        torch_kernels(recorder.operators),
    )


def count(make: Callable[[], Call]) -> dict[str, Counts]:
    """What a call launches "forward" and, if its result requires a gradient, "backward".

    Both are those of a second call with the same rows and sets, as in all layers but the first.
    "first forward" and "first backward" are there if the first call launches something else.
    """
    with recording():
        call = make()
        leaves = {n: x.requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    found: dict[str, Counts] = {}
    for turn in ("first ", ""):
        with recording() as forward:
            result = call.run()[0]
        found[f"{turn}forward"] = _counts(forward)
        if not result.requires_grad:
            continue
        with recording():
            upstream = torch.empty_like(result)
        with recording() as backward:
            torch.autograd.grad(result, [x for x in leaves.values() if x.requires_grad], upstream)
        found[f"{turn}backward"] = _counts(backward)
    for way in ("forward", "backward"):
        if found.get(f"first {way}") == found.get(way):
            found.pop(f"first {way}", None)
    return found


def counts() -> dict[str, dict[str, int]]:
    """The counts in the form of counts.json: name -> e.g. {"forward triton": 4}."""
    table = {}
    for name, make in CASES.items():
        table[f"gpu/{name}"] = {
            f"{way} {kind}": sum(kernels.values())
            for way, found in count(make).items()
            for kind, kernels in found._asdict().items()
        }
    for name, of_shape in loss_times.counted():
        table[f"gpu/loss {name}"] |= of_shape
    return table
