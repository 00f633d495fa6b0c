"""How sure a figure of held-out samples is: intervals of a mean, and paired tests of two.

A figure is the mean of what its samples count: sample i has a sum s_i of n_i values (of an answer's
tokens, say, how many are right, and how many there are), and the figure is sum(s) / sum(n). Samples
are what is drawn again, never the values within one, which depend on each other.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import DegenerateDataWarning

_JACKKNIFE = 2000  # samples up to which the bootstrap is corrected for bias and skew (BCa)
_NUMBERS = 2**24  # drawn at a time


CHANCE, ENOUGH = 0.05, 20  # a p value below, and samples from which, a difference is told as one


class Interval(NamedTuple):
    """A figure and its interval; NaN bounds: a single sample, or none, tells nothing."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Right minus left on the same samples, its interval, and how likely so much is by chance."""

    value: float
    low: float
    high: float
    p_value: float


def beyond_chance(difference: Difference, samples: int) -> bool:
    """Whether a difference may be shown as better or worse.

    It takes `ENOUGH` samples, p < `CHANCE` and an interval without 0. One alone is too little: 4 of
    4 right against 0 of 4 have an interval from 1 to 1, and p = .125.
    """
    apart = difference.low > 0 or difference.high < 0
    return apart and difference.p_value < CHANCE and samples >= ENOUGH


def interval(
    sums: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over samples with its confidence interval.

    Shares of right and wrong samples (one value of 0 or 1 each) get Wilson's interval, which is
    honest about 0 of 4, and so do shares of several values a sample that are all 0 or all 1, from
    which the bootstrap would draw nothing else; everything else gets the bootstrap's.

    Args:
        sums: [N] float, the sum of each sample's values.
        counts: [N], how many values that is; samples without one are left out. None: one each.
        confidence: of the interval.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: lengths that differ.

    Source: Wilson 1927; Efron 1987 (BCa).
    """
    sums, counts = _counted(sums, counts)
    if not len(sums):
        return Interval(np.nan, np.nan, np.nan)
    value = float(_ratio(sums, counts))
    if _binary(sums, counts) or not sums.any() or np.array_equal(sums, counts):
        right = round(value * len(sums))  # samples, however many values one has
        test = stats.binomtest(right, len(sums))
        return Interval(value, *map(float, test.proportion_ci(confidence, method="wilson")))
    if len(sums) == 1:
        return Interval(value, np.nan, np.nan)
    return Interval(value, *_bootstrap((sums, counts), _ratio, confidence, resamples, seed))


def paired(
    left: ArrayLike,
    right: ArrayLike,
    counts: ArrayLike | None = None,
    right_counts: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """How much better `right` is than `left` on the same samples.

    The p-value is McNemar's exact test for samples that are right or wrong, and else that of
    switching the two sides of each sample at random.

    Args:
        left, right: [N] float, sums of the same samples in the same order.
        counts, right_counts: [N] each, how many values; None: one each, or those of the left. A
            sample that lacks values on either side is left out.
        confidence, resamples, seed: as for `interval`.

    Raises:
        ValueError: lengths that differ.

    Source: McNemar 1947; Efron 1987 (BCa).
    """
    left, right = np.asarray(left, float), np.asarray(right, float)
    n = np.ones_like(left) if counts is None else np.asarray(counts, float)
    m = n if right_counts is None else np.asarray(right_counts, float)
    if not left.shape == right.shape == n.shape == m.shape:
        raise ValueError(
            "`paired`: expected sums and counts of the same samples, got "
            + ", ".join(str(len(a)) for a in (left, right, n, m))
        )
    both = (n > 0) & (m > 0)
    sides = tuple(a[both] for a in (left, n, right, m))
    if not both.any():
        return Difference(np.nan, np.nan, np.nan, np.nan)
    value = float(_gap(*sides))
    if both.sum() == 1:
        return Difference(value, np.nan, np.nan, 1.0)
    low, high = _bootstrap(sides, _gap, confidence, resamples, seed)
    return Difference(value, low, high, _p_value(sides, resamples, seed))


def _p_value(sides: tuple[NDArray, ...], resamples: int, seed: int) -> float:
    left, n, right, m = sides
    if np.array_equal(left, right) and np.array_equal(n, m):
        return 1.0
    if _binary(left, n) and _binary(right, m):
        better, worse = int((right > left).sum()), int((right < left).sum())
        return float(stats.binomtest(better, better + worse).pvalue)
    random = np.random.default_rng(seed)
    wanted, found = abs(_gap(*sides)), 0
    step = max(1, _NUMBERS // len(left))
    for start in range(0, resamples, step):
        switch = random.random((min(step, resamples - start), len(left))) < 0.5
        drawn = [np.where(switch, b, a) for a, b in ((left, right), (n, m), (right, left), (m, n))]
        found += int((np.abs(_gap(*drawn)) >= wanted - 1e-12).sum())
    return (found + 1) / (resamples + 1)


def _bootstrap(samples, statistic, confidence, resamples, seed) -> tuple[float, float]:
    size = len(samples[0])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # BCa is then not taken
        drawn = stats.bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _NUMBERS // size),
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        if size <= _JACKKNIFE and drawn.standard_error > 0:
            corrected = stats.bootstrap(
                samples,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=0,
                bootstrap_result=drawn,
                confidence_level=confidence,
                method="BCa",
            )
            if np.isfinite(corrected.confidence_interval).all():
                drawn = corrected
    return tuple(map(float, drawn.confidence_interval))


def _ratio(sums: NDArray, counts: NDArray, axis: int = -1) -> NDArray:
    return sums.sum(axis) / counts.sum(axis)


def _gap(left: NDArray, n: NDArray, right: NDArray, m: NDArray, axis: int = -1) -> NDArray:
    return _ratio(right, m, axis) - _ratio(left, n, axis)


def _binary(sums: NDArray, counts: NDArray) -> bool:
    return bool((counts == 1).all() and np.isin(sums, (0.0, 1.0)).all())


def _counted(sums: ArrayLike, counts: ArrayLike | None) -> tuple[NDArray, NDArray]:
    sums = np.asarray(sums, float)
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, float)
    if sums.shape != counts.shape:
        raise ValueError(f"`counts`: expected {len(sums)} as `sums`, got {len(counts)}")
    return sums[counts > 0], counts[counts > 0]
