"""What accelerate's FSDP2 is told of a model, unless its settings say otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from groundkern.hf.model.layers import text_decoder
from groundkern.hf.model.support import base_model


def fit_fsdp(plugin: Any, model: nn.Module) -> None:
    """Let FSDP2 gather the weights of a decoder layer or a vision block at a time, and keep fp32.

    accelerate would have every module return bf16 under bf16, the losses too.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, before it shards.
        model: attached, not sharded yet.
    """
    if plugin.fsdp_version != 2:
        return
    if plugin.transformer_cls_names_to_wrap is None:
        known = set(getattr(model, "_no_split_modules", None) or ())
        there = {type(module).__name__ for module in model.modules()}
        layers = getattr(text_decoder(base_model(model)), "layers", ())
        layers = {type(layer).__name__ for layer in layers}
        plugin.transformer_cls_names_to_wrap = sorted(layers | known & there)
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
