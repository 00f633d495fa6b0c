"""Metrics against definitions written as loops, ties and undefined rows included."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import groundkern
from groundkern.maps import patch_grid
from groundkern.metrics import (
    argmax_in_target,
    attention_ratio,
    attention_reward,
    high_entropy,
    label_hits,
    map_point,
    mass_on_target,
    peak_in_mask,
    roc_auc,
)
from groundkern.targets.touching import hanging_together

# few distinct scores, so that ties are the rule
COLUMNS = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=12)


def _row(columns):
    scores = torch.tensor([float(c[0]) for c in columns]).reshape(1, -1)
    target = torch.tensor([c[1] for c in columns], dtype=torch.bool).reshape(1, -1)
    valid = torch.tensor([c[2] for c in columns], dtype=torch.bool).reshape(1, -1)
    return scores, target, valid


def _same(got, wanted):
    return math.isnan(got) if math.isnan(wanted) else got == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(COLUMNS)
def test_roc_auc_is_the_share_of_pairs_won(columns):
    inside = [s for s, t, v in columns if t and v]
    outside = [s for s, t, v in columns if not t and v]
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    wanted = wins / (len(inside) * len(outside)) if inside and outside else math.nan
    assert _same(roc_auc(*_row(columns)).item(), wanted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(COLUMNS)
def test_the_other_metrics_are_their_definitions(columns):
    scores = [s for s, _, v in columns if v]
    inside = [s for s, t, v in columns if t and v]
    peak = ratio = mass = math.nan
    if inside:
        peak = inside.count(max(scores)) / scores.count(max(scores))
        if sum(scores):
            ratio = (sum(inside) / len(inside)) / (sum(scores) / len(scores))
            mass = sum(inside) / sum(scores)
    row = _row(columns)
    assert _same(peak_in_mask(*row).item(), peak)
    assert _same(attention_ratio(*row).item(), ratio)
    assert _same(mass_on_target(*row).item(), mass)


def test_rows_are_independent_and_all_columns_count_without_valid():
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6]])
    target = torch.tensor([[False, True, False], [False, True, True], [False, False, False]])
    nan = math.nan
    for metric, wanted in (
        (peak_in_mask, [1.0, 0.0, nan]),
        (roc_auc, [1.0, 0.0, nan]),
        (attention_ratio, [1.8, 0.75, nan]),
        (mass_on_target, [0.6, 0.5, nan]),
    ):
        torch.testing.assert_close(
            metric(scores, target), torch.tensor(wanted), equal_nan=True, msg=metric.__name__
        )
    assert argmax_in_target(scores, target)[0].item() == 1.0


def test_a_constant_map_has_no_luck():
    target = torch.tensor([[True, False, False, False]])
    flat = torch.zeros(1, 4)
    assert peak_in_mask(flat, target).item() == 0.25
    assert roc_auc(flat, target).item() == 0.5
    assert mass_on_target(flat, target).isnan().item()


def test_columns_that_are_not_valid_may_hold_anything():
    scores = torch.tensor([[0.2, 0.8, math.nan, math.inf]])
    target = torch.tensor([[True, False, True, True]])
    valid = torch.tensor([[True, True, False, False]])
    assert peak_in_mask(scores, target, valid).item() == 0.0
    assert roc_auc(scores, target, valid).item() == 0.0
    assert attention_ratio(scores, target, valid).item() == pytest.approx(0.4)
    assert mass_on_target(scores, target, valid).item() == pytest.approx(0.2)
    scores = torch.tensor([[math.inf, 0.0, 5.0]])
    target = torch.tensor([[True, False, False]])
    valid = torch.tensor([[True, True, False]])
    assert roc_auc(scores, target, valid).item() == 1.0


def test_negative_and_infinite_scores_rank():
    scores = torch.tensor([[-5.0, math.inf, -math.inf, 0.0]])  # contributions may be negative
    target = torch.tensor([[True, True, False, False]])
    assert roc_auc(scores, target).item() == 0.75
    assert peak_in_mask(scores, target).item() == 1.0


def test_roc_auc_is_exact_on_a_long_row():
    scores = torch.arange(20_000).float()[None]
    target = torch.zeros(1, 20_000, dtype=torch.bool)
    target[0, ::2] = True  # 10^8 pairs: beyond fp32's integers
    wins = sum(range(10_000))
    assert roc_auc(scores, target).item() == pytest.approx(wins / 10_000**2, abs=1e-7)


@pytest.mark.parametrize("metric", [peak_in_mask, roc_auc, attention_ratio, mass_on_target])
def test_bad_input_and_no_rows(metric):
    assert metric(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)
    none = metric(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool))
    assert none.isnan().tolist() == [True, True]
    with pytest.raises(TypeError, match="`target`: expected a bool tensor"):
        metric(torch.zeros(1, 3), torch.zeros(1, 3))
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`valid`: expected shape \[1, 3\]"):
        metric(torch.zeros(1, 3), mask, mask[:, :2])


def test_hits_of_labels_are_counts_of_top_k_accuracy() -> None:
    weight, hidden = torch.randn(50, 8), torch.randn(3, 40, 8)
    target = torch.randint(50, (3, 40))
    target[1, ::3] = -100
    result = groundkern.linear_cross_entropy(hidden, weight, target, top_k=7)
    ranks = (hidden @ weight.T).argsort(-1, descending=True)
    counted = target != -100
    place = (ranks == target[..., None]).int().argmax(-1)[counted]
    expected = torch.stack([(place < k).sum() for k in range(1, 8)])
    assert torch.equal(label_hits(result.top_ids, target), expected)
    first = label_hits(result.predicted[..., None], target)
    assert torch.equal(first, expected[:1])
    assert label_hits(torch.zeros(0, 2, dtype=torch.int64), target[:0, 0]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="`target`: expected top_ids' shape"):
        label_hits(result.top_ids, target[0])


def test_a_map_points_at_the_middle_of_the_region_around_its_peak():
    rects = patch_grid(3, 4) * torch.tensor([4.0, 3.0, 4.0, 3.0])  # tokens of 1 x 1
    scores = torch.tensor([0.8, 1.0, 0.1, 0.9, 0.0, 0.4, 0.1, 0.0, 0.31, 0.0, 0.0, 0.0])
    # above .3: tokens 0 (.5, .5), 1 (1.5, .5), 5 (1.5, 1.5) hang together; 3 and 8, which 5 only
    # touches at a corner, do not. (.8 * .5 + 1.0 * 1.5 + .4 * 1.5) / 2.2 = 2.5 / 2.2 and
    # (.8 * .5 + 1.0 * .5 + .4 * 1.5) / 2.2 = 1.5 / 2.2.
    point = map_point(scores, rects)
    torch.testing.assert_close(point, torch.tensor([2.5, 1.5], dtype=torch.float64) / 2.2)
    alone = map_point(scores, rects, share=0.95)
    assert alone.tolist() == [1.5, 0.5]
    one = map_point(scores[:1], rects[:1])
    assert one.tolist() == [0.5, 0.5]


def test_a_map_points_at_places_alone():
    rects = torch.tensor([[0.0, 0, 1, 1], [-1, -1, -1, -1], [0.5, 0.5, 1.0, 1.0]])
    point = map_point(torch.tensor([1.0, 9.0, 1.0]), rects)  # of two views, one inside the other
    assert point.tolist() == [0.625, 0.625]
    assert map_point(torch.zeros(3), rects).isnan().all()
    assert map_point(torch.zeros(0), rects[:0]).isnan().all()
    even = map_point(torch.ones(12 * 10), patch_grid(12, 10))
    torch.testing.assert_close(even, torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="`rects`"):
        map_point(torch.ones(3), rects[:2])
    with pytest.raises(ValueError, match="`share`"):
        map_point(torch.ones(3), rects, share=1.0)


def _reached(rects, first):
    """The same by comparing all pairs, step by step."""
    size = rects[:, 2:] - rects[:, :2]
    slack = 0.01 * torch.minimum(size[:, None], size)
    low = torch.maximum(rects[:, None, :2], rects[:, :2])
    common = torch.minimum(rects[:, None, 2:], rects[:, 2:]) - low
    beside = (common > -slack).all(-1) & (common > slack).any(-1)
    found = torch.zeros(len(rects), dtype=torch.bool)
    found[first] = True
    while not torch.equal(grown := found | beside[found].any(0), found):
        found = grown
    return found


def test_what_hangs_together_is_what_comparing_all_pairs_finds():
    """Grids, pyramids, a token as large as the image, other units, and rectangles anywhere."""
    some = 0
    for n in range(60):
        rects = patch_grid(1 + n % 11, 1 + n % 7)
        if n % 3 == 0:
            rects = torch.cat([rects, patch_grid(1 + n % 4, 1 + n % 2)])
        if n % 5 == 0:
            rects = rects * torch.tensor([640.0, 480.0, 640.0, 480.0]) - 17.0
        if n % 4 == 0:
            low = torch.rand(50, 2, dtype=torch.float64)
            rects = torch.cat([low, low + 1e-3 + 0.1 * torch.rand_like(low)], 1)
        rects = rects[torch.randperm(len(rects))[: 1 + int(0.7 * len(rects))]]
        first = n % len(rects)
        wanted = _reached(rects, first)
        assert torch.equal(hanging_together(rects, first), wanted)
        some += 1 < int(wanted.sum()) < len(rects)
    assert some > 20, "most of these hang together in part"


def test_a_long_way_takes_few_rounds():
    """A line of 4000 tokens, and 6000 tokens of a clip: seconds, if it were step by step."""
    start = time.process_time()
    assert bool(hanging_together(patch_grid(1, 4000), 0).all())
    grid = patch_grid(75, 80)
    point = map_point(torch.ones(6000), torch.cat([grid, patch_grid(1, 1)])[:6000])
    torch.testing.assert_close(point, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert time.process_time() - start < 5.0


def test_attention_reward_by_hand():
    """a = 3 v: (9 - 1) / (9 + 1); a = v: 0; nothing on the evidence: -1; no evidence, no row: 0."""
    inside = torch.tensor([[True, False, False, False]] * 3 + [[False] * 4] * 2)
    valid = torch.ones(5, 4, dtype=torch.bool)
    maps = torch.tensor(
        [
            [[0.3, 0.05, 0.05, 0.0], [9.0, 0.0, 9.0, 0.0]],  # the second row is not counted
            [[0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]],
            [[0.0, 0.5, 0.5, 0.0], [0.0, 0.1, 0.0, 0.1]],
            [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]],
            [[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]],
        ]
    )
    counted = torch.tensor([[True, False], [True, True], [True, True], [True, True], [False] * 2])
    found = attention_reward(maps, inside, valid, counted)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.0, -1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_high_entropy_takes_a_share_of_the_rows_that_are_there():
    entropy = torch.tensor([[1.0, 3.0, 2.0, 9.0, 0.5], [1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5])
    counted = torch.tensor([[True, True, True, False, True], [True] + [False] * 4, [False] * 5])
    found = high_entropy(entropy, counted, 0.5)  # 2 of 4, at least 1 of 1, none of 0
    assert found.nonzero().tolist() == [[0, 1], [0, 2], [1, 0]]
    assert torch.equal(high_entropy(entropy, counted, 1.0), counted)
    with pytest.raises(ValueError, match="share"):
        high_entropy(entropy, counted, 0.0)
