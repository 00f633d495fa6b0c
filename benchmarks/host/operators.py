"""How many of torch's operators a layer calls, which is most of what it takes on the host."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.host import layers
from benchmarks.host.layers import WARM, Step

DEPTHS = (4, 12)  # what both call besides layers cancels


def operators(terms: dict, dtype: torch.dtype) -> tuple[float, float]:
    """Operators that supervision adds to a layer, forward and backward, and those of a layer
    without it."""
    counts: dict[str, list[int]] = {}
    for depth in DEPTHS:
        with layers.steps(depth, terms, dtype) as steps:
            for name, step in steps.items():
                counts.setdefault(name, []).append(_called(step))
    of_layer = {name: (y - x) / (DEPTHS[1] - DEPTHS[0]) for name, (x, y) in counts.items()}
    return of_layer["grounded"] - of_layer["plain"], of_layer["plain"]


def _called(step: Step) -> int:
    """By name, without those that another operator calls."""
    for _ in range(WARM):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    parents = [event.cpu_parent for event in events]
    return sum(parent is None or not parent.name.startswith("aten::") for parent in parents)
