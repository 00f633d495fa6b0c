"""The kernel launches of a call: noted as they happen, made again one by one, or only compiled.

Nothing here needs a GPU: `dry` runs a call's launchers on meta tensors, with the bodies of our ops
in the place of their fakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness, problems
from benchmarks.problems import Problem
from groundkern import backends, tiles

META = torch.device("meta")
KERNEL = type(tiles.sum_kernel)  # Triton's JITFunction, or its interpreted stand-in


@dataclass(frozen=True)
class Launch:
    """One launch, with the tensors it had."""

    kernel: object
    arguments: tuple
    grid: object
    options: dict

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    def again(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def aside(self, least: int = 2**20) -> Launch:
        """The same on copies of its large tensors, so that a second run finds none in the cache."""
        copied = tuple(
            x.clone() if isinstance(x, Tensor) and x.numel() * x.element_size() >= least else x
            for x in self.arguments
        )
        return Launch(self.kernel, copied, self.grid, self.options)

    def compile(self, launcher: bool = False) -> None:
        """Into Triton's cache, as the launch itself would.

        Args:
            launcher: also the C function that Triton before 3.7 builds to call each kernel with.
        """
        kernel = self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options)
        if launcher:
            nvidia = import_module("triton.backends.nvidia.driver")
            if hasattr(nvidia, "make_launcher"):
                nvidia.CudaLauncher(kernel.src, kernel.metadata)


@contextmanager
def noted(launch: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches of a block, in order.

    Args:
        launch: whether they also happen.
    """
    seen: list[Launch] = []
    plain = KERNEL.run

    def run(kernel, *arguments, grid, warmup, **options):
        seen.append(Launch(kernel, arguments, grid, options))
        return plain(kernel, *arguments, grid=grid, warmup=warmup, **options) if launch else None

    with mock.patch.object(KERNEL, "run", run):
        yield seen


class _Bodies(TorchDispatchMode):
    """Runs the bodies of our ops where torch would run their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "groundkern":
            return OPDEFS[func.name()]._init_fn(*args)
        return func(*args, **(kwargs or {}))


def dry(problem: Problem, mode: problems.Mode = "full") -> list[Launch]:
    """What a call would launch, on meta tensors: nothing is computed."""

    def empty(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    with (
        mock.patch.object(problems, "randn", empty),
        mock.patch.object(harness, "randn", empty),
        mock.patch.object(backends, "choose", return_value="triton"),
        noted(launch=False) as seen,
    ):
        call = problem.make(META)
        run, _ = harness.runner(call, harness.ours(call, "triton"), mode)
        with _Bodies():
            run()
    return seen


class _Driver:
    """What Triton asks of a driver before it compiles, for a GPU that need not be here."""

    def __init__(self, target) -> None:
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int) -> None:
    """From now on this process compiles for a CUDA GPU of that capability (90 for 9.0)."""
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
    """The same for launches that compile to the same code: what Triton's runtime keys them by."""
    kernel = launch.kernel
    _, _, _, _, binder = kernel.device_caches[0]
    _, specialization, options = binder(*launch.arguments, **launch.options)
    return f"{kernel.__name__} {specialization} {sorted(options.items())}"
