"""How many kernels torch starts for an operator, read from a profile of it on CPU tensors."""

from collections import Counter

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Allocations, and the one view whose schema does not say that it is one.
NO_KERNEL = {
    *("empty", "empty_like", "empty_permuted", "empty_strided"),
    *("new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"),
}


def torch_kernels(operators: list[tuple]) -> Counter[str]:
    """How many kernels of each name the operators start.

    One each; none for views and allocations; and if torch has no kernel but calls other operators
    (logsumexp), as many as those start. Sorting and adding at an index start several that no
    operator names: they count once.
    """
    found: Counter[str] = Counter()
    composed = []
    for function, args, kwargs in operators:
        if _has_kernel(function.overloadpacket):
            found.update(_own(function.overloadpacket))
        else:
            composed.append((function, args, kwargs))
    if not composed:
        return found
    calls = pytree.tree_map_only((Tensor, torch.device), _real, composed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for function, args, kwargs in calls:
            function(*args, **kwargs)
    for event in profile.events():
        if event.cpu_parent is None:
            found.update(_under(event))
    return found


def _real(x: Tensor | torch.device) -> Tensor | torch.device:
    """A CPU tensor with the shape, strides and dtype of a meta tensor; its zeros are valid
    indices."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_()


def _under(event) -> list[str]:
    """The kernels that an operator in a profile starts."""
    namespace, _, name = event.name.partition("::")
    packet = getattr(torch.ops.aten, name) if namespace == "aten" else None
    if packet and _has_kernel(packet):
        return _own(packet)
    below = [kernel for child in event.cpu_children for kernel in _under(child)]
    return below or (_own(packet) if packet else [])  # copy_ is one of those that call no other


def _overloads(packet) -> list:
    registered = torch._C._dispatch_has_kernel
    found = (getattr(packet, name) for name in packet.overloads())
    return [overload for overload in found if registered(overload.name())]


def _has_kernel(packet) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(overload.name(), "CPU") for overload in _overloads(packet))


def _own(packet) -> list[str]:
    name = packet.__name__
    views = any(overload.is_view for overload in _overloads(packet))
    return [] if views or name in NO_KERNEL else [name]
