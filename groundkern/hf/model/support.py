"""Which models the wiring supports, and the error for one that it does not."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from groundkern.checks import fail
from groundkern.hf.model.gradcam import refuse_fused
from groundkern.hf.objectives import Objectives

ATTENTION_LAYERS = ("full_attention", "sliding_attention")
# Frequencies that depend on the length of the batch, which side tokens increase.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without PEFT or `torch.compile` around it.

    Args:
        model: a transformers model, bare, inside PEFT or compiled.

    Returns:
        The model that is wrapped, or `model`.

    Raises:
        TypeError: anything else (a model wrapped for distribution: attach first, wrap afterwards).
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        wanted = "a transformers model, bare or inside PEFT (attach before DDP or FSDP)"
        fail("model", wanted, type(model).__name__, TypeError)
    return model


def text_attention(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of the text decoder in layer order, without the vision tower's."""
    found = [
        module
        for module in model.get_decoder().modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling")
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def refuse_unsupported(model: PreTrainedModel, objectives: Objectives) -> None:
    """Raise for an architecture whose attention the ops do not compute.

    Args:
        model: a transformers model without wrappers.
        objectives: what is to be trained.

    Raises:
        ValueError: no output head, cross-attention, text that attends both ways, layers that are
            not softmax attention, attention sinks, length-dependent RoPE with SMAM, a layer of an
            objective that does not exist, GradCAM with attention other than eager.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    modules = text_attention(model)
    if model.get_output_embeddings() is None:
        fail("model", "a model with an output head", f"{name}, which has none")
    if model.config.is_encoder_decoder or getattr(config, "cross_attention_layers", None):
        fail("model", "a decoder without cross-attention", name)
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if both_ways not in (None, False, "vision"):
        fail("model", "causal attention between text tokens", f"{name}, which attends both ways")
    mixers = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_LAYERS))
    if mixers or len(modules) != config.num_hidden_layers:
        got = f"{name} with {', '.join(mixers) or f'{len(modules)} attention modules'}"
        wanted = f"softmax attention in each of the {config.num_hidden_layers} layers"
        fail("model", wanted, got)
    if any(getattr(module, "sinks", None) is not None for module in modules):
        fail("model", "attention without sinks", name)
    rope = getattr(config, "rope_parameters", None) or {}
    if objectives.smam is not None and rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        fail("smam", "RoPE that does not depend on the length", rope["rope_type"])
    for term, layers in objectives.layers().items():
        if not 0 <= layers[0] <= layers[-1] < len(modules):
            fail(f"{term}.layers", f"layers in [0, {len(modules)})", layers)
    if objectives.gradcam:
        for module in modules:
            refuse_fused(module.config._attn_implementation)
