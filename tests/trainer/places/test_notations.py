"""Where boxes stand in a text, what label they belong to, and what is no box."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.places.notations import BOXES, POINTS, marks_in

CAT = "the cat"


@pytest.mark.parametrize(
    ("text", "numbers", "label", "item"),
    [
        (f"A <ref>{CAT}</ref><box>[[1, 2, 3, 4]]</box>!", "[1, 2, 3, 4]", CAT, (2, 45)),
        (f"A <ref>{CAT}</ref> <box>(1,2),(3,4)</box>!", "(1,2),(3,4)", CAT, (2, 43)),
        (
            f"<|object_ref_start|> {CAT} <|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
            "(1,2),(3,4)",
            CAT,
            (0, 82),
        ),
        ("click <|box_start|>(1,2),(3,4)<|box_end|>", "(1,2),(3,4)", None, (6, 41)),
        ("<box>[[1, 2, 3, 4]]</box>", "[1, 2, 3, 4]", None, (0, 25)),
        (f"<|ref|>{CAT}<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>.", "[1, 2, 3, 4]", CAT, (0, 51)),
        (f"<phrase> {CAT}</phrase><object>" + "<patch_index_0000>"
         "<patch_index_0033></object>", "<patch_index_0000><patch_index_0033>", CAT, (0, 78)),
        ("<loc0001><loc0001><loc0002><loc0002> the cat ; x",
         "<loc0001><loc0001><loc0002><loc0002>", CAT, (0, 45)),
        ("see <loc0001><loc0001><loc0002><loc0002> the cat",
         "<loc0001><loc0001><loc0002><loc0002>", None, (4, 40)),
        ("<s>the cat<loc_1><loc_2><loc_3><loc_4>", "<loc_1><loc_2><loc_3><loc_4>", CAT, (3, 38)),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "the cat"}]', "[1, 2, 3, 4]", CAT, (1, 46)),
        ('{"label": "the cat", "bbox_2d": [1, 2, 3, 4]}', "[1, 2, 3, 4]", CAT, (0, 45)),
        ("{'bbox': [1, 2, 3, 4], 'text': 'the cat'}", "[1, 2, 3, 4]", CAT, (0, 41)),
        ('{"bbox_2d": [1, 2, 3, 4], "text_content": "the cat",\n}', "[1, 2, 3, 4]", CAT, (0, 54)),
        ('A 5" screen {"box_2d": [1, 2, 3, 4], "label": "the cat"}', "[1, 2, 3, 4]", CAT, (12, 56)),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "the c', "[1, 2, 3, 4]", None, (12, 24)),
        ('<point x="1" y="2.5" alt="a">the cat</point>', 'x="1" y="2.5', CAT, (0, 44)),
        ('<points coords="1 1 010 020">the cat</points>', "1 010 020", CAT, (0, 45)),
        ("At [1, 2, 3, 4].", "[1, 2, 3, 4]", None, (3, 15)),
    ],
)  # fmt: skip
def test_where_a_place_and_its_label_are(text, numbers, label, item):
    (mark,) = marks_in(text)
    assert text[slice(*mark.span)] == numbers
    assert (mark.label and mark.label.text) == label
    if mark.label is not None:
        assert text[mark.label.start : mark.label.stop] == label
    assert mark.item == item


def test_labels_in_json_are_what_they_mean_and_values_besides_are_counted():
    text = '[{"bbox_2d": [1, 2, 3, 4], "label": "a \\"b\\"", "score": 0.9, "tags": ["x"]}]'
    (mark,) = marks_in(text)
    assert mark.label.text == 'a "b"'
    assert text[mark.label.start : mark.label.stop] == 'a \\"b\\"'
    assert (mark.key, mark.extra) == ("bbox_2d", 2)


def test_several_boxes_share_a_label():
    text = "<ref>cats</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box> <box>[[9, 9, 10, 10]]</box> x"
    marks = marks_in(text)
    assert [mark.label.text for mark in marks] == ["cats"] * 3
    assert [text[slice(*mark.span)] for mark in marks][1] == "[5, 6, 7, 8]"
    assert text[slice(*marks[0].item)].endswith("[[9, 9, 10, 10]]</box>")


def test_boxes_and_points_of_one_answer():
    text = '[{"bbox_2d": [1, 2, 3, 4]}, {"point_2d": [5, 6]}]'
    assert [mark.numbers for mark in marks_in(text)] == [(1, 2, 3, 4), (5, 6)]
    assert [mark.numbers for mark in marks_in("<box>(1,2),(3,4)</box>")] == [(1, 2, 3, 4)]


def test_molmo_2_says_which_image():
    (first, second) = marks_in('<points coords="1 1 105 205;2 1 300 400">x</points>')
    assert (first.image, first.numbers) == (0, (105, 205))
    assert (second.image, second.numbers) == (1, (300, 400))


@pytest.mark.parametrize(
    "text",
    ["12, 15, 18, 20", "At (3, 4) the line turns.", "[1, 2]", "Pages 3 4 5 6", "f(x) = (1, 2)"],
)
def test_numbers_that_may_be_anything_are_read_by_name_only(text):
    assert marks_in(text) == []


def test_corners_of_a_turned_box_are_no_boxes():
    """Florence-2's OCR writes four corners of a text, which must not be read as two boxes."""
    corners = (10, 10, 50, 12, 50, 30, 10, 28)
    assert marks_in("text" + "".join(f"<loc_{c}>" for c in corners)) == []
    assert marks_in("a<loc_1><loc_2><loc_3><loc_4><loc_5>") == []


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[3, 2, 1, 4]]</box>",
        "<box>[[1, 2, 1, 4]]</box>",
        "<|box_start|>(3,4),(1,2)<|box_end|>",
        "<loc0009><loc0009><loc0001><loc0001>",
        "<patch_index_0900><patch_index_0001>",
        '{"bbox_2d": [300, 2, 1, 4]}',
    ],
)
def test_swapped_corners_are_marks_that_are_not_sound(text):
    from groundkern.trainer.places.notations import sound

    assert [sound(mark) for mark in marks_in(text)] == [False]


@pytest.mark.parametrize(
    "text",
    [
        "<box>[[1, 2, 3]]</box>",
        "<box>[[1, 2, 3, 4, 5]]</box>",
        "<box>[[1, 2], [3, 4], [5]]</box>",
        "<box>[[1, 2, 3, 99999999999]]</box>",
        "<box>[[1e3, 2, 3, 4]]</box>",
        "<loc001><loc002><loc003><loc004>",
        "<loc0001><loc0002> <loc0003><loc0004>",
        "<loc_12345><loc_1><loc_2><loc_3>",
        "<patch_index_001><patch_index_002>",
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, 4, 5]}',
        '{"bbox_2d": ["1", 2, 3, 4]}',
        '{"bbox_2d": [[1, 2, 3, [4]]]}',
        '{"bbox_2d": {"x": 1}}',
        '<points coords="1 1 105">x</points>',
        "[1, 2, 3, 4, 5, 6, 7, 8]",
        "[[1, 2], [3, 4], [5, 6]]",  # a polygon
        "(1,2),(3,4),(5,6),(7,8)",
    ],
)
def test_what_is_malformed_is_no_box(text):
    assert [mark for mark in marks_in(text) if mark.is_box] == []


LONG = ["[", "{", '{"a":', '{"bbox_2d":[1,2,3,4],', "<box>", "<ref>", "<ref>a</ref>", "<phrase>",
        "<loc0001>", "<loc_1>", "<points ", "(1,2),", "[[1,2,3,4],", "1,", " ", ";\n", "a",
        '{"a":"', '{\\"', "```json\n[", "<|det|>[[", 'coords="1 ']  # fmt: skip


def test_no_text_takes_long():
    begin = time.process_time()
    for piece in LONG:
        marks_in(piece * (100_000 // len(piece)))
    assert time.process_time() - begin < 20  # 2 to 3 s; a pattern that backtracks takes hours


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [*LONG, "</box>", "</ref>", "<|/det|>", "]", "}", "</point>", "1,2,3,4"]
            ),
            st.text(max_size=4),
        ),
        max_size=14,
    ).map("".join)
)
def test_spans_are_of_the_text_and_hold_the_numbers(text):
    for notation in (*BOXES, *POINTS):
        for mark in notation.find(text):
            (start, stop), (first, last) = mark.span, mark.item
            assert 0 <= first <= start < stop <= last <= len(text)
            assert len(mark.numbers) in (2, 4)
            if mark.label is not None:
                assert first <= mark.label.start < mark.label.stop <= last
