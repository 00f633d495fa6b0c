"""Weights of rows: which rows count, what composites count for, and gates by sample.

A weight multiplies a row's loss and not its divisor; a row of weight 0 is as if it were not there
(W1). A model and whoever counts rows see it as padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groundkern import checks
from groundkern.checks import require

GROUPS = ("side", "word", "map", "phrase", "lens", "contrast")
"""The groups of a batch's tensors whose rows have weights: `gk_side_weight`, ..."""


def weightless_rows_as_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What changes in a batch if its rows of weight 0 become padding.

    Args:
        tensors: of a batch, by their names without `gk_`; weights that are not there are 1.

    Returns:
        New positions of the groups with weights, weights of 0 for padding, and what goes with the
        rows: composites that have a phrase of weight 0, and the labels and words of images whose
        rows all have.

    Source: (W1).
    """
    changed = {}
    for group in GROUPS:
        position, weight = (tensors.get(f"{group}_{name}") for name in ("position", "weight"))
        if position is None or weight is None:
            continue
        changed[f"{group}_position"] = torch.where(weight != 0, position, -1)
        changed[f"{group}_weight"] = torch.where(position >= 0, weight, 0.0)
        if group == "map" and "map_token_position" in tensors:
            own = tensors["map_token_position"]
            changed["map_token_position"] = torch.where(weight != 0, own, -1)
        if group == "phrase" and "phrase_composite" in tensors:
            composite = tensors["phrase_composite"]
            number = tensors["phrase_number"]
            weights = composite_weights(composite, position, number, weight)
            changed["phrase_number"] = torch.where(weight != 0, number, -1)
            changed["phrase_composite"] = torch.where(weights[..., None] != 0, composite, -1)
        if {f"{group}_bag", "image"} <= tensors.keys():
            bag, image = tensors[f"{group}_bag"], tensors["image"]
            of = image.gather(1, position.clamp(min=0).long())
            weights = _largest(position, of, weight, bag.shape[1])
            changed[f"{group}_bag"] = torch.where(weights[..., None] != 0, bag, -1)
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


def gate(batch: Mapping[str, Tensor], keep: Tensor | Sequence[float]) -> dict[str, Tensor]:
    """A batch whose samples count as much as they are said to, for example only those with a
    reward: each weight of a row is multiplied by its sample's number. The text loss is as it was.

        batch = gate(collator(examples), rewards >= 0.5)

    Samples that are known before they are collated are gated by `GroundedExample.grounding_weight`;
    their rows are then not even made.

    Args:
        batch: a collated batch, not changed.
        keep: bool or float >= 0, [B]; of packed rows [B, D], the documents of each row in their
            order (D of the row that has most; what is behind a row's last is not looked at).

    Returns:
        The batch with all weights of its groups of rows, new ones where they change.

    Raises:
        ValueError: another shape, too few documents, or numbers that are negative or not finite
            (looked at if that needs no sync).

    Source: (W1); EASE (arXiv 2605.30912) keeps samples with a reward of at least 0.5.
    """
    ids = batch["input_ids"]
    keep = torch.as_tensor(keep, device=ids.device).float()
    number = _documents(batch)
    known, got = keep.dim() == (1 if number is None else 2), list(keep.shape)
    wanted = f"[{len(ids)}]" if number is None else f"[{len(ids)}, documents of a row]"
    require(known and len(keep) == len(ids), "keep", f"the shape {wanted}", got)
    if checks.values_visible(keep):
        usable = bool(torch.isfinite(keep).all()) and bool((keep >= 0).all())
        require(usable, "keep", "finite numbers >= 0", keep.tolist())
    gated = {}
    for group in GROUPS:
        position = batch.get(f"gk_{group}_position")
        if position is None:
            continue
        given = batch.get(f"gk_{group}_weight")
        weight = (position >= 0).float() if given is None else given
        if number is None:
            own = keep[:, None]
        else:
            document = number.gather(1, position.clamp(min=0).long())
            document = document.masked_fill(position < 0, 0)
            if checks.values_visible(document) and document.numel():
                most = int(document.max()) + 1
                wanted = f"{most} documents, as many as a row has"
                require(keep.shape[1] >= most, "keep", wanted, keep.shape[1])
            own = keep.gather(1, document)
        gated[f"gk_{group}_weight"] = weight * own
    return {**batch, **gated}


def _documents(batch: Mapping[str, Tensor]) -> Tensor | None:
    """int64 [B, S]: which document of its row a token is of, from 0; None: rows are not packed."""
    positions = batch.get("position_ids")
    if positions is None or batch.get("attention_mask") is not None:
        return None
    wanted = "text positions [B, S] of packed documents"
    require(positions.dim() == 2, "position_ids", wanted, list(positions.shape))
    return (positions == 0).cumsum(1) - 1


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
