"""KLAL's learnable head weights: one parameter [layers, heads] on the attached model.

It is saved with the model's own weights under its name and taken off by `detach`, so that nothing
is left at inference.
"""

from __future__ import annotations

import torch
from torch import nn

from groundkern.hf.objectives import Klal

HEAD_WEIGHT = "groundkern_head_weight"


def set_head_weight(model: nn.Module, klal: Klal | None) -> None:
    """Add the parameter (zeros: all heads alike) where `klal` learns it, remove it elsewhere.

    One that is there already is kept, so that attaching again goes on where training was.
    """
    learned = klal is not None and klal.head_weight == "learned"
    if not learned:
        model._parameters.pop(HEAD_WEIGHT, None)
    elif HEAD_WEIGHT not in model._parameters:
        config = model.config.get_text_config()
        shape = config.num_hidden_layers, config.num_attention_heads
        logits = torch.zeros(shape, device=next(model.parameters()).device)
        model.register_parameter(HEAD_WEIGHT, nn.Parameter(logits))
