"""Records what a call would launch on a GPU, on tensors without storage.

The public functions run on meta tensors that claim to be on a GPU, so that they take every branch
that a GPU would take. Triton launches are noted and not made; torch's operators are recorded on
their way to the device. Whatever would make the host wait for a value raises here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches.kernels import NO_KERNEL
from benchmarks.launches.noting import Launch, noted

GPU = torch.device("cuda", 0)
# An H100's or H200's: it decides how many splits there are, and not how many launches.
PROCESSORS = 132
DEVICE_GUARD = ("current_device", "_exchange_device", "_maybe_exchange_device")
FACTORIES = (
    *("arange", "empty", "empty_permuted", "empty_strided", "full", "ones", "scalar_tensor"),
    *("tensor", "zeros"),
)
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}


def body_of(name: str) -> Callable:
    """The body of one of our ops."""
    return OPDEFS[name]._init_fn


class Bodies(TorchDispatchMode):
    """Runs the bodies of our ops; on meta tensors torch would run their fakes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "groundkern":
            with self:
                return body_of(func._schema.name)(*args, **kwargs)
        return self.operator(func, args, kwargs)

    def operator(self, func, args: tuple, kwargs: dict):
        return func(*args, **kwargs)


class Recorder(Bodies):
    """Triton launches, the names of GEMMs, and torch's other operators with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.triton: list[Launch] = []
        self.gemms: list[str] = []
        self.operators: list[tuple] = []

    def operator(self, func, args: tuple, kwargs: dict):
        name = func._schema.name.split("::")[1]
        with self:  # operators that are written as calls of others
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if name in GEMMS:
            self.gemms.append(name)
            if "out" in kwargs:  # not every overload has a meta kernel
                return kwargs["out"]
        elif not func.is_view and name not in NO_KERNEL:
            self.operators.append((func, args, kwargs))
        return func(*args, **kwargs)


def _made_on_meta(make: Callable) -> Callable:
    """The function with the meta device in place of a GPU among its arguments."""

    @wraps(make)
    def run(*args, **kwargs):
        return make(
            *pytree.tree_map_only(torch.device, _meta, args),
            **{name: _meta(x) if isinstance(x, torch.device) else x for name, x in kwargs.items()},
        )

    return run


def _meta(device: torch.device) -> torch.device:
    return torch.device("meta") if device.type == GPU.type else device


@contextmanager
def recording() -> Iterator[Recorder]:
    """Makes meta tensors claim to be on a GPU, makes on meta what would be made there, and records
    what the GPU is asked to do."""
    recorder = Recorder()
    found = SimpleNamespace(multi_processor_count=PROCESSORS, major=9, minor=0)

    patches = [
        (Tensor, "device", property(lambda _: GPU)),
        (Tensor, "is_cuda", property(lambda _: True)),
        (torch.cuda, "get_device_properties", lambda _: found),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0)),
        *((torch.cuda, name, lambda *_: GPU.index) for name in DEVICE_GUARD),
        *((torch, name, _made_on_meta(getattr(torch, name))) for name in FACTORIES),
        (Tensor, "to", _made_on_meta(Tensor.to)),
    ]
    with ExitStack() as stack:
        recorder.triton = stack.enter_context(noted(launch=False))
        for owner, name, stand_in in patches:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(recorder)
        yield recorder
