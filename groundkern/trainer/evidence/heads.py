"""Which heads of a plain run look at the target, and as many others to compare them with (K7)."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from groundkern.metrics import mass_on_target
from groundkern.trainer.evidence.drawings import Whole, rows
from groundkern.trainer.metrics.held_out import own_columns

FEW = 4  # heads that are trained; of a model with fewer than 8, half of them
_BATCH, _DRAWINGS = 64, 256
HEADS = ("best", "others")


@torch.no_grad()
def shares(model: nn.Module, whole: Whole, position: Tensor | None) -> Tensor:
    """The part of each head's attention to the image that is on the target.

    Args:
        model: attached.
        whole: drawings, of which the first are measured.
        position: of `loop.positions`.

    Returns:
        [L, H] fp64, means over map rows.

    Source: share of (K7).
    """
    model.eval()
    found = []
    for index in torch.arange(min(_DRAWINGS, len(whole["input_ids"]))).split(_BATCH):
        batch = rows(whole, index, position, model.device)
        there = batch["gk_map_position"] >= 0  # [B, R]
        maps = model(**batch, gk_record=("maps", "heads")).head_maps[there]  # [N, L, H, C]
        target = batch["gk_map_target"][there]
        on = (target > 0) & (target == target.amax(-1, keepdim=True))
        shape = maps.shape
        every = [
            x[:, None, None].expand(shape).flatten(0, 2) for x in (on, own_columns(batch)[there])
        ]
        share = mass_on_target(maps.flatten(0, 2), *every).nan_to_num(0.0)
        found.append(share.view(shape[:3]).double())
    return torch.cat(found).mean(0)


def chosen_heads(share: list[list[float]], which: str, seed: int) -> list[list[int]]:
    """Pairs of a layer and a head.

    Args:
        share: of `shares`.
        which: the "best", or as many of the "others", drawn from the seed.
        seed: of the draw.
    """
    pairs = [[layer, head] for layer, heads in enumerate(share) for head in range(len(heads))]
    order = sorted(pairs, key=lambda pair: -share[pair[0]][pair[1]])
    count = min(FEW, len(pairs) // 2)
    if which == "others":
        return sorted(random.Random(seed).sample(order[count:], count))
    return sorted(order[:count])
