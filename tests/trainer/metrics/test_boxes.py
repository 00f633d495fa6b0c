"""IoU, centres and pointing by hand-computed cases and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.metrics.boxes import (
    Places,
    box_accuracy,
    box_iou,
    centre_accuracy,
    iou,
    pointing_accuracy,
    pointing_f1,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
UNIT = (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("first", "second", "value"),
    [
        (UNIT, UNIT, 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 1), (0, 0, 1, 1), 0.5),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),  # they touch
        ((0, 0, 1, 1), (5, 5, 6, 6), 0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
    ],
)
def test_iou(first, second, value):
    assert iou(first, second) == pytest.approx(value)


def test_an_iou_of_a_half_is_right():
    assert box_accuracy([(0, 0, 2, 1)], [(0, 0, 1, 1)]) == 1
    assert box_accuracy([(0, 0, 2.01, 1)], [(0, 0, 1, 1)]) == 0
    assert box_accuracy([(0, 0, 2, 1)], [(0, 0, 1, 1)], threshold=0.75) == 0


def test_of_one_gold_the_first_box_counts():
    wrong = (5, 5, 6, 6)
    for metric in (box_iou, box_accuracy, centre_accuracy):
        assert metric([UNIT, wrong], [UNIT]) == 1
        assert metric([wrong, UNIT], [UNIT]) == 0


def test_several_golds_are_matched_in_any_order():
    golds = [(0, 0, 1, 1), (2, 0, 3, 1)]
    for metric in (box_iou, box_accuracy, centre_accuracy):
        assert metric(golds[::-1], golds) == 1
        assert metric(golds[:1], golds) == 0.5
        assert metric([golds[0], golds[0]], golds) == 0.5  # a gold is met once
        assert metric([], golds) == 0
        assert metric([], []) == 1
        assert metric(golds, []) == 0


def test_accuracy_takes_the_matching_that_is_best_for_it():
    golds = [(0, 0, 1, 1), (0, 0, 2, 1)]
    predicted = [(0, 0, 2, 1), (0, 0, 3.9, 1)]  # IoU [.5, 1] and [.26, .51]
    assert box_accuracy(predicted, golds) == 1
    assert box_iou(predicted, golds) == pytest.approx((1 + 1 / 3.9) / 2)


def test_the_centre_counts_where_the_overlap_is_small():
    small, large = (0.4, 0.4, 0.6, 0.6), UNIT
    assert centre_accuracy([small], [large]) == 1
    assert box_accuracy([small], [large]) == 0
    assert centre_accuracy([(0.9, 0.9, 1.2, 1.2)], [large]) == 0


SQUARE = [(0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.1, 0.5)]
# an L: the upper right quarter is not in it
BENT = [(0, 0), (0.5, 0), (0.5, 0.5), (1, 0.5), (1, 1), (0, 1)]


def test_points_in_boxes_polygons_masks_and_near_points():
    mask = np.zeros((4, 8), bool)
    mask[1, 6:] = True
    for places, inside, outside in [
        (Places(boxes=[(0.1, 0.1, 0.5, 0.5)]), (0.1, 0.5), (0.51, 0.3)),
        (Places(polygons=[SQUARE]), (0.3, 0.3), (0.6, 0.3)),
        (Places(polygons=[BENT]), (0.75, 0.75), (0.75, 0.25)),
        (Places(masks=[mask]), (1.0, 0.3), (0.7, 0.3)),
        (Places(points=[(0.5, 0.5)]), (0.53, 0.53), (0.54, 0.54)),
    ]:
        assert pointing_accuracy([inside], places) == pointing_f1([inside], places) == 1
        assert pointing_accuracy([outside], places) == pointing_f1([outside], places) == 0


def test_points_outside_the_image_are_in_no_mask():
    mask = np.ones((2, 2), bool)
    for point in [(-0.01, 0.5), (1.01, 0.5), (0.5, -1e-9), (0.5, 7)]:
        assert pointing_accuracy([point], Places(masks=[mask])) == 0
    assert pointing_accuracy([(1, 1)], Places(masks=[mask])) == 1


def test_several_points_are_matched_with_their_things():
    places = Places(boxes=[(0, 0, 0.2, 0.2), (0.1, 0.1, 0.4, 0.4), (0.8, 0.8, 1, 1)])
    # the first lies in both of the first two, the second only in the first
    assert pointing_f1([(0.15, 0.15), (0.05, 0.05), (0.9, 0.9)], places) == 1
    assert pointing_f1([(0.05, 0.05), (0.06, 0.06)], places) == pytest.approx(2 / 5)
    assert pointing_f1([(0.9, 0.9)] * 4, places) == pytest.approx(2 / 7)
    assert pointing_accuracy([(0.9, 0.9)] * 4, places) == 1


def test_nothing_to_point_at():
    assert pointing_f1([], Places()) == pointing_accuracy([], Places()) == 1
    assert pointing_f1([(0.5, 0.5)], Places()) == pointing_accuracy([(0.5, 0.5)], Places()) == 0
    assert pointing_f1([], Places(boxes=[UNIT])) == 0


sides = st.floats(-1, 2, allow_nan=False, width=32)
a_box = st.tuples(sides, sides, sides, sides)
some_boxes = st.lists(a_box, max_size=4)


@quick
@given(some_boxes, some_boxes, a_box)
def test_values_from_0_to_1_and_a_symmetric_iou(predicted, gold, box):
    for metric in (box_iou, box_accuracy, centre_accuracy):
        assert 0 <= metric(predicted, gold) <= 1
    for other in gold:
        assert iou(box, other) == pytest.approx(iou(other, box))
        assert 0 <= iou(box, other) <= 1


@quick
@given(st.lists(st.tuples(sides, sides), max_size=4), some_boxes)
def test_pointing_is_from_0_to_1(points, gold):
    places = Places(boxes=gold, points=points)
    assert 0 <= pointing_f1(points, places) <= 1
    assert pointing_f1(points, Places(points=points)) == 1


@quick
@given(a_box, a_box, st.floats(0.5, 2000), st.floats(0.5, 2000))
def test_iou_has_no_unit(first, second, width, height):
    scaled = [(a * width, b * height, c * width, d * height) for a, b, c, d in (first, second)]
    assert iou(*scaled) == pytest.approx(iou(first, second), abs=1e-6)
