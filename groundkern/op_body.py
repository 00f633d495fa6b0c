"""How named groups of arguments pass through an opaque op, whose own arguments are flat.

An op's schema, its body and its fake are written in terms of the NamedTuples of its folder:

    @custom_op("groundkern::name", mutates_args=(), schema=f"({schema(Inputs, Options)}) -> Tensor")
    @op_body(Inputs, Options)
    def name(inputs, options): ...
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import get_type_hints

import torch
from torch import Tensor

NOTHING = nullcontext()
TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}


def schema(*groups: type[tuple]) -> str:
    """The fields of NamedTuples as the arguments of an op's schema, in order."""
    hints = [hint for group in groups for hint in get_type_hints(group).items()]
    return ", ".join(f"{TYPES[kind]} {name}" for name, kind in hints)


def regroup(flat: Sequence[object], *groups: type[tuple]) -> list[object]:
    """Flat arguments as one NamedTuple per group, and whatever follows them as it is."""
    rest = list(flat)
    made = []
    for group in groups:
        size = len(group._fields)
        made.append(group(*rest[:size]))
        rest = rest[size:]
    return made + rest


def grouped(*groups: type[tuple]) -> Callable[[Callable], Callable]:
    """Decorates a function of NamedTuples, which is then called with their fields."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*flat):
            return function(*regroup(flat, *groups))

        return call

    return decorate


def op_body(*groups: type[tuple]) -> Callable[[Callable], Callable]:
    """`grouped`, for an op's body, which runs in `in_body` its tensors' device.

    Triton launches on the current device, and a custom op sets none: with a model spread over GPUs
    (`device_map="auto"`) the current one is often another than the tensors'. And the operands come
    in the dtypes that the call is to be computed in.
    """

    def decorate(body: Callable) -> Callable:
        @wraps(body)
        def run(*flat):
            with in_body(flat[0].device):  # the first argument of every op is a tensor
                return body(*regroup(flat, *groups))

        return run

    return decorate


def in_body(device: torch.device) -> AbstractContextManager:
    """What an op's body runs in: on its tensors' device and without autocast."""
    kind = device.type
    # Making autocast's own context takes longer than asking for it; there is none for meta.
    casts = _any_autocast() and _has_autocast(kind) and torch.is_autocast_enabled(kind)
    here = torch.cuda.device(device) if kind == "cuda" else NOTHING
    return _without_autocast(here, kind) if casts else here


_has_autocast = cache(torch.amp.is_autocast_available)
_any_autocast = torch._C._is_any_autocast_enabled


@contextmanager
def _without_autocast(here: AbstractContextManager, kind: str) -> Iterator[None]:
    with here, torch.autocast(kind, enabled=False):
        yield


def empty_like(x: Tensor) -> Tensor:
    """Contiguous, whatever the strides of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def zeros_like(x: Tensor) -> Tensor:
    """Contiguous, whatever the strides of x."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)
