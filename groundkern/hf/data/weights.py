"""Weights of rows: which rows count, what composites count for, and gates by sample.

A weight multiplies a row's loss and not its divisor; a row of weight 0 is as if it were not there
(W1). A model and whoever counts rows see it as padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUPS = ("side", "word", "map", "phrase", "lens")
"""The groups of a batch's tensors whose rows have weights: `gk_side_weight`, ..."""


def weightless_rows_as_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What changes in a batch if its rows of weight 0 become padding.

    Args:
        tensors: of a batch, by their names without `gk_`; weights that are not there are 1.

    Returns:
        New `..._position`s of the groups with weights, and what goes with their rows: composites
        that have a phrase of weight 0, and the labels of images whose labelled tokens all have.

    Source: (W1).
    """
    changed = {}
    for group in GROUPS:
        position, weight = (tensors.get(f"{group}_{name}") for name in ("position", "weight"))
        if position is None or weight is None:
            continue
        changed[f"{group}_position"] = torch.where(weight != 0, position, -1)
        if group == "phrase" and "phrase_composite" in tensors:
            composite = tensors["phrase_composite"]
            number = tensors["phrase_number"]
            weights = composite_weights(composite, position, number, weight)
            changed["phrase_number"] = torch.where(weight != 0, number, -1)
            changed["phrase_composite"] = torch.where(weights[..., None] != 0, composite, -1)
        if group == "word" and {"word_bag", "image"} <= tensors.keys():
            bag, image = tensors["word_bag"], tensors["image"]
            of = image.gather(1, position.clamp(min=0).long())
            weights = _largest(position, of, weight, bag.shape[1])
            changed["word_bag"] = torch.where(weights[..., None] != 0, bag, -1)
    return changed


def composite_weights(
    composite: Tensor, position: Tensor, number: Tensor, weight: Tensor
) -> Tensor:
    """What composites count for: as much as their whole; nothing if one of the three has weight 0.

    Args:
        composite: [B, K, 3], phrases.
        position, number, weight: [B, Rp], the rows of phrases.

    Returns:
        [B, K].

    Source: (W1).
    """
    phrases = number.shape[1]  # no sample has more of them than rows
    if not phrases:
        return weight.new_ones(composite.shape[:2])
    index = composite.clamp(min=0, max=phrases - 1).long()
    of_phrase = _largest(position, number, weight, phrases)
    own = of_phrase.gather(1, index.flatten(1)).view(index.shape)  # [B, K, 3]
    return torch.where((own != 0).all(-1), own[..., 0], 0.0)


def _largest(position: Tensor, group: Tensor, weight: Tensor, groups: int) -> Tensor:
    """[B, groups]: the largest weight among the rows of each group; 1 of a group without rows.

    Args:
        position, group, weight: [B, R]; a group of -1, or beyond the last, is none.
        groups: how many there are.
    """
    own = (position >= 0) & (group >= 0) & (group < groups)
    index = torch.where(own, group, groups).long()
    largest = weight.new_ones(len(weight), groups + 1)
    return largest.scatter_reduce(1, index, weight, "amax", include_self=False)[:, :groups]
