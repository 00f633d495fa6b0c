"""Boxes and points in every notation, against the values that each model's documentation gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.metrics.places import parse_boxes, parse_points
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.writing import PER_MILLE

quick = settings(max_examples=60, deadline=None, derandomize=True)


def test_kosmos_2_as_its_model_card_has_it():
    text = (
        "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044>"
        "<patch_index_0863></object> warming himself by<phrase> a fire</phrase><object>"
        "<patch_index_0005><patch_index_0911></object>."
    )
    snowman, fire = (
        (0.390625, 0.046875, 0.984375, 0.828125),
        (0.171875, 0.015625, 0.484375, 0.890625),
    )
    assert parse_boxes(text) == [snowman, fire]


@pytest.mark.parametrize(("first", "last"), [(33, 33), (33, 40), (33, 97), (0, 1023), (31, 992)])
def test_kosmos_2_as_transformers_decodes_it(first, last):
    from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

    expected = patch_index_to_coordinate(first, last, 32)
    found = parse_boxes(f"<patch_index_{first:04}><patch_index_{last:04}>")
    assert found == ([expected] if expected[0] < expected[2] else [])


def test_paligemma_writes_y_first_of_1024():
    text = "<loc0256><loc0512><loc0768><loc1023> dog ; <loc0000><loc0000><loc0512><loc0512> cat"
    assert parse_boxes(text) == [(0.5, 0.25, 1023 / 1024, 0.75), (0, 0, 0.5, 0.5)]


def test_florence_2_means_the_middle_of_its_thousand_bins():
    found = parse_boxes("car<loc_52><loc_333><loc_932><loc_774>")
    assert found == [pytest.approx((0.0525, 0.3335, 0.9325, 0.7745))]


@pytest.mark.parametrize(
    "text",
    [
        "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>",
        "<ref>the cat</ref><box>(100,200),(300,400)</box>",
        "<ref>the cat</ref><box>[[100, 200, 300, 400]]</box>",
        "<ref>the cat</ref><box>100 200 300 400</box>",
        "<|box_start|>(100,200),(300,400)",  # the tokenizer left the closing tag out
        '[{"box_2d": [200, 100, 400, 300], "label": "cat"}]',  # Gemini: y first
    ],
)
@pytest.mark.parametrize("coord", ["pixel", "unit", "per_mille"])
def test_notations_that_say_that_they_are_thousandths(text, coord):
    found = parse_boxes(text, coord=coord, size=(640, 480))
    assert found == [pytest.approx((0.1, 0.2, 0.3, 0.4))]


def test_deepseek_counts_to_999():
    text = "<|ref|>cat<|/ref|><|det|>[[0, 0, 999, 999], [333, 0, 666, 999]]<|/det|>"
    assert parse_boxes(text) == [(0, 0, 1, 1), pytest.approx((1 / 3, 0, 2 / 3, 1))]


PLAIN = [
    "[64, 96, 320, 240]",
    "[[64, 96, 320, 240]]",
    "(64, 96, 320, 240)",
    "(64, 96), (320, 240)",
    "[[64, 96], [320, 240]]",
    "64, 96, 320, 240",
    "64 96 320 240",
    "It is at [64.0, 96.00, 320., 240].",
    '{"bbox_2d": [64, 96, 320, 240], "label": "cat"}',
    '```json\n[\n\t{"bbox_2d": [64, 96, 320, 240], "label": "cat"}\n]\n```',
    "{'bbox': [64, 96, 320, 240]}",
    '{"box":[64,96,320,240]}',
    '[{"bbox_2d": [64, 96, 320, 240], "label": "cat"}, {"bbox_2d": [64, 9',  # cut off
]


@pytest.mark.parametrize("text", PLAIN)
def test_notations_whose_numbers_the_caller_has_to_know(text):
    box = (64, 96, 320, 240)
    assert parse_boxes(text, coord="pixel", size=(640, 480)) == [(0.1, 0.2, 0.5, 0.5)]
    assert parse_boxes(text, coord="per_mille") == [tuple(v / 1000 for v in box)]
    assert parse_boxes(text, coord="percent") == [tuple(v / 100 for v in box)]
    assert parse_boxes(text, coord="unit") == [box]


def test_prepare_s_own_boxes_come_back():
    boxes = [(0.1, 0.2, 0.5, 0.5), (0.0, 0.0, 1.0, 1.0)]
    assert parse_boxes(PER_MILLE.write([Place(box) for box in boxes], (640, 480)).text) == boxes


def test_cogvlm_s_boxes_with_leading_zeros_and_semicolons():
    assert parse_boxes("A cat [[008,071,989,857]]") == [(0.008, 0.071, 0.989, 0.857)]
    found = parse_boxes("[[100,200,300,400;500,600,700,800]]")
    assert found == [(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[3, 2, 1, 4]",  # corners swapped
        "[1, 2, 1, 4]",  # no width
        "[1, 2, 3, four]",
        "[nan, 0, 1, 1]",
        "[1e5, 0, 1e9, 1]",
        "[1, 2, 99999999999, 4]",
        "[1.2.3, 2, 3, 4]",
        "<loc0001><loc0002><loc0003>",
        "<loc_1><loc_2><loc_3>",
        "<patch_index_0001>",
        "<box>(1,2),(3)</box>",
        "<box>(1234567890,2),(9999999999999,99999999999999)</box>",
        "<|box_start|><|box_end|>",
        '{"bbox_2d": [1, 2, 3]}',
        "12, 15, 18 and 20",
    ],
)
def test_malformed_boxes_are_none(text):
    assert parse_boxes(text) == []


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ('<point x="61.5" y="40.4" alt="the cat">the cat</point>', [(0.615, 0.404)]),
        (
            'Counting the <points x1="9.1" y1="11.7" x2="17.2" y2="41.3" alt="boats">boats</points>'
            " shows a total of 2.",
            [(0.091, 0.117), (0.172, 0.413)],
        ),
        (
            '<points coords="1 1 073 160 2 173 600" alt="boats">the boats</points>',
            [(0.073, 0.160), (0.173, 0.600)],
        ),
        ('<points coords="1 1 105 205;2 1 300 400">', [(0.105, 0.205), (0.3, 0.4)]),
        ("<|box_start|>(100,200)<|box_end|>", [(0.1, 0.2)]),
        ('[{"point": [200, 100], "label": "cat"}]', [(0.1, 0.2)]),  # Gemini: y first
        ('{"point_2d": [100, 200], "label": "cat"}', [(0.1, 0.2)]),
        ("pyautogui.click(x=100, y=200)", [(0.1, 0.2)]),
        ("(100, 200)", [(0.1, 0.2)]),
        ("[(100, 200), (300, 400)]", [(0.1, 0.2), (0.3, 0.4)]),
        ("[100, 200]", [(0.1, 0.2)]),
        ("100 200", [(0.1, 0.2)]),
        ("nothing", []),
        ("[100, 200, 300, 400]", []),
        ("(100)", []),
        ('<point x="61.5" alt="y">', []),
        ('<points coords="1 1 073">', []),
    ],
)
def test_points(text, points):
    assert parse_points(text) == [pytest.approx(point) for point in points]


def test_unknown_coordinates_and_pixels_of_no_image_are_errors():
    with pytest.raises(ValueError, match="`coord`: expected pixel or one of unit, percent"):
        parse_boxes("", coord="inch")
    with pytest.raises(ValueError, match="`size`: expected"):
        parse_points("", coord="pixel")


NOTATIONS = [*PLAIN, "<box>", "<|box_start|>", "<loc0001>" * 4, "<loc_1>", "<patch_index_0001>"]
pieces = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from([*NOTATIONS, '<points x1="', '" y1="', "coords='", *"[](),;0123456789.-"]),
    ),
    max_size=12,
).map("".join)


@quick
@given(pieces)
def test_no_text_raises_and_boxes_have_an_area(text):
    for x0, y0, x1, y1 in parse_boxes(text, coord="pixel", size=(640, 480)):
        assert x0 < x1 < 1e9
        assert y0 < y1 < 1e9
    for point in parse_points(text):
        assert len(point) == 2


def test_long_texts_take_no_time():
    for text in ("[" * 99_000, "1," * 50_000, "<box>" * 20_000, "<points " * 12_000, " " * 100_000):
        parse_boxes(text)
        parse_points(text)
