"""Side tokens: one more token per aligned row, whose residual stream becomes x+ of (S2).

A side token is a copy of the input token at its row. In every layer the attention function computes
its attention from the row's query and the allowed keys (attention.py). Everything else in a layer
applies to it as to any other token.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from groundkern.checks import fail
from groundkern.hf.data.tokens import PER_TOKEN

KNOWN = (*PER_TOKEN, "position_ids")  # inputs with one entry per token


def append_side_tokens(
    inputs: dict,
    position: Tensor,
    visual: Collection[int],
    token_type: int = 0,
    pad_token: int | None = None,
) -> dict:
    """The model's inputs with R side tokens at the end of every sequence.

    Positions that the model derives itself simply continue: a side token's own q, k and v are never
    used. Given positions are copied from the row. Without a mask they are read as packed documents:
    the side tokens are then further ones, which change nothing between the main tokens.

    Args:
        inputs: keyword inputs of the body with `input_ids` [B, S].
        position: [B, R] rows, padded with -1; a padding row still gets a token, whose output is
            not used.
        visual: the ids of visual tokens, which a padding row's token must not have.
        token_type: the `token_type_ids` of side tokens.
        pad_token: the id of padding.

    Returns:
        A new dict with S + R tokens per sequence.

    Raises:
        ValueError: an unknown input with one entry per token.
    """
    input_ids = inputs["input_ids"]
    unknown = [
        name
        for name, x in inputs.items()
        if name not in KNOWN and isinstance(x, Tensor) and x.shape[:2] == input_ids.shape
    ]
    if unknown:
        wanted = f"only {', '.join(KNOWN)} to have one entry per token"
        fail(unknown[0], wanted, list(inputs[unknown[0]].shape))
    row = position.clamp(min=0).long()
    filled = filler(visual, pad_token)
    extra = {"input_ids": torch.where(position >= 0, input_ids.gather(1, row), filled)}
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is not None:
        positions = positions.expand(*positions.shape[:-2], len(row), -1)
        inputs = {**inputs, "position_ids": positions}
        extra["position_ids"] = positions.gather(-1, row.expand(*positions.shape[:-1], -1))
    if mask is not None:
        extra["attention_mask"] = torch.ones_like(row, dtype=mask.dtype)
    for name, value in (("mm_token_type_ids", 0), ("token_type_ids", token_type)):
        if inputs.get(name) is not None:
            extra[name] = torch.full_like(row, value, dtype=inputs[name].dtype)
    experts = inputs.get("moe_mm_token_type_ids")  # Ernie: whose experts a token goes to
    if experts is not None:
        extra["moe_mm_token_type_ids"] = experts.gather(1, row)
    return {**inputs, **{name: torch.cat((inputs[name], x), -1) for name, x in extra.items()}}


def filler(visual: Collection[int], pad_token: int | None) -> int:
    """The id of a token that nothing is learned from and that sees no other.

    Args:
        visual: the ids of visual tokens, which it must not have.
        pad_token: the id of padding, whose embedding may be zero: with no key to see a token would
            stay zero, and the gradient of a root of its magnitude (Gemma3n) would be NaN.
    """
    return min({0, 1, 2, 3} - {*visual, pad_token})
