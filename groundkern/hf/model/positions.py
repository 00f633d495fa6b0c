"""The positions of packed rows as a model would compute them for each document alone.

A collator gives text positions. Families with multimodal rotary positions compute theirs by a
method of their own, which runs here on the documents as single samples; text positions then come
first, because from those the decoder makes the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.checks import fail
from groundkern.hf.model.documents import Documents
from groundkern.hf.model.layers import body_of

COMPUTE = ("compute_3d_position_ids", "get_rope_index")  # the second with older transformers
STATE = "rope_deltas"  # what they leave behind for generation


def text_positions(model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
    """The positions by which documents are told apart.

    Args:
        model: a transformers model without wrappers.
        inputs: its keyword inputs.

    Returns:
        [R, S]; None: beside an attention mask, and for multimodal positions alone, there are none.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return None
    if positions.dim() == 2:
        return positions.expand(inputs["input_ids"].shape)
    first = _own_function(model) is not None and len(positions) == _axes(model) + 1
    return positions[0] if first else None


def model_positions(model: nn.Module, inputs: dict[str, Any], documents: Documents) -> Tensor:
    """The positions to give to a model's own forward.

    Args:
        model: a transformers model without wrappers.
        inputs: its keyword inputs, with `position_ids`.
        documents: of the batch.

    Returns:
        The positions as they are, or [1 + axes, R, S], text first, where the model has multimodal
        positions and was given text positions only.

    Raises:
        ValueError: audio in packed rows.
    """
    given, own = inputs["position_ids"], _own_function(model)
    if own is None or given.dim() == 3:
        return given
    if inputs.get("feature_attention_mask") is not None:
        fail("feature_attention_mask", "no audio in packed rows", "audio")
    text = given.expand(inputs["input_ids"].shape)
    alone = documents.alone(inputs)
    positions = _computed(*own, alone)
    if positions is None:  # no image in this batch
        return text.expand(1 + _axes(model), -1, -1)
    packed = torch.stack([documents.pack(axis) for axis in positions])
    return torch.cat((text[None], packed.to(text.dtype)))


def packed_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with which a model's own forward keeps the documents of packed rows apart.

    It looks for documents only without a cache, which some text configs switch on whatever the
    Trainer says, and families with multimodal positions only in text positions beside these.

    Args:
        model: a transformers model without wrappers.
        inputs: its keyword inputs.

    Returns:
        The same, unless text positions came without an attention mask.
    """
    text = text_positions(model, inputs) if "input_ids" in inputs else None
    if text is None:
        return inputs
    positions = model_positions(model, inputs, Documents(text))
    return {**inputs, "position_ids": positions, "use_cache": False}


def takes_text_first(model: nn.Module) -> bool:
    """Whether a decoder takes text positions beside multimodal ones, or has none of these.

    Args:
        model: a transformers model without wrappers.

    Returns:
        False for HunYuan-VL, whose decoder knows four axes and refuses a fifth.
    """
    return _own_function(model) is None or _axes(model) == 3


def _own_function(model: nn.Module) -> tuple[nn.Module, Callable[..., Any]] | None:
    """The method by which a model computes multimodal positions, and whose it is; None: it has
    none."""
    owners = body_of(model), model
    found = ((owner, getattr(owner, name, None)) for name in COMPUTE for owner in owners)
    return next((own for own in found if own[1] is not None), None)


def _axes(model: nn.Module) -> int:
    """How many positions a token has, without its text position (HunYuan: 4)."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (0, 0, 0))


def _computed(
    owner: nn.Module, compute: Callable[..., Any], alone: dict[str, Any]
) -> Tensor | None:
    """[axes, D, L]; None: the model would count tokens."""
    named = [p for p in signature(compute).parameters.values() if p.kind is not p.VAR_KEYWORD]
    given = {p.name: alone.get(p.name) for p in named if p.name in alone or p.default is p.empty}
    kept = getattr(owner, STATE, None)
    try:
        with torch.no_grad():
            found = compute(**given)
    finally:
        if hasattr(owner, STATE):
            setattr(owner, STATE, kept)
    return found[0] if isinstance(found, tuple) else found
