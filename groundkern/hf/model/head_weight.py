"""KLAL's learnable head weights: one parameter [layers, heads] on the attached model.

It is saved with the model's own weights under its name, which `from_pretrained` passes over, or
beside an adapter (`groundkern.hf.watching.saved`), and `detach` removes it, so that nothing is left
at inference.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from groundkern.hf.model.layers import text_attention
from groundkern.hf.model.support import base_model
from groundkern.hf.objectives import Klal

HEAD_WEIGHT = "groundkern_head_weight"


def set_head_weight(model: nn.Module, klal: Klal | None) -> None:
    """Add the parameter (zeros: all heads alike) if `klal` learns it, remove it otherwise.

    A parameter that is there already stays, so that attaching again goes on where training was.
    """
    learned = klal is not None and klal.head_weight == "learned"
    if not learned:
        model._parameters.pop(HEAD_WEIGHT, None)
    elif HEAD_WEIGHT not in model._parameters:
        config = model.config.get_text_config()
        shape = config.num_hidden_layers, config.num_attention_heads
        logits = torch.zeros(shape, device=next(model.parameters()).device)
        model.register_parameter(HEAD_WEIGHT, nn.Parameter(logits))


def train_head_weight(model: nn.Module) -> None:
    """Let the parameter train where it is: PEFT freezes it in a model that was attached before."""
    weight = getattr(base_model(model), HEAD_WEIGHT, None)
    if weight is not None:
        weight.requires_grad_(True)


def head_weight_of(model: nn.Module, klal: Klal) -> Tensor | None:
    """[L, H]: the softmax of the learned logits over what a map sums over; None: not learned.

    What does not count is 0, in layers that count.
    """
    if klal.head_weight != "learned":
        return None
    logits = getattr(model, HEAD_WEIGHT).float()
    chosen = klal.heads_by_layer
    if not klal.average_layers and chosen is None:
        return logits.softmax(-1)
    counted = torch.zeros(logits.shape, dtype=torch.bool)
    if chosen is None:
        counted[list(klal.layers or text_attention(model))] = True
    else:
        counted[tuple(zip(*klal.chosen_heads, strict=True))] = True
    if not klal.average_layers:
        counted |= ~counted.any(1, keepdim=True)  # nothing to weight is NaN, and so its gradient
    logits = logits.masked_fill(~counted.to(logits.device), -torch.inf)
    if not klal.average_layers:
        return logits.softmax(-1)
    return logits.flatten().softmax(0).view_as(logits)


def saved_head_weight(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The parameter in a folder that `save_pretrained` wrote, by its name; empty without one."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if HEAD_WEIGHT in file.keys():  # noqa: SIM118 (not a mapping)
                return {HEAD_WEIGHT: file.get_tensor(HEAD_WEIGHT)}
    return {}
