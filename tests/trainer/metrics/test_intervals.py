"""Intervals and paired tests against closed forms, scipy's own tests and simulation."""

from __future__ import annotations

import tracemalloc
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from groundkern.trainer.metrics import intervals
from groundkern.trainer.metrics.intervals import beyond_chance, interval, paired


def test_shares_get_wilson_s_interval_which_is_wide_at_0_of_4():
    low, high = stats.binomtest(0, 4).proportion_ci(method="wilson")
    assert interval([0, 0, 0, 0]) == pytest.approx((0.0, low, high))
    assert high > 0.4


def test_shares_of_several_values_that_are_all_0_or_all_1_are_as_wide_as_their_samples():
    counts = [2, 3, 2, 4]
    assert interval([0, 0, 0, 0], counts) == interval([0, 0, 0, 0])
    assert interval(counts, counts) == interval([1, 1, 1, 1])
    assert interval([0, 1, 0, 0], counts).high < 1  # anything between is the bootstrap's


def test_a_quarter_against_none_of_four_samples_is_no_difference():
    found = paired([0, 0, 0, 0], [0, 1, 0, 0])
    assert found.value == 0.25
    assert found.low <= 0
    assert found.p_value == 1.0


@pytest.mark.parametrize(
    ("both", "better", "worse", "neither", "low", "high"),
    [
        (36, 12, 2, 0, 0.0569, 0.3404),  # Newcombe 1998, table of examples, method 10
        (18, 12, 2, 18, 0.0562, 0.3290),
        (14, 5, 0, 22, 0.011, 0.226),  # Altman et al., Statistics with Confidence, table 6.2
        (54, 0, 0, 0, -0.0664, 0.0664),
    ],
)
def test_right_and_wrong_on_both_sides_get_newcombe_s_interval(
    both, better, worse, neither, low, high
):
    parts = ((1, 1, both), (0, 1, better), (1, 0, worse), (0, 0, neither))
    left, right = (
        np.repeat([part[side] for part in parts], [n for *_, n in parts]) for side in (0, 1)
    )
    found = paired(left, right)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)
    other = paired(right, left)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low))


def test_none_against_all_is_as_wide_as_the_samples_are_few():
    """The bootstrap draws nothing but 1, from 4 samples as from 4,000."""
    few, many = (paired([0] * n, [1] * n) for n in (4, 4000))
    end = 1 - interval([0] * 4).high
    assert few == pytest.approx((1, 1 - np.sqrt(2) * (1 - end), 1, 0.125))
    assert many.low > 0.99
    assert not beyond_chance(few, 4)
    assert beyond_chance(many, 4000)
    # of several values a sample, it is the samples that count
    assert paired([0] * 4, [2, 3, 2, 4], [2, 3, 2, 4]) == pytest.approx(few)
    assert paired([0] * 4, [1] * 4, [3] * 4, [1] * 4) == pytest.approx(few)


def test_the_same_on_both_sides_may_still_differ():
    none = paired([0] * 4, [0] * 4)
    assert none == pytest.approx((0, -interval([0] * 4).high, interval([0] * 4).high, 1))
    half = paired([0, 1] * 20, [0, 1] * 20)
    assert -0.1 < half.low < 0 < half.high < 0.1
    assert half.p_value == 1


def test_intervals_of_differences_of_shares_cover_the_truth():
    random = np.random.default_rng(7)
    inside = 0
    for _ in range(300):
        left = random.random(25) < 0.9
        right = np.where(random.random(25) < 0.2, ~left, left)  # .74 on average
        found = paired(left, right)
        inside += found.low <= -0.16 <= found.high
    assert 0.91 <= inside / 300 <= 1


def test_mcnemar_counts_only_samples_that_changed():
    left, right = [1] * 50 + [0] * 10 + [1] * 2, [1] * 50 + [1] * 10 + [0] * 2
    found = paired(left, right)
    assert found.value == pytest.approx(8 / 62)
    assert found.p_value == pytest.approx(stats.binomtest(10, 12).pvalue)
    assert found.p_value < 0.05


@pytest.mark.parametrize("size", [12, 500])
def test_the_bootstrap_is_scipy_s_of_the_same_draws(size):
    """BCa: bias by how many draws are lower, acceleration by leaving out each sample."""
    random = np.random.default_rng(5)
    counts = random.integers(1, 5, size)
    sums = counts * random.exponential(size=size)
    draws = intervals._drawn_totals(np.stack([sums, counts], 1), 2000, np.random.default_rng(0))
    expected = stats.bootstrap(
        (sums, counts),
        lambda s, n, axis=-1: s.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=draws[:, 0] / draws[:, 1]),
        method="BCa",
    ).confidence_interval
    assert interval(sums, counts)[1:] == pytest.approx(tuple(expected))


@pytest.mark.parametrize("kinds", [3, 400])
def test_draws_are_of_as_many_samples_with_replacement(kinds):
    """By kinds of samples and one by one: each drawn total has the moments of a sum of draws."""
    values = np.random.default_rng(6).random(kinds)[np.arange(400) % kinds]
    both = np.stack([values, np.ones(400)], 1)
    totals, count = intervals._drawn_totals(both, 4000, np.random.default_rng(0)).T
    assert (count == 400).all()
    spread = values.std() * 20  # of a total of 400
    assert totals.mean() == pytest.approx(values.sum(), abs=4 * spread / np.sqrt(4000))
    assert totals.std() == pytest.approx(spread, rel=0.05)
    assert stats.kstest((totals - values.sum()) / spread, "norm").pvalue > 1e-3


def test_the_memory_of_draws_is_bounded_and_their_parts_do_not_matter(monkeypatch):
    random = np.random.default_rng(8)
    left, right = random.random((2, 1000))
    whole = paired(left, right)
    monkeypatch.setattr(intervals, "_NUMBERS", 4096)
    assert paired(left, right)[:3] == pytest.approx(whole[:3])
    tracemalloc.start()
    paired(left, right)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # 2,000 draws of 1,000 are 16 MB
    tracemalloc.stop()


def test_switching_sides_is_as_exact_as_counting_all_switches():
    left, right = np.array([1.0, 2, 3, 4, 5]), np.array([1.5, 2.1, 3.4, 3.8, 6.1])
    signs = np.array(list(product((-1, 1), repeat=5)))
    exact = (np.abs(signs @ (right - left)) >= (right - left).sum() - 1e-9).mean()
    assert paired(left, right, resamples=20_000).p_value == pytest.approx(exact, abs=0.01)


def test_intervals_of_skewed_means_cover_the_truth():
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        found = interval(random.exponential(size=40), resamples=400, seed=seed)
        inside += found.low <= 1 <= found.high
    assert 0.88 <= inside / 200 <= 0.99  # 0.95 within what 200 draws vary


def test_samples_are_drawn_again_and_not_the_values_within_them():
    # 20 samples of 50 values that are all the same: as uncertain as 20 values, not as 1,000
    random = np.random.default_rng(1)
    level = random.normal(size=20)
    whole = interval(50 * level, np.full(20, 50))
    assert whole == pytest.approx(interval(level))


def test_a_ratio_counts_values_and_leaves_out_samples_without_any():
    found = interval([3, 0, 1], [4, 0, 4])
    assert found.value == pytest.approx(0.5)
    assert found == pytest.approx(interval([3, 1], [4, 4]))


def test_pairs_see_a_difference_that_separate_samples_hide():
    random = np.random.default_rng(2)
    left = random.normal(size=100)
    right = left + 0.1 + 0.1 * random.normal(size=100)
    found = paired(left, right)
    assert found.low < 0.1 < found.high
    assert found.high - found.low < 0.1
    assert found.p_value < 0.01
    assert paired(left, random.permutation(right)).p_value > 0.05


def test_chance_gives_small_p_values_as_often_as_they_say():
    random = np.random.default_rng(3)
    small = sum(
        paired(random.normal(size=20), random.normal(size=20), resamples=200).p_value <= 0.1
        for _ in range(200)
    )
    assert 5 <= small <= 36  # 20 expected


def test_one_sample_and_none_have_no_interval():
    assert interval([2.5])[0] == 2.5
    assert np.isnan(interval([2.5])[1:]).all()
    assert np.isnan(interval([])).all()
    assert np.isnan(interval([0.0], [0])).all()
    assert np.isnan(paired([], [])).all()
    assert paired([1.5], [2.0]).p_value == 1.0


def test_the_same_call_gives_the_same_interval():
    values = np.random.default_rng(4).random(30)
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="`counts`: expected 3"):
        interval([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="`paired`: expected sums and counts of the same samples"):
        paired([1, 2, 3], [1, 2])
