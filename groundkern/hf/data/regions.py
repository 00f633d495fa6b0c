"""What regions supervise: SMAM's rows with their sets of visual tokens, KLAL's with their targets.

Each function returns fields of a batch (`SampleFields`) and counts what it found and what was lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from groundkern import maps, maps_in_time
from groundkern.checks import require
from groundkern.hf.data.example import Region
from groundkern.hf.data.layout import Layout
from groundkern.hf.data.moments import SHAPES, moments_of
from groundkern.hf.data.padding import SampleFields

EMPTY_REGION = ("skip", "language")
_PREDICTORS = {"predictor": "last", "answer_predictor": "answer", "phrase_predictor": "phrase"}
MAP_ROWS = ("last", "answer", "phrase", "anchor", *_PREDICTORS)


class MapTargets(NamedTuple):
    """How target maps are made.

    Args:
        kind, levels, sigma: see `groundkern.maps.target_map`.
        rows: one of MAP_ROWS.
        anchor: the id of the anchor token, whose rows "anchor" are.
        queries: add the query tokens of GUI-AIMA's head weights.
        complement: the target's maximum minus the target, instead of the target.
        floor: the part of each target that is spread evenly over its image (`maps.with_floor`).
        most: rows of an answer and image at most, evenly spread; None: all.
    """

    kind: str
    levels: tuple[float, float, float]
    sigma: float = 0.8
    rows: str = "predictor"
    anchor: int | None = None
    queries: bool = False
    complement: bool = False
    floor: float = 0.0
    most: int | None = None


def region_masks(layout: Layout, counts: Counter[str], grow: float = 0.0) -> list[Tensor]:
    """Which visual tokens each region covers.

    Args:
        layout: the sequence.
        counts: adds to `regions`, `regions_outside`, `regions_untrained` and `regions_gated`, of
            weight 0.
        grow: visual tokens by which a region grows on all sides (`maps.inside`).

    Returns:
        bool [C] for each region of the example; nothing of one of weight 0.
    """
    masks = []
    for region in layout.example.regions:
        if layout.example.weight_of(region) == 0:
            counts.update(regions=1, regions_gated=1)
            masks.append(torch.zeros(len(layout.visual), dtype=torch.bool))
            continue
        own = layout.table[:, 0] == layout.example.place(region)
        rects, times = layout.table[own, 1:], layout.times[own]
        mask = torch.zeros(len(layout.visual), dtype=torch.bool)
        if region.video is None:
            mask[own] = maps.inside(rects, **_shapes([region]), grow=grow)
        else:
            moments = moments_of([region], layout.example.videos[region.video])
            mask[own] = maps_in_time.inside(rects, times, moments, grow=grow)
        counts["regions"] += 1
        if not layout.trains(region):
            counts["regions_untrained"] += 1
        counts["regions_outside"] += not mask.any()
        masks.append(mask)
    return masks


def side_rows(
    layout: Layout,
    masks: list[Tensor],
    counts: Counter[str],
    empty: str = "skip",
    *,
    complement: bool = False,
    registers: bool = False,
) -> SampleFields:
    """SMAM: a row `i - 1` for each token `i` of a region's text; a token of several regions sees
    their union and counts as much as the weightiest of them.

    Args:
        layout: the sequence.
        masks: of `region_masks`.
        counts: adds to `regions_truncated` and `side_rows`, `side_rows_...`.
        empty: a token whose regions have no visual token before it is left out ("skip") or sees the
            language tokens alone ("language").
        complement: the visual tokens of its images outside of all of its regions instead.
        registers: those without a place too, of images with one inside.

    Returns:
        `side_position`, `side_set`, `side_inside`, `side_weight`.

    Source: (S1), (S6), (W1).
    """
    aligned: dict[int, dict[int, None]] = {}  # regions of each token
    for index, region in enumerate(layout.example.regions):
        if not layout.teaches(region):
            continue
        positions = layout.text_positions(region, f"regions[{index}]")
        counts["regions_truncated"] += None in positions
        for p in positions:
            if p is not None:
                aligned.setdefault(p, {})[index] = None
    visual = set(layout.visual.tolist())
    rows, numbers, inside = [], {}, []
    for token, regions in sorted(aligned.items()):
        row = token - 1
        union = torch.stack([masks[index] for index in regions]).any(0)
        if complement:
            union = _outside(layout, regions, union)
        without = not (union & (layout.visual <= row)).any()
        counts["side_rows_without_region"] += without
        if row in visual:
            counts["side_rows_on_image"] += not without
        elif not without or empty == "language":
            number = numbers.setdefault(tuple(regions), len(numbers))
            if number == len(inside):
                if registers:
                    union = union | _registers(layout, union)
                inside.append(torch.zeros(len(layout.ids), dtype=torch.bool))
                inside[-1][layout.visual] = union
            shown = [layout.example.regions[index] for index in regions]
            rows.append((row, number, max(map(layout.example.weight_of, shown))))
    counts["side_rows"] += len(rows)
    names = ("side_position", "side_set", "side_weight")
    return {**dict(zip(names, zip(*rows))), "side_inside": inside}


def map_rows(layout: Layout, how: MapTargets, counts: Counter[str]) -> SampleFields:
    """KLAL: rows for each answer and image or video that regions connect, with a target over it. A
    row counts as much as the weightiest of its regions.

    Args:
        layout: the sequence.
        how: its `rows` are the own row of the answer's "last" content token, of every token of the
            "answer", or of every token of a region's text ("phrase"), which has that region's
            target alone; of the "anchor" token in a region's text, or else of the answer's last; or
            the rows that predict those tokens: "predictor" (of the last), "answer_predictor" and
            "phrase_predictor", whose rows are those of `side_rows`.
        counts: adds to `map_rows`, `map_rows_...`.

    Returns:
        `map_position`, `map_token_position`, `map_image`, `map_weight`, `map_target` in fixed
        point, and if it is asked for `query_position`.

    Raises:
        ValueError: an answer with a region and without the anchor, by name.

    Source: (K1) to (K3), (W1), (W2); GUI-AIMA (arXiv 2511.00810), (G1).
    """
    connected: dict[tuple[int, int], list[Region]] = {}
    for region in filter(layout.teaches, layout.example.regions):
        place = layout.example.place(region)
        connected.setdefault((region.turn, place), []).append(region)
    rows, visual = [], set(layout.visual.tolist())
    targets: dict[tuple[int, ...], Tensor] = {}
    for (turn, image), regions in sorted(connected.items(), key=lambda item: item[0]):
        tokens = _map_tokens(layout, turn, regions, how)
        counts["map_rows_truncated"] += sum(token is None for token, _ in tokens)
        tokens = [each for each in tokens if each[0] is not None]
        counts["map_rows_left_out"] += len(tokens) - len(spread(tokens, how.most))
        for token, shown in spread(tokens, how.most):
            position = token - (how.rows in _PREDICTORS)
            if position in visual:  # an answer right behind an image
                counts["map_rows_on_image"] += 1
                continue
            own = (layout.table[:, 0] == image) & (layout.visual <= position)
            known = *map(id, shown), int(own.sum())  # rows of an answer see the same tokens
            if known not in targets:
                target = torch.zeros(len(layout.visual))
                target[own] = _target(layout, own, shown, how)
                if how.complement:
                    opposite = (target.max() - target)[own]
                    target[own] = torch.where(_placed(layout)[own], opposite, 0.0)
                target[own] = maps.with_floor(target[own], layout.table[own, 1:], how.floor)
                targets[known] = maps.quantise(target)
            if not targets[known].any():
                counts["map_rows_without_target"] += 1
                continue
            weight = max(map(layout.example.weight_of, shown))
            rows.append((position, token, image, targets[known], weight))
    counts["map_rows"] += len(rows)
    names = ("map_position", "map_token_position", "map_image", "map_target", "map_weight")
    fields = dict(zip(names, zip(*rows)))
    if how.queries and rows:
        fields["query_position"] = [_queries(layout, row[0]) for row in rows]
    return fields


def _queries(layout: Layout, position: int) -> list[int]:
    """The tokens between the last visual token before a row and the row; -1: there are none."""
    before = layout.visual[layout.visual < position].tolist()
    return list(range(before[-1] + 1, position)) if before and before[-1] + 1 < position else [-1]


def _placed(layout: Layout) -> Tensor:
    """bool [C]: the visual tokens with a place of their own."""
    x0, y0, x1, y1 = layout.table[:, 1:].unbind(1)
    return (x1 > x0) & (y1 > y0)


def _outside(layout: Layout, regions: Iterable[int], union: Tensor) -> Tensor:
    """bool [C]: the visual tokens with a place of the regions' images that are not in `union`."""
    places = {layout.example.place(layout.example.regions[index]) for index in regions}
    own = torch.isin(layout.table[:, 0].long(), torch.tensor(sorted(places)))
    return own & _placed(layout) & ~union


def _registers(layout: Layout, union: Tensor) -> Tensor:
    """bool [C]: the visual tokens without a place, of images with one in `union`."""
    images = layout.table[:, 0]
    return torch.isin(images, images[union]) & ~_placed(layout)


def _target(layout: Layout, own: Tensor, shown: list[Region], how: MapTargets) -> Tensor:
    """[n] fp32 over the visual tokens `own` of one image or video; with shares (K8)."""
    if len(shown) > 1 and any(region.share is not None for region in shown):
        each = [_target(layout, own, [region], how) for region in shown]
        shares = [1.0 if region.share is None else region.share for region in shown]
        return maps.mixed(torch.stack(each), shares)
    rects, video = layout.table[own, 1:], shown[0].video
    form = {"kind": how.kind, "levels": how.levels, "sigma": how.sigma}
    if video is None:
        return maps.target_map(rects, **form, **_shapes(shown))
    moments = moments_of(shown, layout.example.videos[video])
    return maps_in_time.target_map(rects, layout.times[own], moments, **form)


def _map_tokens(
    layout: Layout, turn: int, regions: list[Region], how: MapTargets
) -> list[tuple[int | None, list[Region]]]:
    """The tokens of one answer that have a row, and the regions of each; None: cut off."""
    which = _PREDICTORS.get(how.rows, how.rows)
    start, end = layout.chat.turns[turn].pieces[0].at, layout.chat.turns[turn].tail[0]
    whole = layout.positions(start, end)
    if which == "answer":
        return [(position, regions) for position in whole]
    if which == "last":
        return [(layout.last_position(turn), regions)]
    shown: dict[int | None, list[Region]] = {}
    anchors = [p for p in whole if p is not None and layout.ids[p] == how.anchor]
    if which == "anchor" and not anchors:
        where = f"{layout.example.name or 'example'}: messages[{turn}]"
        wanted = "the anchor token in an answer with a region (map_rows 'anchor')"
        require(None in whole, where, wanted, "none")
        return [(None, regions)]
    for region in regions:
        positions = layout.text_positions(region, "regions")
        if which == "anchor":
            positions = [p for p in positions if p is not None and p in anchors] or anchors[-1:]
        for position in positions:
            shown.setdefault(position, []).append(region)
    return sorted(shown.items(), key=lambda item: (item[0] is None, item[0]))


def spread(tokens: list, most: int | None) -> list:
    """So many of a list at most, evenly spread: the middles of as many equal parts."""
    if most is None or len(tokens) <= most:
        return tokens
    return [tokens[(2 * i + 1) * len(tokens) // (2 * most)] for i in range(most)]


def _shapes(regions: list[Region]) -> dict[str, list]:
    return {kind: [shape for r in regions for shape in getattr(r, kind)] for kind in SHAPES}
