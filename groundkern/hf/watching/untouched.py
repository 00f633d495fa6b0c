"""Looking at a run without changing it: random states and buffers are put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Puts the random states of Python, NumPy, torch and a device back after the block.

    Args:
        device: the accelerator in use, or the CPU.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    own = module.get_rng_state(device) if module is not None else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if module is not None:
            module.set_rng_state(own, device)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts the buffers of a model back after the block.

    Args:
        model: may be in training mode.
    """
    kept = [(module, name, x) for module in model.modules() for name, x in module._buffers.items()]
    values = [None if x is None else x.clone() for _, _, x in kept]
    try:
        yield
    finally:
        for (module, name, x), value in zip(kept, values, strict=True):
            if x is not None:
                x.copy_(value)
            module._buffers[name] = x
