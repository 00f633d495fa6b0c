"""What a call would launch, and how to compile it for a GPU that this process does not open.

`dry` runs a call's launchers on meta tensors, inside the bodies of our ops.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from benchmarks import problems
from benchmarks.contestants import admission
from benchmarks.launches.noting import Launch, noted
from benchmarks.launches.recording import Bodies
from benchmarks.problems import Problem
from groundkern import backends

META = torch.device("meta")


def dry(problem: Problem, mode: problems.Mode = "full") -> list[Launch]:
    """The launches of a call, on meta tensors: nothing is computed."""

    def empty(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with (
        mock.patch.object(problems, "randn", empty),
        mock.patch.object(admission, "randn", empty),
        mock.patch.object(backends, "choose", return_value="triton"),
        noted(launch=False) as seen,
    ):
        call = problem.make(META)
        run, _ = admission.runner(call, admission.ours(call, "triton"), mode)
        with Bodies():
            run()
    return seen


class _Driver:
    """What Triton asks a driver before it compiles, for a GPU that may be absent."""

    def __init__(self, target) -> None:
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int) -> None:
    """Makes this process compile for a CUDA GPU of a capability (90 for 9.0)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(_Driver(GPUTarget("cuda", capability, 32)))


def distinct(launches: list[Launch]) -> list[Launch]:
    """The first launch of each piece of code."""
    found: dict[str, Launch] = {}
    for launch in launches:
        found.setdefault(compile_key(launch), launch)
    return list(found.values())


def compile_key(launch: Launch) -> str:
    """Equal for launches that compile to the same code: the key of Triton's runtime cache."""
    kernel = launch.kernel
    _, _, _, _, binder = kernel.device_caches[0]
    _, specialization, options = binder(*launch.arguments, **launch.options)
    return f"{kernel.__name__} {specialization} {sorted(options.items())}"
