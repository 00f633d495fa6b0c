"""From curves to figures: accuracy at equal steps, steps to an accuracy, intervals over seeds.

Seeds are what is drawn again. A seed that does not reach an accuracy within the study's steps is
censored: it counts with all of those steps, so that the mean is the restricted mean, a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from groundkern.trainer.evidence.curves import Curves
from groundkern.trainer.evidence.plan import LEVELS
from groundkern.trainer.metrics.intervals import Difference, Interval, interval, paired

Points = Sequence[dict[str, float]]


class Reached(NamedTuple):
    """Steps to an accuracy: the restricted mean over seeds, and how many seeds got there."""

    steps: Interval
    seeds: int
    of: int


class Row(NamedTuple):
    """The figures of a method.

    Args:
        method: its name.
        seeds: how many curves.
        halfway, final: answers right after half of the steps and after all of them.
        reached: one for each of `LEVELS`.
        gain: final, this method minus plain, on the seeds that both have; None for plain itself.
        sooner: steps to the first of `LEVELS`, plain minus this method; None for plain itself.
        at_end: means of where the trained models look, by name.
    """

    method: str
    seeds: int
    halfway: Interval
    final: Interval
    reached: tuple[Reached, ...]
    gain: Difference | None
    sooner: Difference | None
    at_end: dict[str, float]


def accuracy_at(points: Points, step: int) -> float:
    """Of the last point up to a step; a curve that ended early, saturated, stays where it was."""
    return [point["accuracy"] for point in points if point["step"] <= step][-1]


def steps_to(points: Points, level: float, limit: int) -> int | None:
    """The first step, up to the limit, at which the accuracy was `level` or more; None: never."""
    found = (p["step"] for p in points if p["accuracy"] >= level and p["step"] <= limit)
    return next(found, None)


def reached(curves: Sequence[Points], level: float, limit: int) -> Reached:
    """The restricted mean of the steps to an accuracy."""
    steps = [steps_to(points, level, limit) for points in curves]
    known = [step for step in steps if step is not None]
    counted = [limit if step is None else step for step in steps]
    return Reached(interval(counted), len(known), len(steps))


def table(curves: Curves, limit: int, methods: Sequence[str]) -> list[Row]:
    """A row for each method that has a curve."""
    return [_row(curves, name, limit) for name in methods if curves.get(name)]


def _row(curves: Curves, method: str, limit: int) -> Row:
    own, plain = curves[method], curves.get("plain", {})
    points = [curve["points"] for curve in own.values()]
    both = sorted(own.keys() & plain.keys()) if method != "plain" else []
    sides = [[side[seed]["points"] for seed in both] for side in (plain, own)]
    gain = sooner = None
    if both:
        gain = over_seeds(*([accuracy_at(p, limit) for p in side] for side in sides))
        before, now = ([steps_to(p, LEVELS[0], limit) or limit for p in side] for side in sides)
        sooner = over_seeds(now, before)
    names = dict.fromkeys(name for curve in own.values() for name in curve["at_end"])
    return Row(
        method,
        len(own),
        interval([accuracy_at(p, limit // 2) for p in points]),
        interval([accuracy_at(p, limit) for p in points]),
        tuple(reached(points, level, limit) for level in LEVELS),
        gain,
        sooner,
        {name: _mean([c["at_end"][name] for c in own.values()]) for name in names},
    )


def over_seeds(left: Sequence[float], right: Sequence[float]) -> Difference:
    """Right minus left of the same seeds; the p-value is exact: every switch of their sides."""
    apart = [b - a for a, b in zip(left, right, strict=True)]
    switched = [
        abs(sum(sign * x for sign, x in zip(signs, apart, strict=True)))
        for signs in product((1, -1), repeat=len(apart))
    ]
    as_far = sum(value >= abs(sum(apart)) - 1e-12 for value in switched)
    return paired(left, right)._replace(p_value=as_far / len(switched))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
