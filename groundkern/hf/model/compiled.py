"""Compiled decoder layers: what `torch.compile` is for in an attached model.

The grounded forward itself stays eager: it sorts a batch, keeps books over layers and calls ops
that are fused already. Nearly all of a step's time is in the decoder's layers, which all have the
same code, so their parts are compiled on their own and share graphs: four for all layers, once more
when lengths first change, and for a batch of one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from groundkern.checks import require
from groundkern.hf.model.layers import text_decoder, text_layers
from groundkern.hf.model.support import base_model


def compile_layers(
    model: nn.Module,
    *,
    backend: str | Any = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> nn.Module:
    """Compile the layers of a model's text decoder, in place and when they first run.

    `torch.compile(model)` of an attached model does it by itself, with torch's defaults, when the
    first batch with `gk_` tensors comes; `GroundingTrainer` does it for `torch_compile=True`.

    Args:
        model: a transformers model, bare or inside PEFT, attached or not.
        backend, mode, dynamic: as `torch.compile` takes them.

    Returns:
        The same `model`.

    Raises:
        TypeError: not a transformers model.
        ValueError: a decoder without layers.
    """
    base = base_model(model)
    parts = _parts(base)
    require(bool(parts), "model", "a decoder with a list of layers", type(base).__name__)
    for part in parts:
        part.compile(backend=backend, mode=mode, dynamic=dynamic)
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile_layers` was called.

    Args:
        model: a transformers model without wrappers.
    """
    return any(part._compiled_call_impl is not None for part in _parts(model)[:1])


def _parts(model: Any) -> list[nn.Module]:
    """Attention, feed-forward and norms of every decoder layer.

    Not the layers themselves: a compiled layer would hold its own checkpointing (transformers
    5.23), which cannot be traced around attention that runs eagerly. Nor recurrences and
    convolutions, which run on the main tokens alone.
    """
    mixing = text_layers(model)
    modules = {layer.attention for layer in mixing} | {layer.mixer for layer in mixing}
    lists = [m for m in text_decoder(model).modules() if isinstance(m, nn.ModuleList)]
    layers = [x for each in lists for x in each if not modules.isdisjoint(x.modules())]
    mixers = {layer.mixer for layer in mixing}
    return [part for layer in layers for part in layer.children() if part not in mixers]
