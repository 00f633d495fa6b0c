"""Kernels are launched on the device of their tensors, whichever device is current.

With a model spread over GPUs (`device_map="auto"`) the current device is often another. This needs
no GPU: the tensors are meta tensors, the first of which says that it is on `cuda:1`; a stand-in for
the driver remembers which device is current; and a recorder replaces Triton's launch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = {  # case -> the ops it calls
    "side_attention/main_statistics": ("side_attention", "side_attention_backward"),
    "attention_map/map_visible_sets_weights": ("attention_map", "attention_map_backward"),
    "attention_map/kl_visible_mean": ("attention_map", "attention_map_backward"),
    "linear_cross_entropy/everything": ("linear_cross_entropy", "linear_cross_entropy_backward"),
    "linear_kl/everything": ("linear_kl", "linear_kl_backward"),
}
PROGRAM = '''
import importlib, sys
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.launches.recording import body_of

current, launched = [0], {}

def exchange(index):
    before, current[0] = current[0], index
    return before

torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
JITFunction.run = lambda kernel, *args, **options: launched[name].append(current[0])

class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "groundkern" and func.name() != "groundkern::plan":
            calls.append((f"{place} {func.name()}", args))
        return func(*args, **(kwargs or {}))

calls = []
for place in sys.argv[1:]:
    op, case = place.split("/")
    module = importlib.import_module(f"groundkern.ops.{op}.cases")
    if not op.startswith("linear_"):  # the reference gets the plan that Triton is given below
        name, launched["plan"] = "plan", []
        registered = importlib.import_module(f"groundkern.ops.{op}.op")
        registered.plan = lambda _, *given, op=registered: op.kernels("triton").plan(*given)
    call = module.CASES[case](torch.float32, torch.device("cpu"))
    inputs = {n: x.detach().requires_grad_(n not in call.fixed) for n, x in call.inputs.items()}
    with Recorder():
        results = call.run(**inputs, backend="reference")[: call.differentiable]
        sum(x.nan_to_num(neginf=0.0).sum() for x in results).backward()

class Second(torch.Tensor):
    """Says cuda:1 when first asked, by the op's wrapper, and then the truth."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    asked = False

    @property
    def device(self):
        first, self.asked = not self.asked, True
        return torch.device("cuda", 1) if first else torch.device("meta")

launched.pop("plan")
name, (*arguments, _, _, _) = next(x for x in calls if x[0].endswith("::linear_cross_entropy"))
# the reference has no such op: its arguments are those of the plain one
calls.append((name + "_with_gradients", (*arguments, None, True, "")))
for name, args in calls:
    if name in launched:
        continue
    launched[name] = []
    first, *rest = (x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in args[:-1])
    body_of(name.split()[1])(torch.Tensor._make_subclass(Second, first), *rest, "triton")
    assert current == [0], "the caller's device is current again"
for name, devices in launched.items():
    print(name, len(devices), *sorted(set(devices)), sep="\\t")
'''


def test_kernels_are_launched_on_their_tensors_device() -> None:
    pytest.importorskip("triton", reason="needs the triton package")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *OPS],
        cwd=ROOT,
        env={k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    launches = {name: rest for name, *rest in (x.split("\t") for x in result.stdout.splitlines())}
    wanted = {f"{case} groundkern::{op}" for case, ops in OPS.items() for op in ops}
    loss = "linear_cross_entropy/everything groundkern::linear_cross_entropy"
    assert set(launches) == wanted | {f"{loss}_with_gradients"}
    for name, (count, *devices) in launches.items():
        assert int(count) > 0, name
        assert devices == ["1"], name
