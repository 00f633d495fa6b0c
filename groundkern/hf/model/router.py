"""The auxiliary loss of a mixture of experts, as the model's own forward adds it to its loss.

The forward itself runs once more around stand-ins (`own_forward`), on the router logits of the main
tokens, with 0 as its text loss: what it returns is its coefficient times its auxiliary loss. So
expert counts, coefficients and padding are those of the model, and a forward that adds nothing
adds nothing here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import fail
from groundkern.hf.model.own_forward import run_own
from groundkern.hf.model.request import Request

ROUTER = "router_aux"  # the part's name
FOR_THE_TAIL = ("input_ids", "attention_mask", "output_router_logits")


def router_loss(request: Request, output: Any, hidden: Tensor) -> Tensor | None:
    """What a model's own forward adds to its text loss for its routers.

    Args:
        request: what was asked for.
        output: of the body, with `router_logits` if they are on (`output_router_logits`, an input
            or a setting of the config).
        hidden: [B, T, D] its last hidden states; side tokens come after the S main ones.

    Returns:
        A scalar, the coefficient included; None: router logits are off.

    Raises:
        ValueError: a forward that cannot be run so; routers without a graph (reentrant
            checkpointing); router logits that are not per token.
    """
    logits = getattr(output, "router_logits", None)
    if not isinstance(logits, tuple):  # Granite-Docling's is one of images, and no experts'
        return None
    _refuse_lost_graph(request, logits, hidden)
    own = copy.copy(output)
    own["router_logits"] = tuple(_main(x, request.input_ids, hidden.shape[1]) for x in logits)
    inputs = {name: request.inputs[name] for name in FOR_THE_TAIL if name in request.inputs}
    if request.documents is not None:
        ids, trained = request.input_ids, request.batch.text_position
        inputs["attention_mask"] = (~request.documents.padding(ids, trained)).long()
    calls: list[Tensor] = []

    def nothing(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(torch.zeros((), device=hidden.device))
        return calls[0]

    found = run_own(
        request.model,
        {**inputs, "labels": request.input_ids, "use_cache": False, "return_dict": True},
        body=lambda *_, **__: own,
        head=lambda x: x[..., :1],
        loss=nothing,
    )
    if len(calls) != 1:
        wanted = "output_router_logits off, or a forward that calls its loss function once"
        fail("model", wanted, type(request.model).__name__)
    return found.loss


def _main(logits: Tensor, input_ids: Tensor, total: int) -> Tensor:
    """The router logits [B * T, E] or [B, T, E] of the first S tokens."""
    batch, length = input_ids.shape
    if length == total:
        return logits
    if logits.shape[:2] == (batch, total):
        return logits[:, :length]
    if logits.shape[0] != batch * total:
        wanted = f"one row for each of {batch} x {total} tokens"
        fail("router_logits", wanted, list(logits.shape))
    return logits.unflatten(0, (batch, total))[:, :length].flatten(0, 1)


def _refuse_lost_graph(request: Request, logits: tuple[Tensor, ...], hidden: Tensor) -> None:
    """Reentrant checkpointing records router logits without a graph: they would train nothing."""
    lost = hidden.requires_grad and not any(x.requires_grad for x in logits)
    if lost and any(
        getattr(module, "gradient_checkpointing", False) for module in request.model.modules()
    ):
        wanted = "use_reentrant=False: reentrant checkpointing drops the gradient of the routers"
        fail("gradient_checkpointing_kwargs", wanted, "use_reentrant=True")
