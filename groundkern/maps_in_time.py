"""Target maps of videos: which visual tokens shapes fall on that are there at some times.

A visual token is a rectangle of the frame (`maps`) and the seconds from which and up to which it
shows the video. Tokens of the same seconds are a step; steps do not overlap. A shape of a moment
counts for the step that the moment is in.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundkern import maps


class Moment(NamedTuple):
    """What a target is at one time.

    Args:
        time: seconds.
        shapes: by name the shapes that `maps.inside` takes: boxes, points, polygons, polylines and
            rasters.
    """

    time: float
    shapes: Mapping[str, Sequence[Any]]


def inside(rects: Tensor, times: Tensor, moments: Sequence[Moment], *, grow: float = 0.0) -> Tensor:
    """Which tokens the shapes of any moment cover.

    Args:
        rects: [n, 4] float (x0, y0, x1, y1).
        times: [n, 2] float seconds, the second exclusive.
        moments: what is where and when.
        grow: as in `maps.inside`; nothing grows in time.

    Returns:
        [n] bool, as `maps.inside` says of each step.
    """
    covered = torch.zeros(len(rects), dtype=torch.bool)
    for own, shapes in _steps(times, moments):
        if shapes:
            covered[own] = maps.inside(rects[own], **shapes, grow=grow)
    return covered


def target_map(
    rects: Tensor,
    times: Tensor,
    moments: Sequence[Moment],
    *,
    kind: str = "neighbours",
    levels: tuple[float, float, float] = (1.0, 0.5, 1e-3),
    sigma: float = 0.8,
) -> Tensor:
    """The distribution over visual tokens of a map that looks at the shapes when they are there.

    Args:
        rects: [n, 4] float, one rectangle per visual token. Tokens without a place get 0.
        times: [n, 2] float seconds, the second exclusive.
        moments: what is where and when.
        kind: as in `maps.target_map`, of each step. "neighbours": the tokens at the same place one
            step before and behind those on the target count as neighbours too.
        levels: the triple (a, b, c) of `maps.target_map`.
        sigma: of "centre", as there.

    Returns:
        [n] fp32, sums to 1; all zero if the shapes fall on no token.

    Raises:
        ValueError: see `maps.target_map`.

    Source: P of KLAL's (K3), in space and time.
    """
    placed = (rects[:, 2] > rects[:, 0]) & (rects[:, 3] > rects[:, 1])
    values = torch.zeros(len(rects), dtype=torch.float64)
    on_target, is_there = torch.zeros(2, len(rects), dtype=torch.bool)
    steps, spreads = _steps(times, moments), kind in ("neighbours", "uniform")
    for own, shapes in steps:
        if shapes:
            how: dict[str, Any] = {"kind": kind, "levels": levels, "sigma": sigma}
            values[own] = maps.target_values(rects[own], **how, **shapes)
            is_there[own] = bool((values[own] > 0).any())
            if spreads:
                on_target[own] = maps.inside(rects[own], **_sets(shapes))
    if bool(on_target.any()):
        values[placed & ~is_there] = levels[2]
    if kind == "neighbours":
        for (own, shapes), (other, _) in (*pairwise(steps), *pairwise(steps[::-1])):
            if shapes and torch.equal(rects[own], rects[other]):
                beside = other[on_target[own]]
                values[beside] = values[beside].clamp_min(levels[1])
    return (values / values.sum().clamp_min(1e-300)).float()


def _sets(shapes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The shapes but heats and bells, which are the target themselves and have no neighbours."""
    found = {n: [x for x in each if not getattr(x, "heat", False)] for n, each in shapes.items()}
    found.pop("bells", None)
    return found


def _steps(times: Tensor, moments: Sequence[Moment]) -> list[tuple[Tensor, dict[str, Any]]]:
    """The tokens of each step, and the shapes of all its moments; none: nothing is there."""
    shown = times[:, 1] > times[:, 0]
    tokens = shown.nonzero()[:, 0]
    # a step's start names it: rows (unique of dim=0) take 70 times as long to tell apart
    starts, number = times[shown, 0].unique(return_inverse=True)
    stops = torch.empty_like(starts)
    stops[number] = times[shown, 1]
    begins, ends = starts.tolist(), stops.tolist()
    held: list[dict[int, Mapping[str, Sequence[Any]]]] = [{} for _ in begins]
    for moment in moments:
        step = bisect_right(begins, moment.time) - 1
        if step >= 0 and moment.time < ends[step]:
            held[step][id(moment.shapes)] = moment.shapes  # frames of a region share them: once
    own = tokens[number.argsort(stable=True)].split(number.bincount().tolist())
    steps = []
    for there, sets in zip(own, held, strict=True):
        names = dict.fromkeys(name for shapes in sets.values() for name in shapes)
        union = {n: [x for shapes in sets.values() for x in shapes.get(n, ())] for n in names}
        steps.append((there, union))
    return steps
