"""How sure a figure of held-out samples is: intervals of a mean, and paired tests of two.

A figure is the mean of what its samples count: sample i has a sum s_i of n_i values (of an answer's
tokens, say, how many are right, and how many there are), and the figure is sum(s) / sum(n). Samples
are what is drawn again, never the values within one, which depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.special import ndtr, ndtri

_NUMBERS = 2**20  # drawn at a time, which bounds the memory
_FEW = 6  # samples of a kind from which it is faster to draw how often each kind comes
_ROUNDING = 1e-12

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
    4 right against 0 of 4 have an interval from .31 to 1, and p = .125.
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
    value = float(sums.sum() / counts.sum())
    if (right := _right(sums, counts)) is not None:
        return Interval(value, *_wilson(right, confidence))
    if len(sums) == 1:
        return Interval(value, np.nan, np.nan)
    values = np.stack([sums, counts], 1)
    return Interval(value, *_bootstrap(values, _mean, confidence, resamples, seed))


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

    Where both sides are shares of the kind to which `interval` gives Wilson's, so that the
    bootstrap may draw nothing but what there is (none right against all right), the interval is
    Newcombe's, which is made of the two Wilson ones, and the p-value McNemar's exact test.
    Everything else gets the bootstrap's interval and the p-value of switching the two sides of each
    sample at random.

    Args:
        left, right: [N] float, sums of the same samples in the same order.
        counts, right_counts: [N] each, how many values; None: one each, or those of the left. A
            sample that lacks values on either side is left out.
        confidence, resamples, seed: as for `interval`.

    Raises:
        ValueError: lengths that differ.

    Source: McNemar 1947; Newcombe 1998 (paired data, method 10); Efron 1987 (BCa).
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
    left, n, right, m = (a[both] for a in (left, n, right, m))
    if not both.any():
        return Difference(np.nan, np.nan, np.nan, np.nan)
    values = np.stack([left, n, right, m], 1)
    value = float(_gap(values.sum(0)))
    if len(values) == 1:
        return Difference(value, np.nan, np.nan, 1.0)
    one, two = _right(left, n), _right(right, m)
    if one is not None and two is not None:
        return Difference(value, *_newcombe(one, two, confidence), _mcnemar(one, two))
    low, high = _bootstrap(values, _gap, confidence, resamples, seed)
    return Difference(value, low, high, _switched(values, resamples, seed))


def _mean(totals: NDArray) -> NDArray:
    """Of totals [..., 2] of sums and counts."""
    return totals[..., 0] / totals[..., 1]


def _gap(totals: NDArray) -> NDArray:
    """Right minus left of totals [..., 4] of the left's sums and counts, and the right's."""
    return _mean(totals[..., 2:]) - _mean(totals[..., :2])


def _right(sums: NDArray, counts: NDArray) -> NDArray | None:
    """Whether each sample is right, 0 or 1, if nothing else is between: one value of 0 or 1 each,
    or several that are all 0 or all 1."""
    if (counts == 1).all() and np.isin(sums, (0.0, 1.0)).all():
        return sums
    if not sums.any():
        return np.zeros_like(sums)
    return np.ones_like(sums) if np.array_equal(sums, counts) else None


def _wilson(right: NDArray, confidence: float) -> tuple[float, float]:
    test = stats.binomtest(int(right.sum()), len(right))
    low, high = test.proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def _newcombe(left: NDArray, right: NDArray, confidence: float) -> tuple[float, float]:
    """The interval of the difference of two shares of the same samples, 0 or 1 each."""
    p, q, size = right.mean(), left.mean(), len(left)
    (p_low, p_high), (q_low, q_high) = _wilson(right, confidence), _wilson(left, confidence)
    both, either = (right * left).sum(), (right + left > 0).sum()
    agree = both * (size - either) - (right.sum() - both) * (left.sum() - both)
    agree = agree if agree < 0 else max(0.0, agree - size / 2)  # correction for continuity
    spread = size**2 * np.sqrt(p * (1 - p) * q * (1 - q))
    phi = agree / spread if spread > 0 else 0.0
    below, above = _apart(p - p_low, q_high - q, phi), _apart(p_high - p, q - q_low, phi)
    return float(p - q - below), float(p - q + above)


def _apart(first: float, second: float, phi: float) -> float:
    return np.sqrt(max(0.0, first**2 - 2 * phi * first * second + second**2))


def _mcnemar(left: NDArray, right: NDArray) -> float:
    better, worse = int((right > left).sum()), int((right < left).sum())
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _switched(values: NDArray, resamples: int, seed: int) -> float:
    """The p-value of switching the sides of samples [N, 4] at random."""
    left, right = values[:, :2], values[:, 2:]
    if np.array_equal(left, right):
        return 1.0
    random, size = np.random.default_rng(seed), len(values)
    total, change = values.sum(0), np.concatenate([right - left, left - right], 1)
    wanted, found = abs(_gap(total)), 0
    step = max(1, _NUMBERS // size)
    for start in range(0, resamples, step):
        rows, columns = min(step, resamples - start), -(-size // 8)
        bits = np.frombuffer(random.bytes(rows * columns), np.uint8).reshape(rows, columns)
        switch = np.unpackbits(bits, axis=1, count=size)  # [rows, N]
        drawn = np.abs(_gap(total + switch.astype(float) @ change))
        found += int((drawn >= wanted - _ROUNDING).sum())
    return (found + 1) / (resamples + 1)


def _bootstrap(
    values: NDArray,
    statistic: Callable[[NDArray], NDArray],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """The bias-corrected and accelerated interval of a statistic of the totals of values [N, k];
    the percentiles where the correction is not finite."""
    drawn = statistic(_drawn_totals(values, resamples, np.random.default_rng(seed)))
    total = values.sum(0)
    value, without_one = statistic(total), statistic(total - values)
    levels = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    lower, upper = (drawn < value - _ROUNDING).mean(), (drawn <= value + _ROUNDING).mean()
    with np.errstate(all="ignore"):
        bias = ndtri((lower + upper) / 2)
        apart = without_one.mean() - without_one
        skew = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
        moved = bias + ndtri(levels)
        corrected = ndtr(bias + moved / (1 - skew * moved))
    low, high = np.quantile(drawn, corrected if np.isfinite(corrected).all() else levels)
    return float(low), float(high)


def _drawn_totals(values: NDArray, resamples: int, random: np.random.Generator) -> NDArray:
    """[resamples, k]: the totals of as many samples as there are, drawn with replacement.

    How often each sample comes is counted, and a matrix product with `values` [N, k] adds them up.
    Where few differ, that is drawn for each kind of them at once.
    """
    size = len(values)
    kinds, times = np.unique(values, axis=0, return_counts=True)
    few = _FEW * len(kinds) <= size
    rows = kinds if few else values
    step = max(1, _NUMBERS // len(rows))
    totals = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, step):
        draws = min(step, resamples - start)
        if few:
            often = random.multinomial(size, times / size, size=draws)  # [draws, kinds]
        else:
            which = random.integers(0, size, (draws, size))
            which += size * np.arange(draws)[:, None]
            often = np.bincount(which.ravel(), minlength=draws * size).reshape(draws, size)
        totals[start : start + draws] = often.astype(float) @ rows
    return totals


def _counted(sums: ArrayLike, counts: ArrayLike | None) -> tuple[NDArray, NDArray]:
    sums = np.asarray(sums, float)
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, float)
    if sums.shape != counts.shape:
        raise ValueError(f"`counts`: expected {len(sums)} as `sums`, got {len(counts)}")
    return sums[counts > 0], counts[counts > 0]
