"""Intervals and paired tests against closed forms, scipy's own tests and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trainer.metrics.intervals import interval, paired


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


def test_mcnemar_counts_only_samples_that_changed():
    left, right = [1] * 50 + [0] * 10 + [1] * 2, [1] * 50 + [1] * 10 + [0] * 2
    found = paired(left, right)
    assert found.value == pytest.approx(8 / 62)
    assert found.p_value == pytest.approx(stats.binomtest(10, 12).pvalue)
    assert found.p_value < 0.05


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
