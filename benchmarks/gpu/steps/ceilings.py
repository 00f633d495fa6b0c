"""Step `ceilings`: the best that this card does today."""

from __future__ import annotations

import torch

from benchmarks.gpu.steps.worker import Cases, Context

UNITS = {"bandwidth": "bytes/s"}


def cases(context: Context) -> Cases:
    yield "device", lambda: context.write("device", **context.device.stamp())
    yield "ceilings", lambda: _ceilings(context)
    yield "launches", lambda: _launches(context)


def _ceilings(context: Context) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    for name, value in context.device.ceilings(dtypes).items():
        context.write("ceiling", name=name, value=value, unit=UNITS.get(name, "FLOP/s"))


def _launches(context: Context) -> None:
    for name, value in context.device.launch_costs().items():
        context.write("ceiling", name=name, value=round(value, 3), unit="us")


def measured(context: Context) -> dict[str, float]:
    """The recorded ceilings, for percent of the floor; empty if that step failed."""
    found = [x for x in context.before() if x["event"] == "ceiling"]
    return {x["name"]: float(x["value"]) for x in found}
