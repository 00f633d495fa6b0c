"""The highest number of bytes that torch's CPU allocator was asked for in a training step.

Weights and optimizer states count as their tensors; what the step allocates, its inputs too, as
torch's profiler notes it. Unlike the resident set this has no rounding to pages and no leftovers.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import nn
from torch._C._profiler import _EventType

from benchmarks.longest.setting import EAGER, MAPS, OURS, SDPA, Setting
from benchmarks.training_step.losses import EAGER as WITH_MAPS
from benchmarks.training_step.losses import eager_attention, losses
from benchmarks.training_step.model import LEAST, adapted, build, sample
from groundkern import buffers
from groundkern.hf import DvSft, Klal, Smam, attach
from groundkern.hf.model.checkpointing import spare_frozen_parts

CPU = torch.device("cpu")
LOSSES = {OURS: "groundkern, all", MAPS: WITH_MAPS, EAGER: "stock SFT", SDPA: "stock SFT"}
CHECKPOINTING = {"use_reentrant": False}
ROOM = 3 * 2**30  # bytes of address space for python and torch themselves


def made(setting: Setting) -> nn.Module:
    """The attached model.

    Args:
        setting: the step; fp32.

    Raises:
        ValueError: a setting that is not measured here.
    """
    if setting.precision != "float32" or setting.offload or setting.tiled or setting.triton:
        raise ValueError(f"`setting`: expected fp32, all on the CPU, got {setting}")
    model = build(setting.shape, CPU, torch.float32)
    model.model.visual.requires_grad_(setting.vision)
    if setting.checkpointed:
        model.gradient_checkpointing_enable(CHECKPOINTING)
        spare_frozen_parts(model, CHECKPOINTING)
    attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal())
    return model if setting.lora is None else adapted(model, setting.lora)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting) -> float:
    """One step on one sample, which is made in it; returns the loss.

    Args:
        model: of `made`.
        optimizer: of its parameters.
        setting: the step.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = sample(setting.shape, setting.tokens, setting.rows, CPU)
    loss_of = losses(model, batch)[LOSSES[setting.method]]
    eager = eager_attention(base) if setting.method in (EAGER, MAPS) else contextlib.nullcontext()
    with eager:
        loss = loss_of()
        loss.backward()  # inside, because checkpointing runs layers again
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def rise(run: Callable[[], object]) -> int:
    """How far the bytes that torch's CPU allocator holds rise during a call.

    Args:
        run: the call.
    """
    gc.collect()  # what is freed in the call would count as negative
    buffers.release()
    detailed = torch._C._profiler._ExperimentalConfig(verbose=True)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    # memory that is pooled beside torch's allocator would not be seen
    with (
        mock.patch.object(buffers, "SMALLEST", sys.maxsize),
        torch.profiler.profile(
            activities=cpu, profile_memory=True, experimental_config=detailed
        ) as profile,
    ):
        run()
    found: list[tuple[int, int]] = []
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.typed[0] == _EventType.Allocation:
            found.append((node.start_time_ns, node.typed[1].alloc_size))
    held = highest = 0
    for _, size in sorted(found, key=lambda event: event[0]):
        held += size
        highest = max(highest, held)
    return highest


def peak(setting: Setting) -> int:
    """Bytes at the highest moment of a step: weights, optimizer states, and the rise in it.

    Args:
        setting: the step.
    """
    model = made(setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    # makes the states, and sets up what is set up once
    step(model, optimizer, replace(setting, tokens=LEAST))
    highest = rise(lambda: step(model, optimizer, setting))
    kept = [x for state in optimizer.state.values() for x in state.values()]
    whole = [*model.parameters(), *kept]
    return highest + sum(x.numel() * x.element_size() for x in whole)


def bounded(setting: Setting, limit: int) -> int | None:
    """`peak`; None: the step needs more memory than it may have.

    Args:
        setting: the step.
        limit: bytes that it may have.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit + ROOM, before[1]))
    try:
        return peak(setting)
    except RuntimeError as error:  # torch's CPU allocator has no error of its own
        if "not enough memory" not in str(error):
            raise
        return None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
