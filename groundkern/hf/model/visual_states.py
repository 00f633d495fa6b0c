"""Visual tokens as they enter the decoder, and what its first layers make of them (BASIC).

Hooks on decoder layers only look: they hold a reference to the first layer's input and add what
the next ones are given to a running sum without a gradient. They are gone when the body returns, so
a layer that checkpointing recomputes does nothing else than in the first place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from groundkern.checks import fail, require
from groundkern.hf.model.basic import basic_depth, refuse_frozen
from groundkern.hf.model.layers import text_decoder
from groundkern.hf.model.request import Request
from groundkern.hf.model.rows import take_rows
from groundkern.token_losses import teacher_weights

REENTRANT = "use_reentrant=False: reentrant checkpointing drops the gradient of visual tokens"


class VisualStates:
    """The student and the teacher of BASIC in one run of the body.

    What layer n is given is the output of the layers below with all that the decoder adds between
    them, such as Qwen3-VL's deepstack features. That stands for "hidden states after layer n - 1".

    Args:
        layers: of the decoder, more than `depth`.
        position: [B, C] visual tokens, padded with -1.
        depth: k of (B1).
    """

    def __init__(self, layers: nn.ModuleList, position: Tensor, depth: int) -> None:
        self.layers, self.position = layers, position
        self.weights = teacher_weights(depth)
        self._entered: Tensor | None = None  # [B, T, D], what the first layer is given
        self._sum: Tensor | None = None  # fp32 [B, C, D]
        self._seen = 0

    @classmethod
    def of(cls, request: Request) -> VisualStates:
        """Those of the visual tokens of a batch."""
        model, how = request.model, request.terms.basic
        if model.training and torch.is_grad_enabled():
            refuse_frozen(model, how)
        depth = basic_depth(model, how)
        return cls(text_decoder(model).layers, request.batch.map_columns, depth)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the decoder runs once.

        Raises:
            ValueError: layers that are given something else than hidden states [B, T, D], not in
                their order, or under reentrant checkpointing.
        """
        graph = torch.is_grad_enabled()
        calls = [partial(self._enter, graph), *(partial(self._add, w) for w in self.weights)]
        layers = list(self.layers)[: len(calls)]
        hooks = [
            layer.register_forward_pre_hook(partial(self._called, number, call), with_kwargs=True)
            for number, (layer, call) in enumerate(zip(layers, calls, strict=True))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        wanted = f"a decoder that calls its first {len(calls)} layers"
        require(self._seen == len(calls), "basic", wanted, f"calls of {self._seen}")

    @property
    def student(self) -> Tensor:
        """[B, C, D]: the visual tokens as the first layer is given them; padding is a copy."""
        return take_rows(self._entered, self.position)

    @property
    def teacher(self) -> Tensor:
        """fp32 [B, C, D]: the weighted mean of what they became (B1), without a gradient."""
        return self._sum

    def _called(self, number: int, call, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            fail("basic", "decoder layers that are given hidden states [B, T, D]", got)
        wanted = f"a decoder that calls its layers once, in order: layer {self._seen}"
        require(number == self._seen, "basic", wanted, f"layer {number}")
        self._seen += 1
        call(hidden)

    def _enter(self, graph: bool, hidden: Tensor) -> None:
        if graph and not torch.is_grad_enabled():
            fail("gradient_checkpointing_kwargs", REENTRANT, "use_reentrant=True")
        self._entered = hidden

    def _add(self, weight: float, hidden: Tensor) -> None:
        with torch.no_grad():
            rows = take_rows(hidden, self.position)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            rows = rows * weight
            self._sum = rows if self._sum is None else self._sum.add_(rows)
