"""Steps of a small Qwen2.5-VL whose decoder layers are attention and little else."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.training_step import model as models
from benchmarks.training_step.model import Rows, Shape
from groundkern.hf import attach, detach

HEADS, KV_HEADS, DIM = 4, 2, 16
LENGTH = 96  # tokens
ROWS = Rows(text=16, side=8, phrases=4, word=0, map=2)
WARM = 3  # rounds that are not counted
CPU = torch.device("cpu")
Step = Callable[[], Tensor]  # seconds [2, layers - 1] of forward and backward


@dataclass
class Clock:
    """When each layer began: forward, and backward in the opposite order."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def note(self, hidden: Tensor) -> None:
        """A layer begins with this input."""
        self.forward.append(time.perf_counter())
        hidden.register_hook(lambda _: self.backward.append(time.perf_counter()))


def _attention_alone(self, hidden, attention_mask=None, position_ids=None, **kwargs) -> Tensor:
    """A decoder layer without RoPE, norms and FFN, which cost the same with supervision."""
    self.clock.note(hidden)
    for name in ("past_key_values", "use_cache", "position_embeddings"):
        kwargs.pop(name, None)
    attention = self.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (f(hidden).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in projections)
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    options = {"dropout": 0.0, "scaling": attention.scaling, "sliding_window": None}
    out, _ = function(
        attention, q, k, v, attention_mask, position_ids=position_ids, **options, **kwargs
    )
    return hidden + out.flatten(2)


def model_of(layers: int, clock: Clock, dtype: torch.dtype) -> nn.Module:
    """So small that torch's operators take hardly longer than their calls."""
    model = models.build(_shape(layers), CPU, dtype)
    for layer in model.model.language_model.layers:
        layer.clock, layer.forward = clock, MethodType(_attention_alone, layer)
    return model


def _shape(layers: int) -> Shape:
    return Shape(HEADS * DIM, layers, HEADS, KV_HEADS, 64, 128, 1, 32)


@contextmanager
def steps(layers: int, terms: dict, dtype: torch.dtype) -> Iterator[dict[str, Step]]:
    """Steps with and without supervision of one model, which is attached within the block."""
    clock = Clock()
    model = attach(model_of(layers, clock, dtype), **terms)
    with mock.patch.object(models, "LEAST", LENGTH):
        batch = models.sample(_shape(layers), LENGTH, ROWS, CPU)
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    try:
        yield {"grounded": _step(model, batch, clock), "plain": _step(model, plain, clock)}
    finally:
        detach(model)


def _step(model: nn.Module, inputs: dict, clock: Clock) -> Step:
    """Returns seconds of forward and of backward between the beginnings of two layers."""

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        clock.forward.clear()
        clock.backward.clear()
        gc.disable()
        try:
            model(**inputs).loss.backward()
        finally:
            gc.enable()
        return torch.tensor([clock.forward, clock.backward], dtype=torch.float64).diff(dim=1)

    return run
