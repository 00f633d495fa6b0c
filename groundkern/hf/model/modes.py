"""Training and evaluation modes of modules, which a look at a model leaves as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts the mode of every module back after the block.

    Args:
        model: whose modules may be in different modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode within the block, but for layers whose running statistics would move.

    Args:
        model: whose modules may be in different modes.
    """
    with modes_kept(model):
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        yield
