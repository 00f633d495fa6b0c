"""Launches taken down instead of made, so that what is compiled is what would be launched.

    for launch in recorded("mine", lambda: op.forward(*tensors)):   # meta or CUDA tensors
        source, options = launch.source(gpu)
        triton.compile(source, target=gpu, options=options)

Arguments are specialised by triton's own code, as the runtime does: an int that is 1 or divisible
by 16, None, the width of an int, a pointer that is aligned to 16 bytes (a meta tensor's data_ptr is
its offset in the storage) and, on AMD, one into less than 2 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported below

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.launches.noting import Launch, noted
from groundkern import tiles
from groundkern.kept import nothing_kept

# What `groundkern.tiles` is told of the devices of a kind.
KINDS = {
    "large": {"small": lambda _: False, "amd": lambda: False},
    "small": {"small": lambda _: True, "amd": lambda: False},
    "AMD": {"small": lambda _: True, "amd": lambda: True},
}
RESOURCES = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class LabelledLaunch(Launch):
    """One recorded launch.

    label: the call it belongs to. edge: one of `edges`, of which only registers, shared memory and
    spills are read. kind: of device, one of KINDS.
    """

    label: str
    edge: bool = False
    kind: str = "large"

    @property
    def tile(self) -> str:
        """Block sizes, warps, stages and register budget."""
        names = [name for name in self.options if name.startswith("BLOCK") or name in RESOURCES]
        return " ".join(f"{name}={self.options[name]}" for name in names)

    def specialised(self, gpu: GPUTarget) -> tuple[dict, list[tuple], dict]:
        """(arguments by name, (type, specialisation) of each, launch options)."""
        given = dict(self.options)
        given["debug"] = given.get("debug", self.kernel.debug) or triton.knobs.runtime.debug
        given["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
        return _binder(self.kernel, gpu)[1](*self.arguments, **given)

    def key(self, gpu: GPUTarget) -> str:
        """The same for launches that run the same code: what the runtime's cache is keyed by."""
        _, specialisation, options = self.specialised(gpu)
        kernel = f"{self.kernel.__module__}.{self.kernel.__name__}"
        return f"{kernel} {specialisation} {sorted(options.items())}"

    def source(self, gpu: GPUTarget) -> tuple[ASTSource, dict]:
        """(source, options) to compile, and the key of triton's cache on disk with them."""
        bound, specialisation, options = self.specialised(gpu)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            _binder(self.kernel, gpu)[0], dict(options), bound, specialisation, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), parsed.__dict__


@cache
def _binder(kernel: JITFunction, gpu: GPUTarget) -> tuple[BaseBackend, Callable]:
    backend = make_backend(gpu)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def recorded(label: str, run: Callable[[], object], edge: bool = False) -> Iterator[LabelledLaunch]:
    """The launches `run()` would make, on each kind of device."""
    for kind, answers in KINDS.items():
        with mock.patch.multiple(tiles, **answers), nothing_kept(), noted(launch=False) as seen:
            run()
        for x in seen:
            yield LabelledLaunch(x.kernel, x.arguments, x.grid, x.options, label, edge, kind)
