"""Notes Triton launches as they happen, or in their place; the launch counts, the ahead-of-time
compiler and the GPU suite build on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from unittest import mock

from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch with its arguments."""

    kernel: object
    arguments: tuple
    grid: object
    options: dict

    @property
    def name(self) -> str:
        """The kernel's name, as it is printed."""
        return self.kernel.__name__.strip("_")

    def again(self) -> None:
        self.kernel[self.grid](*self.arguments, **self.options)

    def aside(self, least: int = 2**20) -> Launch:
        """The same launch on copies of its large tensors, so that a second run finds none in the
        cache."""

        def copied(x: object) -> object:
            if isinstance(x, tuple):  # a NamedTuple, or strides
                return type(x)(*map(copied, x)) if hasattr(x, "_fields") else tuple(map(copied, x))
            large = isinstance(x, Tensor) and x.numel() * x.element_size() >= least
            return x.clone() if large else x

        return replace(self, arguments=copied(self.arguments))

    def compile(self, launcher: bool = False) -> None:
        """Compiles it into Triton's cache, as the launch itself would.

        Args:
            launcher: also build the C function that Triton before 3.7 calls each kernel with.
        """
        kernel = self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options)
        if launcher:
            nvidia = import_module("triton.backends.nvidia.driver")
            if hasattr(nvidia, "make_launcher"):
                nvidia.CudaLauncher(kernel.src, kernel.metadata)


def kernel_class() -> type:
    """Triton's JITFunction, or its interpreted stand-in."""
    from groundkern.tile_kernels import _sum_kernel  # imports triton, which reads TRITON_INTERPRET

    return type(_sum_kernel)


@contextmanager
def noted(launch: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches of a block, in order.

    Args:
        launch: whether they also happen.
    """
    from groundkern.tiles import Launcher

    kernels = kernel_class()
    seen: list[Launch] = []
    plain = kernels.run

    def run(kernel, *arguments, grid, warmup, **options):
        seen.append(Launch(kernel, arguments, grid, options))
        return plain(kernel, *arguments, grid=grid, warmup=warmup, **options) if launch else None

    def launched(self, kernel, grid, arguments, constants):
        kernel[grid](*arguments, **constants)

    with mock.patch.object(kernels, "run", run), mock.patch.object(Launcher, "__call__", launched):
        yield seen
