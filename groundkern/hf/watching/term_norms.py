"""The norm of each term's own gradient, of a step that training is about to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groundkern.hf.model.attach import objectives_of
from groundkern.hf.model.router import ROUTER
from groundkern.hf.model.terms import part_rules
from groundkern.hf.watching.untouched import buffers_kept, random_states_kept

PREFIX = "grad_norm_"


def term_norms(
    model: nn.Module, batches: Sequence[dict], *, gather: Callable | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """Norms of the gradients of `weight * part`, each over a whole accumulated batch.

    One forward and one backward for each part and micro-batch, with the random states that the
    step itself will meet; gradients, buffers and random states stay as they are. One gradient of
    the trained weights is in memory at a time.

    Args:
        model: attached, in training mode; not sharded over ranks.
        batches: the micro-batches on the device, with the `gk_totals` of the step.
        gather: sums the ranks' shares of a gradient, with several ranks.
        scale: the loss is multiplied by it and the norm divided (fp16).

    Returns:
        fp32 scalars by `grad_norm_` and the part's name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    norms = {}
    known: set[str] = set()  # parts of the loss that the model has
    with buffers_kept(model):
        for part in part_rules(objectives_of(model), routers=True):
            if part == ROUTER and ROUTER not in known:
                continue
            with random_states_kept(device):
                total = _gradient(model, batches, part, parameters, scale, known)
            if gather is not None:
                total = [gather(gradient) for gradient in total]
            norm = torch.nn.utils.get_total_norm(total) / scale
            norms[f"{PREFIX}{part}"] = norm
    return norms


def _gradient(
    model: nn.Module,
    batches: Sequence[dict],
    part: str,
    parameters: list[nn.Parameter],
    scale: float,
    known: set[str],
) -> list[Tensor]:
    """fp32 gradient of one part, summed over the micro-batches, by parameter; `known` learns which
    parts there are."""
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for batch in batches:
        output = model(**batch, gk_part=part)
        known.update(output.parts)
        loss = output.loss
        if not loss.requires_grad:
            continue
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        for own, gradient in zip(total, found, strict=True):
            if gradient is not None:
                own += gradient
    return total


def summed_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks.

    Args:
        x: any shape; overwritten.
    """
    dist.all_reduce(x)
    return x
