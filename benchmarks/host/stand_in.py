"""The Triton path on CPU tensors, with nothing launched: what the host does for a GPU, and no more.

Every call goes the way a call on a GPU goes: the checks that look at no values, the op, the Triton
launchers and, for a kernel's first launch, Triton's own `JITFunction.run`, which specialises the
arguments and looks up the compiled kernel. Only two things are left out: the compiled kernel
itself, and the C function that hands its arguments to the driver. torch's own operators run, on
tensors of a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from triton.compiler import CompiledKernel

from benchmarks.gpu.devices.dry_runs import compile_for
from benchmarks.launches.noting import kernel_class
from benchmarks.launches.recording import PROCESSORS
from groundkern import backends, checks, tiles

HOPPER = 90


class _Nothing(CompiledKernel):
    """A compiled kernel that does nothing; what Triton does in Python before is done."""

    def __init__(self) -> None:
        self.function = self.packed_metadata = None

    def _init_handles(self) -> None:
        """Nothing to load."""

    def launch_metadata(self, *_) -> None:
        """None, as without hooks."""

    def run(self, *_) -> None:
        """In place of the C function."""


def _compiled(kernel, key, signature, device, *_) -> _Nothing:
    """A kernel that does nothing, remembered as Triton remembers compiled ones."""
    found = _Nothing()
    kernel.device_caches[device][0][key] = found
    return found


@contextmanager
def stand_in() -> Iterator[None]:
    """Within the block `backend="triton"` serves CPU tensors and launches nothing."""
    compile_for(HOPPER)
    with ExitStack() as stack:
        for owner, name, made in (
            (kernel_class(), "_do_compile", _compiled),
            (tiles, "unsupported", lambda *_: None),
            (tiles, "processors", lambda _: PROCESSORS),
            (checks, "values_visible", lambda *_: False),
            (backends, "_PREFERRED", {"cpu": "triton"}),
        ):
            stack.enter_context(mock.patch.object(owner, name, made))
        yield
