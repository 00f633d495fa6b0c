"""Which objectives the wiring supports on a model, and the error for one that it does not.

The text loss, DV-SFT and the logit lens read last hidden states: they fit every causal decoder.
What reads attention maps needs the layers that it reads to be softmax attention. SMAM needs every
layer to say what a side token sees.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from inspect import signature

from torch import nn
from transformers import PreTrainedModel, masking_utils

from groundkern.checks import fail
from groundkern.hf.data.geometry import NO_PLACE
from groundkern.hf.model.basic import refuse_basic
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.layers import (
    NO_MODULES,
    OLDER_NAMES,
    PER_TOKEN,
    WINDOWED,
    forward_source,
    text_attention,
    text_decoder,
    text_layers,
)
from groundkern.hf.model.positions import takes_text_first
from groundkern.hf.model.prefix import is_prefix_lm
from groundkern.hf.objectives import (
    AttentionPolicy,
    Basic,
    Distillation,
    DvSft,
    Hist,
    Klal,
    LogitLens,
    Margins,
    Objectives,
    PatchText,
    Smam,
)

# Frequencies that depend on the length of the batch, which side tokens increase.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
DEFAULTS = Objectives(
    Smam(),
    DvSft(),
    Klal(),
    Hist(),
    Margins(),
    LogitLens(),
    Basic(),
    PatchText(),
    policy=AttentionPolicy(),
    distill=Distillation(),
)
# What a decoder's forward hands to transformers' makers of masks.
_MASKS = re.compile(r"(?:mask_kwargs = \{|create_\w*mask\w*\()(.*?)\n\s*[})]", re.DOTALL)
NAMES = tuple(field.name for field in fields(Objectives) if field.name != "backend")
# What forwards call that let the tokens of an image see one another
_IMAGE_BLOCKS = ("block_sequence_ids", "token_type_ids_mask_function", "create_causal_mask_mapping")
FAILED = "_groundkern_failed"  # in the __dict__ of a model: reasons by objective, from `doctor`


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


def supported_objectives(model: nn.Module) -> dict[str, str | None]:
    """Which objectives a model can be trained with, by its architecture.

    `doctor` measures on a batch what this reads off the model.

    Args:
        model: a transformers model, bare or inside PEFT; it need not be attached.

    Returns:
        For "text" and each objective of `attach`: None, or the sentence with which `attach` refuses
        its defaults.

    Raises:
        TypeError: not a transformers model.
    """
    base = base_model(model)
    found = {"text": _reason(_refuse_model, base)}
    for name in NAMES:
        how = getattr(DEFAULTS, name)
        found[name] = found["text"] or _reason(_refuse_objective, base, name, how)
    return found


def packing_refusal(model: nn.Module) -> str | None:
    """Whether a model can be given packed rows, by its architecture.

    Args:
        model: a transformers model, bare or inside PEFT; it need not be attached.

    Returns:
        None, or the sentence with which rows of several documents are refused.

    Raises:
        TypeError: not a transformers model.
    """
    base = base_model(model)
    return _reason(_refuse_model, base) or _reason(_refuse_packing, base)


def refuse_packing(model: PreTrainedModel, documents: Documents) -> None:
    """Raise for several documents in a row of a model that cannot keep them apart.

    Args:
        model: the attached model, without wrappers.
        documents: of a batch.

    Raises:
        ValueError: layers that carry something over from one document to the next.
    """
    reason = _reason(_refuse_packing, model)
    if reason is not None and documents.several:
        raise ValueError(reason)


def refuse_context(model: PreTrainedModel) -> None:
    """Raise for a model whose sequences cannot be split over ranks.

    Args:
        model: the attached model, without wrappers.

    Raises:
        ValueError: layers that are not softmax attention; tokens that see later ones; RoPE that
            depends on the length; the auxiliary loss of a mixture of experts; sinks; queries that
            are scaled by positions of their own; a decoder that reads images.
    """
    name = type(model).__name__
    _refuse_model(model)
    passing = [
        "a recurrence or convolution" if layer.mixer is not None else layer.unread
        for layer in text_layers(model)
        if layer.mixer is not None
        or (layer.attention is None and OLDER_NAMES.get(layer.kind, layer.kind) not in PER_TOKEN)
    ]
    if passing:
        kinds = "; ".join(f"{n} layers of {kind}" for kind, n in Counter(passing).items())
        wanted = "layers of softmax attention where a sequence is split over ranks"
        fail("context_parallel", wanted, f"{name} with {kinds}")
    _refuse_uncounted(model)
    if "pixel_values" in signature(type(text_decoder(model)).forward).parameters:
        wanted = "a text decoder that is given embeddings"
        fail("context_parallel", wanted, f"{name}, whose decoder puts images in itself")
    source = forward_source(type(model.base_model))
    if is_prefix_lm(model) or any(block in source for block in _IMAGE_BLOCKS):
        wanted = "a decoder whose tokens see no later ones"
        fail("context_parallel", wanted, f"{name}, whose image tokens do")
    found = [kind for kind in _rope_types(model) if kind in LENGTH_DEPENDENT_ROPE]
    if found:
        fail("context_parallel", "RoPE that does not depend on the length", found[0])
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        wanted = "no auxiliary loss of routers, which is of all tokens together"
        fail("output_router_logits", wanted, True)


def refuse_unsupported(model: PreTrainedModel, objectives: Objectives) -> None:
    """Raise for what was asked for and cannot be trained on this model.

    Args:
        model: a transformers model without wrappers.
        objectives: what is to be trained.

    Raises:
        ValueError: no output head, cross-attention, tokens of a second input that are predicted,
            text that attends both ways; for maps a layer that is not softmax attention or does not
            exist, or GradCAM with attention other than eager; for SMAM a layer that mixes tokens in
            a way that is not known, or RoPE that depends on the length.
    """
    _refuse_model(model)
    for name in NAMES:
        if (how := getattr(objectives, name)) is not None:
            _refuse_objective(model, name, how)


def warn_of_windows(model: PreTrainedModel, objectives: Objectives) -> None:
    """Warn of maps that are read only in layers with a window: far from its image a row has none,
    and adds 0 to the loss.

    Args:
        model: a transformers model without wrappers that supports the objectives.
        objectives: what is to be trained.
    """
    layers = text_layers(model)
    for name in ("klal", "hist", "margins"):
        if (how := getattr(objectives, name)) is None:
            continue
        kinds = {layers[number].kind for number in _layers_of(how) or text_attention(model)}
        if kinds <= WINDOWED:
            seen = f"`{name}` reads {' and '.join(sorted(kinds))} alone of {type(model).__name__}"
            rest = "a row whose image is outside of that window adds nothing to the loss"
            warnings.warn(f"{seen}: {rest}", stacklevel=3)


def evaluated(model: PreTrainedModel, attached: Objectives) -> Objectives:
    """What is computed in evaluation: what is attached, and SMAM, DV-SFT and KLAL with their
    defaults, so that models trained differently compare; those that the model supports.

    Args:
        model: the attached model, without wrappers.
        attached: the objectives that make the loss.

    Returns:
        The objectives.
    """
    found = all_terms(attached)
    added = [name for name in ("smam", "klal") if getattr(attached, name) is None]
    without = [n for n in added if _reason(_refuse_objective, model, n, getattr(found, n))]
    return replace(found, **dict.fromkeys(without)) if without else found


def all_terms(attached: Objectives) -> Objectives:
    """What evaluation computes on a model that supports everything.

    Args:
        attached: the objectives that make the loss.

    Returns:
        The objectives, SMAM, DV-SFT and KLAL with their defaults if they are not attached.
    """
    return replace(
        attached,
        smam=attached.smam or Smam(),
        dv_sft=attached.dv_sft or DvSft(),
        klal=attached.klal or Klal(),
    )


def _reason(refuse: Callable[..., object], *args: object) -> str | None:
    """The sentence with which `refuse` refuses."""
    try:
        refuse(*args)
    except ValueError as error:
        return str(error)
    return None


def _refuse_model(model: PreTrainedModel) -> None:
    """Raise for a model that supports no objective."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        wanted = "a decoder without cross-attention"
        fail("model", wanted, f"{name}, which is an encoder and a decoder")
    if model.get_output_embeddings() is None:
        fail("model", "a model with an output head", f"{name}, which has none")
    takes = signature(type(model).forward).parameters
    if model.base_model is model:  # Llama 4, which can be run for one token's logits
        headed = text_decoder(model) is not model.get_decoder() and "logits_to_keep" in takes
        if not headed or model.config.model_type in NO_PLACE:
            wanted = "a model whose forward is a body (`base_model`) and an output head"
            fail("model", wanted, f"{name}, whose parts are wired otherwise")
    if "decoder_input_ids" in takes:  # block diffusion, whose config does not say it
        wanted = "a decoder that reads `input_ids` and predicts their next tokens"
        fail("model", wanted, f"{name}, which predicts `decoder_input_ids`")
    config, modules = model.config.get_text_config(), list(text_decoder(model).modules())
    crossed = any("CrossAttention" in type(module).__name__ for module in modules)
    if crossed or getattr(config, "cross_attention_layers", None):
        fail("model", "a decoder without cross-attention", name)
    unread = all(layer.unread == NO_MODULES for layer in text_layers(model))
    if unread and any(type(module).__name__.endswith("Attention") for module in modules):
        wanted = "a decoder whose attention goes through transformers' attention functions"
        fail("model", wanted, f"{name}, whose own does not")
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if both_ways not in (None, False, "vision") and not is_prefix_lm(model):
        fail("model", "causal attention between text tokens", f"{name}, which attends both ways")


def _refuse_objective(model: PreTrainedModel, name: str, how: object) -> None:
    """Raise for an objective that the layers of a model do not support."""
    if (failed := model.__dict__.get(FAILED, {}).get(name)) is not None:
        raise ValueError(failed)
    if name == "smam":
        _refuse_smam(model)
        if how.keep == "sinks" and not any(n >= how.sink_layer for n in text_attention(model)):
            readable = ", ".join(map(str, text_attention(model)))
            wanted = f"a layer with softmax attention ({readable}) at it or behind"
            fail("smam.sink_layer", wanted, how.sink_layer)
    elif name == "basic":
        refuse_basic(model, how)
    elif name in ("klal", "policy") or getattr(how, "maps", None) or getattr(how, "attention", 0):
        _refuse_maps(model, name, how)


def _refuse_smam(model: PreTrainedModel) -> None:
    obstacles = [layer for layer in text_layers(model) if layer.obstacle is not None]
    if obstacles:
        counted = Counter(layer.obstacle for layer in obstacles)
        kinds = "; ".join(f"{n} layers of {kind}" for kind, n in counted.items())
        wanted = "layers that side tokens can pass (softmax attention, recurrences, convolutions)"
        fail("smam", wanted, f"{type(model).__name__} with {kinds}")
    found = [kind for kind in _rope_types(model) if kind in LENGTH_DEPENDENT_ROPE]
    if found:
        fail("smam", "RoPE that does not depend on the length", found[0])


def _refuse_uncounted(model: PreTrainedModel) -> None:
    """Raise for attention that depends on more than the keys and positions that it is handed."""
    for number, module in text_attention(model).items():
        layer = f"{type(model).__name__} with layer {number}"
        if getattr(module, "sinks", None) is not None:
            wanted = "attention without sinks where a sequence is split over ranks"
            fail("context_parallel", wanted, f"{layer}, which has them")
        # Llama 4 scales the queries of layers without RoPE by where in the tensor they are.
        counts = "arange(hidden_states.shape[1]" in forward_source(type(module))
        tuned = getattr(module, "attn_temperature_tuning", True)
        if counts and tuned and not getattr(module, "use_rope", False):
            wanted = "attention that counts no positions of its own"
            fail("context_parallel", wanted, f"{layer}, which does: attn_temperature_tuning")


def _refuse_packing(model: PreTrainedModel) -> None:
    """Raise for a model whose layers let documents of one row meet."""
    name, layers = type(model).__name__, text_layers(model)
    if (failed := model.__dict__.get(FAILED, {}).get("packing")) is not None:
        raise ValueError(failed)
    if is_prefix_lm(model):
        fail("packing", "causal attention between text tokens", f"{name}, a prefix-LM")
    remapped = hasattr(masking_utils, "remap_positions_for_packed_sequence")
    if remapped and any(n in forward_source(type(model.base_model)) for n in _IMAGE_BLOCKS):
        # remapped positions are looked up among the row's blocks as if they were the row's own
        wanted = "a decoder whose image tokens see no later ones"
        fail("packing", wanted, f"{name}, whose masks misplace them in all but the first document")
    passing = [
        "a recurrence or convolution" if layer.mixer is not None else layer.unread
        for layer in layers
        if layer.mixer is not None
        or (layer.attention is None and OLDER_NAMES.get(layer.kind, layer.kind) not in PER_TOKEN)
    ]
    if passing:
        kinds = "; ".join(f"{n} layers of {kind}" for kind, n in Counter(passing).items())
        wanted = "layers that keep the documents of a row apart (softmax attention)"
        fail("packing", wanted, f"{name} with {kinds}")
    if not takes_text_first(model):
        fail("packing", "a decoder that takes text positions beside multimodal ones", name)
    calls = _MASKS.findall(forward_source(type(text_decoder(model))))
    if calls and not any("position_ids" in call for call in calls):
        fail("packing", "a decoder whose masks are made by position_ids", name)
    chunked = any(layer.chunk is not None for layer in layers)
    if chunked and not remapped:
        wanted = "a transformers that counts chunks from each document's start"
        fail("packing", wanted, "an older one, which counts them from the row's")


def _rope_types(model: PreTrainedModel) -> list[str]:
    """How positions become frequencies, as the decoder's modules say or, without any, the config.

    HunYuan's module makes fixed frequencies of a config that says "dynamic".
    """
    modules = text_decoder(model).modules()
    kinds = [module.rope_type for module in modules if hasattr(module, "rope_type")]
    if not kinds:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope.get("rope_type")]
    return [
        name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])
    ]


def _refuse_maps(
    model: PreTrainedModel,
    name: str,
    how: Klal | Hist | Margins | AttentionPolicy | Distillation,
) -> None:
    layers, attention = text_layers(model), text_attention(model)
    if not attention:
        kinds = ", ".join(sorted({layer.unread for layer in layers}))
        fail(name, "layers of softmax attention", f"{type(model).__name__} with {kinds}")
    heads = getattr(how, "chosen_heads", None) or ()
    chosen, field = _layers_of(how) or (), f"{name}.{'chosen_heads' if heads else 'layers'}"
    chosen = () if isinstance(chosen, str) else chosen
    if chosen and chosen[-1] >= len(layers):
        fail(field, f"layers in [0, {len(layers)})", chosen)
    for number in chosen:
        if number not in attention:
            readable = ", ".join(map(str, attention))
            wanted = f"layers of softmax attention ({readable})"
            fail(field, wanted, f"{number}, a layer of {layers[number].unread}")
    count = model.config.get_text_config().num_attention_heads
    for pair in heads:
        if pair[1] >= count:
            fail(field, f"pairs of a layer and one of its heads in [0, {count})", tuple(pair))
    most = count * len(chosen or attention)
    if (getattr(how, "picked_heads", None) or 0) > most:
        fail(f"{name}.picked_heads", f"at most {most}, the heads of its layers", how.picked_heads)
    if getattr(how, "by_queries", False) and not hasattr(text_decoder(model), "layers"):
        got = f"{type(model).__name__}, whose decoder has no list of layers"
        fail(f"{name}.head_weight", "layers whose outputs can be read", got)
    if getattr(how, "by_queries", False) and is_prefix_lm(model):
        wanted = "text tokens that see no later ones before a row"
        fail(f"{name}.head_weight", wanted, f"{type(model).__name__}, whose prompt does")
    if getattr(how, "maps", None) == "gradcam":
        for module in attention.values():
            refuse_fused(module.config._attn_implementation)


def _layers_of(how: Klal | Hist | Margins) -> tuple[int, ...] | None:
    """The layers whose maps an objective reads; None: all."""
    return how.counted_layers if isinstance(how, Klal) else how.layers


def refuse_fused(attention: str) -> None:
    """Raise unless attention is plain mathematics, which differentiates twice.

    Raises:
        ValueError: flash, sdpa or flex attention.
    """
    if attention != "eager":
        wanted = "eager: GradCAM losses differentiate twice, which flash and sdpa attention cannot"
        fail("attn_implementation", wanted, attention)
