"""What checkpointing asks of a model that training does not need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def spare_frozen_parts(model: nn.Module, how: Mapping[str, Any] | None) -> None:
    """Let no gradient flow into frozen parts of a checkpointed model.

    Where checkpointing is switched on, transformers makes the outputs of all embeddings require a
    gradient, of a vision tower's patches too, since reentrant checkpointing needs that. Every layer
    behind them is then recomputed and differentiated, frozen or not. Other checkpointing follows
    the weights that train.

    Args:
        model: whose checkpointing is on, or not.
        how: the keywords of checkpointing; only with `use_reentrant` False is anything changed.
    """
    if (how or {}).get("use_reentrant") is False and hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
