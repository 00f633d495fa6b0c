"""Supervision of completions that a policy generated: rows found after generation.

A batch of rollouts is [B, P + C] tokens, prompts padded on the left and completions on the right.
The rows are those of completion tokens, and nothing is tokenised anew. Each function returns `gk_`
tensors of such a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groundkern import maps
from groundkern.checks import require
from groundkern.hf.data.image_token import one_of
from groundkern.hf.data.regions import MapTargets, spread

PLACES = {"boxes", "points", "polygons", "polylines"}


def token_rows(completion_mask: Tensor, prompt: int) -> Tensor:
    """The rows that predict the completions' tokens.

    Args:
        completion_mask: [B, C], not 0 at tokens that count.
        prompt: P.

    Returns:
        int32 [B, C], `gk_text_position`.
    """
    return _positions(completion_mask, prompt - 1)


def image_numbers(input_ids: Tensor, tables: Sequence[Tensor], visual: Collection[int]) -> Tensor:
    """Which image each visual token is of.

    Args:
        input_ids: int64 [B, S].
        tables: fp64 [n, 5] of `image_geometry` for each sample.
        visual: the ids of visual tokens.

    Returns:
        int32 [B, S], `gk_image`.

    Raises:
        ValueError: a sample with more or fewer visual tokens than its table has rows.
    """
    image = input_ids.new_full(input_ids.shape, -1, dtype=torch.int32)
    for b, table in enumerate(tables):
        at = one_of(input_ids[b], visual).nonzero()[:, 0]
        wanted = f"{len(table)} visual tokens in rollout {b}, as its images have"
        require(len(at) == len(table), "input_ids", wanted, len(at))
        image[b, at] = table[:, 0].to(image)
    return image


def map_rows(
    completion_mask: Tensor,
    prompt: int,
    number: Tensor,
    tables: Sequence[Tensor],
    regions: Sequence[Sequence[Mapping[str, Any]]],
    weight: Tensor,
    how: MapTargets,
) -> dict[str, Tensor]:
    """Rows of completions with a target map: where the evidence is.

    Args:
        completion_mask: [B, C], not 0 at tokens that count.
        prompt: P.
        number: of `image_numbers`.
        tables: fp64 [n, 5] of `image_geometry` for each sample.
        regions: of each rollout, what `check_region` takes; of one image together.
        weight: [B], what the rows of a rollout count for; 0: it has none.
        how: its kind, levels, sigma and floor make a target, and `most` says how many rows a
            rollout and image have.

    Returns:
        `gk_map_position`, `gk_map_token_position`, `gk_map_image`, `gk_map_target`,
        `gk_map_weight` and `gk_map_columns`.

    Source: (K3), (W1), (W2).
    """
    rows: list[list[tuple[int, int, Tensor]]] = []
    for b, table in enumerate(tables):
        found: list[tuple[int, int, Tensor]] = []
        tokens = (completion_mask[b] != 0).nonzero()[:, 0].tolist() if weight[b] else []
        by_image: dict[int, list[Mapping[str, Any]]] = {}
        for region in regions[b]:
            by_image.setdefault(int(region.get("image") or 0), []).append(region)
        for image, of in sorted(by_image.items()):
            own = table[:, 0] == image
            target = torch.zeros(len(table))
            rects, form = table[own, 1:], {"kind": how.kind, "levels": how.levels}
            values = maps.target_map(rects, **form, sigma=how.sigma, **_shapes(of))
            target[own] = maps.with_floor(values, rects, how.floor)
            if target.any():
                fixed = maps.quantise(target)
                found += [(prompt + token, image, fixed) for token in spread(tokens, how.most)]
        rows.append(sorted(found, key=lambda row: row[:2]))
    width, widest = max(map(len, rows), default=0), max(map(len, tables), default=0)
    position = number.new_full((len(rows), width), -1)
    image, target = position.clone(), number.new_full((len(rows), width, widest), -1)
    columns = number.new_full((len(rows), widest), -1)
    for b, own in enumerate(rows):
        at = (number[b] >= 0).nonzero()[:, 0]
        columns[b, : len(at)] = at.to(columns)
        for r, (place, of, wanted) in enumerate(own):
            position[b, r], image[b, r] = place, of
            target[b, r, : len(wanted)] = wanted.to(target)
    counts = weight.float()[:, None].expand(position.shape).masked_fill(position < 0, 0.0)
    return {
        "gk_map_position": position,
        "gk_map_token_position": position.clone(),
        "gk_map_image": image,
        "gk_map_target": target,
        "gk_map_weight": counts,
        "gk_map_columns": columns,
    }


def check_region(region: Mapping[str, Any], images: int, where: str) -> None:
    """Refuse a region that says nothing, or of an image that is not there.

    Args:
        region: some of "boxes", "points", "polygons" and "polylines", each a list in fractions of
            the image as in `Region`, and "image", the number of the image (0).
        images: how many the rollout has.
        where: what starts the message.

    Raises:
        ValueError: the region is of another form.
    """
    wanted = f"a dict with some of {', '.join(sorted(PLACES))} and perhaps image"
    known = isinstance(region, Mapping) and region.keys() <= PLACES | {"image"}
    got = sorted(region) if isinstance(region, Mapping) else type(region).__name__
    require(known, where, wanted, got)
    require(any(region.get(place) for place in PLACES), where, wanted, got)
    image = region.get("image") or 0
    require(0 <= image < images, f"{where}.image", f"below {images}", image)


def _positions(completion_mask: Tensor, first: int) -> Tensor:
    """int32 [B, C]: `first` and on where the mask is not 0, else -1."""
    at = torch.arange(completion_mask.shape[1], device=completion_mask.device) + first
    at = at.to(torch.int32).expand(completion_mask.shape)
    return torch.where(completion_mask != 0, at, -1)


def _shapes(regions: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    return {kind: [shape for r in regions for shape in r.get(kind) or ()] for kind in PLACES}
