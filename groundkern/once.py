"""Gradients that are made by hand, and of which there is no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from groundkern import checks


def once(name: str, found: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Any]:
    """What the backward of a `torch.autograd.Function` returns, made without a graph.

    Differentiated again, it raises. `once_differentiable` does so only if the upstream gradient
    requires grad: of a sum of rows it does not, and a gradient penalty would get lost.

    Args:
        name: of the function, for the error.
        found: its gradients.
        inputs: the saved inputs, which the gradients depend on.

    Returns:
        `found`, behind a guard where autograd is recording.
    """
    if not torch.is_grad_enabled():
        return list(found)
    seen = [x for x in inputs if x is not None and x.requires_grad]
    return [None if d is None else _Once.apply(name, d, *seen) for d in found]


class _Once(Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        wanted = "one derivative: its backward is not differentiable"
        checks.fail(ctx.name, wanted, "a second one", RuntimeError)
