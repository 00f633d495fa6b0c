"""Step `smoke`: every op at few rows against fp64, with the tests' tolerance rule."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu import calls
from benchmarks.gpu.calls import Sized
from benchmarks.gpu.devices.stand_in import PLAYED
from benchmarks.gpu.steps.worker import Cases, Context
from benchmarks.problems import randn
from groundkern.ops.cases import Call
from tests.closeness import GRADIENTS, VALUES, measured

# Times the rule's bound: one draw with one row measures rounding poorly, and this step looks for
# wrong kernels. The tests apply the rule as it is.
SLACK = 2.0


def cases(context: Context) -> Cases:
    for sized in calls.smoke():
        yield sized.name, lambda sized=sized: _check(context, sized)


def differentiate(call: Call, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients) for upstream gradients that every dtype represents exactly."""
    inputs = {n: x.detach().requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    results = call.run(**inputs, backend=backend)[: call.differentiable]
    upstream = [
        randn(9 + i, *x.shape, dtype=torch.bfloat16, device=x.device).to(x.dtype)
        for i, x in enumerate(results)
    ]
    trained = [x for x in inputs.values() if x.requires_grad]
    return list(results), list(torch.autograd.grad(results, trained, upstream))


def _check(context: Context, sized: Sized) -> None:
    device = context.device
    call = device.problem(sized).make(device.torch)
    # A given lse never changes the result, so the oracle does not get it.
    oracle = replace(call, options={k: x for k, x in call.options.items() if k != "lse"})
    wide = replace(oracle, inputs={n: x.double() for n, x in call.inputs.items()})
    ours = device.observed(differentiate(call, "triton"))
    device.settle()  # so that an illegal access is this op's, not the oracle's
    truth, plain = differentiate(wide, "reference"), differentiate(oracle, "reference")
    device.spend(PLAYED["oracle"])
    trained = [n for n in call.inputs if n not in call.fixed]
    names = [f"result {i}" for i in range(len(ours[0]))], [f"d{n}" for n in trained]
    checks = []
    for part, factor in ((0, VALUES), (1, GRADIENTS)):
        for name, o, p, t in zip(names[part], ours[part], plain[part], truth[part], strict=True):
            error, allowed = measured(o, p, t, factor)
            right = error <= SLACK * allowed
            checks.append({"name": name, "error": error, "allowed": allowed, "ok": right})
    context.write("smoke", case=sized.name, ok=all(c["ok"] for c in checks), checks=checks)
