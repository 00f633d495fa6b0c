"""Modules that are called by themselves, beside the model's forward, where weights are sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of a model's weights: FSDP or ZeRO-3.

    Args:
        model: any.
    """
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """A module with whole weights, as what calls it; every rank comes here alike.

    FSDP2's own hooks are left out: a gradient of the module alone, taken while the model's forward
    runs, would end FSDP's pass there and shard all weights again. ZeRO-3's hooks gather what is
    called.

    Args:
        model: that is sharded, or not.
        module: of the model.
    """
    call = module.forward if isinstance(module, FSDPModule) else module
    owner = None
    if any(isinstance(p, DTensor) for p in module.parameters()):
        owner = _owner(model, module)
    if owner is None:
        yield call
        return
    owner.unshard()
    try:
        yield call
    finally:
        owner.reshard()


def _owner(model: nn.Module, module: nn.Module) -> FSDPModule | None:
    """The module with which FSDP2 gathers another one's weights; None: no module of the model."""
    found = None
    own = next(name for name, each in model.named_modules() if each is module)
    for name, each in model.named_modules():  # those above a module come before it
        if isinstance(each, FSDPModule) and f"{own}.".startswith(f"{name}." if name else ""):
            found = each
    return found
