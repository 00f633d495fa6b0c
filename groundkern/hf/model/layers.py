"""The layers of a text decoder by what mixes tokens in each: attention that the ops compute, a
recurrence or convolution that runs on the main tokens, or neither.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

# Kinds of `config.layer_types` whose rows see keys that their position tells.
SOFTMAX = ("full_attention", "sliding_attention", "chunked_attention")
RECURRENT = ("linear_attention", "conv")
BOTH = ("hybrid", "hybrid_sliding")  # attention beside a recurrence, in one layer
WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding"}
PER_TOKEN = ("moe", "mlp")  # nothing mixes tokens
OLDER_NAMES = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "recurrent": "linear_attention",
}
# Where decoder layers keep a recurrence or a convolution; the last two may be attention too.
ONLY_MIXERS = ("linear_attn", "conv", "mamba")
MIXERS = (*ONLY_MIXERS, "mixer", "self_attn")
NO_MODULES = "no attention modules"  # that the ops could read


class TextLayer(NamedTuple):
    """One layer of a text decoder.

    Args:
        number: the decoder's own.
        kind: of the config; "attention" if it names none.
        attention: what the ops compute, if there is such a thing.
        unread: why there is none.
        chunk: the tokens of a chunk, if attention stays inside of chunks.
        mixer: the recurrence or convolution, if there is one.
        obstacle: why side tokens cannot pass this layer; None: they can.
    """

    number: int
    kind: str
    attention: nn.Module | None
    unread: str | None
    chunk: int | None
    mixer: nn.Module | None
    obstacle: str | None


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that makes last hidden states of embeddings.

    Args:
        model: a transformers model without wrappers.

    Returns:
        Its text decoder, without an output head (Llama 4 calls one with a head its decoder).
    """
    decoder = model.get_decoder()
    headed = getattr(decoder, "get_output_embeddings", lambda: None)() is not None
    return decoder.model if headed and isinstance(decoder.model, nn.Module) else decoder


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module that a model's own forward runs before its output head.

    Args:
        model: a transformers model without wrappers.

    Returns:
        Its body; its text decoder where the parts have no body in common (Llama 4).
    """
    return text_decoder(model) if model.base_model is model else model.base_model


def text_layers(model: PreTrainedModel) -> list[TextLayer]:
    """The layers of a model's text decoder.

    Args:
        model: a transformers model without wrappers.

    Returns:
        As many as the config has hidden layers, in order.
    """
    config, decoder = model.config.get_text_config(), text_decoder(model)
    count = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or ["attention"] * count)
    found: list[list[nn.Module]] = [[] for _ in range(count)]
    for module in decoder.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and 0 <= number < count and hasattr(module, "scaling"):
            found[number].append(module)
    holders = getattr(decoder, "layers", None) or [None] * count
    chunk = getattr(config, "attention_chunk_size", None)
    layers = zip(range(count), kinds, found, holders, strict=False)
    return [_text_layer(*layer, chunk) for layer in layers]


def _text_layer(
    number: int, kind: str, found: list[nn.Module], holder: nn.Module | None, chunk: int | None
) -> TextLayer:
    known, attention, unread = OLDER_NAMES.get(kind, kind), None, kind
    mixer = obstacle = None
    if known in SOFTMAX + BOTH:
        attention, unread = _attention_of(found)
        obstacle = unread
    elif known not in RECURRENT + PER_TOKEN:
        obstacle = kind
    if known not in PER_TOKEN:
        name, mixer = _mixer_of(holder, MIXERS if known in RECURRENT else ONLY_MIXERS)
        if mixer is not None and not _hands_on_keywords(type(holder), name):
            obstacle = f"{kind} whose layer does not hand its keywords to `{name}`"
        if mixer is None and known in RECURRENT + BOTH:
            obstacle = f"{kind} without a module named {', '.join(MIXERS)}"
    chunk = chunk if known == "chunked_attention" else None
    return TextLayer(number, kind, attention, unread, chunk, mixer, obstacle)


def _mixer_of(
    holder: nn.Module | None, names: tuple[str, ...]
) -> tuple[str | None, nn.Module | None]:
    """The first module of a layer that has one of these names."""
    found = ((name, getattr(holder, name, None)) for name in names)
    return next(((n, m) for n, m in found if isinstance(m, nn.Module)), (None, None))


def _hands_on_keywords(layer_class: type[nn.Module], name: str) -> bool:
    """Whether a layer's forward calls a module of its own with its own keywords."""
    _, call, after = forward_source(layer_class).partition(f"self.{name}(")
    return bool(call) and "**kwargs" in after.partition(")\n")[0]


def _attention_of(found: list[nn.Module]) -> tuple[nn.Module | None, str | None]:
    """The one attention module of a layer, or what keeps the ops from computing it."""
    if len(found) != 1:
        return None, f"{len(found)} attention modules" if found else NO_MODULES
    source = forward_source(type(found[0]))
    if "position_bias=" in source:
        return None, "attention with a position bias"
    if getattr(found[0], "sinks", None) is not None and "s_aux=" not in source:
        return None, "attention with sinks that are not handed to the attention function as s_aux"
    return found[0], None


@cache
def forward_source(module_class: type[nn.Module]) -> str:
    """The source of a class's forward; empty if it has none (a class typed into a prompt)."""
    try:
        return inspect.getsource(inspect.unwrap(module_class.forward))
    except OSError:
        return ""


def text_attention(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules that the ops compute, without the vision tower's.

    Args:
        model: a transformers model without wrappers.

    Returns:
        The modules by the number of their layer, in order.
    """
    layers = text_layers(model)
    return {layer.number: layer.attention for layer in layers if layer.attention is not None}
