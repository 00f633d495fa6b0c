"""Anchor tokens: words of a model's vocabulary whose attention over the image is the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AddedToken

from groundkern.checks import fail, require


def anchor_id(tokenizer: Any, token: str) -> int:
    """The id of an anchor.

    Args:
        tokenizer: the model's.
        token: its text, such as "<ANCHOR>".

    Raises:
        ValueError: a text that is not one token of its own.
    """
    added = tokenizer.get_added_vocab()
    wanted = "a token that was added to the tokenizer (groundkern.hf.add_tokens)"
    require(token in added, "anchor_token", wanted, repr(token))
    return added[token]


def with_anchor(tokenizer: Any, allowed: Sequence[str], anchor: str | None) -> tuple[str, ...]:
    """The special tokens that texts may hold, an anchor among them if it is one.

    Args:
        tokenizer: the model's.
        allowed: the others.
        anchor: its text, or None.
    """
    special = {str(x) for x in tokenizer.added_tokens_decoder.values() if x.special}
    return (*allowed, anchor) if anchor in special - set(allowed) else tuple(allowed)


def add_to_tokenizer(tokenizer: Any, tokens: Iterable[str]) -> list[str]:
    """Add tokens to a tokenizer alone, whose model has rows for them.

    Args:
        tokenizer: the model's.
        tokens: their texts.

    Returns:
        Those that it did not have.
    """
    new = [token for token in tokens if token not in tokenizer.get_added_vocab()]
    if new:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in new])
    return new


@torch.no_grad()
def add_tokens(model: nn.Module, tokenizer: Any, tokens: Iterable[str]) -> list[int]:
    """Add tokens to a tokenizer and to a model's embeddings, in place.

    A new token's embedding, of the input and of the output, is the mean of all that were there.
    Tokens that the tokenizer has been given before, as that of a saved model has, stay as they are.
    They are no special tokens: texts may hold them and decoding shows them.

    Args:
        model: a transformers model, before PEFT and before it is sharded.
        tokenizer: the model's.
        tokens: their texts, such as "<ANCHOR>".

    Returns:
        The ids of all `tokens`, new or not.

    Raises:
        ValueError: an empty text, or one with white space at an end; a model inside PEFT.

    Source: GUI-AIMA (arXiv 2511.00810).
    """
    tokens = list(dict.fromkeys(tokens))
    if hasattr(model, "get_base_model"):
        fail("model", "a model before PEFT is put around it", type(model).__name__)
    for token in tokens:
        good = token.strip() == token != ""
        require(good, "tokens", "texts without white space at their ends", repr(token))
    its: Any = model  # methods of transformers' models
    known = len(tokenizer)
    new = add_to_tokenizer(tokenizer, tokens)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    rows = its.get_input_embeddings().weight.shape[0]
    if ids and max(ids) >= rows:
        its.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fresh = [tokenizer.convert_tokens_to_ids(token) for token in new]
    missing = [i for i in ids if i >= rows]  # of a tokenizer that had them before its model
    _set_to_mean(model, sorted({*fresh, *missing}), min(known, rows))
    return ids


def _set_to_mean(model: Any, ids: list[int], known: int) -> None:
    """Give tokens the mean embedding of the first `known`, of the input and of the output."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    for name in ("weight", "bias"):
        found = {id(x): x for part in parts if (x := getattr(part, name, None)) is not None}
        for x in found.values() if ids else ():
            old = torch.ones(len(x), dtype=torch.bool, device=x.device)
            old[known:] = False
            old[[i for i in ids if i < len(x)]] = False
            x[ids] = x[old].float().mean(0).to(x.dtype)
