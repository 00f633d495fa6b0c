"""Samples put into rows: who goes where, and that a row says of each what it said alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.hf.data.batch import FIELDS, GroundedBatch
from groundkern.hf.data.packing import join_fields, join_tokens, rows_of
from groundkern.hf.data.padding import pad_fields
from tests.hf.meanings import meaning, meant_rows, supervised_rows

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(60, 200))
def test_rows_hold_every_document_once_and_no_more_than_they_can(lengths, capacity):
    rows = rows_of(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert rows == sorted(map(sorted, rows))
    laid = [sum(lengths[i] for i in row) for row in rows]
    assert max(laid) <= capacity
    assert len(rows) >= math.ceil(sum(lengths) / capacity)
    if len(rows) > 1:  # otherwise two rows would have been one
        assert 2 * sum(laid) > capacity * (len(rows) - 1)
    assert rows_of(lengths, capacity) == rows
    evened = rows_of(lengths, max(laid))
    assert len(evened) == len(rows)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([5], 5, [[0]]),
        ([3, 7, 4], 10, [[0, 2], [1]]),  # evened: best fit has rows of 10 and 4
        ([2, 5, 5, 8], 10, [[0, 3], [1, 2]]),
        ([1, 1, 1, 1], 10**9, [[0, 1, 2, 3]]),
        ([6, 4, 4, 3, 3], 10, [[0, 1], [2, 3, 4]]),
        ([10, 2, 2, 2], 12, [[0], [1, 2, 3]]),  # 12 and 4 would be two rows too, but longer
    ],
)
def test_rows_by_hand(lengths, capacity, rows):
    assert rows_of(lengths, capacity) == rows


def test_positions_start_again_and_the_mask_is_gone():
    tokens = {
        "input_ids": [[7, 8], [9], [4, 5, 6]],
        "attention_mask": [[1, 1], [1], [1, 1, 1]],
        "labels": [[-100, 8], [-100], [-100, 5, -100]],
    }
    joined = join_tokens(tokens, [[0, 1], [2]])
    assert joined == {
        "input_ids": [[7, 8, 9], [4, 5, 6]],
        "labels": [[-100, 8, -100], [-100, 5, -100]],
        "position_ids": [[0, 1, 0], [0, 1, 2]],
    }
    alone = join_tokens(tokens, [[0], [1], [2]])["position_ids"]
    assert alone == [[0, 1, 0], [0, 0, 1], [0, 1, 2]]


@st.composite
def documents(draw):
    """(fields, length, images) of a sample with any of the groups, as lists or tensors."""
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    image: list[int] = []
    for number, size in enumerate(sizes):
        image += [-1] * draw(st.integers(0, 2)) + [number] * size
    image += [-1] * draw(st.integers(1, 5))
    length = len(image)
    columns = [i for i, number in enumerate(image) if number >= 0]
    rows = st.lists(st.integers(0, max(0, length - 2)), max_size=4 if length > 1 else 0)
    fields = {"image": torch.tensor(image), "map_columns": torch.tensor(columns).long()}
    fields["text_position"] = draw(rows)
    if draw(st.booleans()):
        sets = draw(st.integers(0, 3))
        masks = st.lists(st.booleans(), min_size=length, max_size=length)
        fields["side_inside"] = [torch.tensor(draw(masks)) for _ in range(sets)]
        fields["side_position"] = draw(rows)
        number = st.integers(-1, sets - 1)
        fields["side_set"] = [draw(number) for _ in fields["side_position"]]
    if columns and draw(st.booleans()):
        fields |= draw(_on_images(st.sampled_from(columns), len(sizes)))
    if columns and draw(st.booleans()):
        fields |= draw(_maps(rows, columns, image))
    if draw(st.booleans()):
        fields |= draw(_of_phrases(rows))
    return fields, length, len(sizes)


@st.composite
def _on_images(draw, columns, images):
    """Words and concepts on visual tokens."""
    label = st.integers(0, 500)
    tokens = draw(st.lists(columns, max_size=4, unique=True))
    several = [draw(st.lists(label, max_size=3)) for _ in tokens]
    inside = draw(st.lists(columns, max_size=4))
    words = draw(st.lists(label, min_size=1, max_size=3, unique=True))
    said = st.lists(st.sampled_from(words), min_size=1, unique=True)
    return {
        "word_position": torch.tensor(tokens).long(),
        "word_label": [draw(label) for _ in tokens],
        "word_bag": [draw(st.lists(label, max_size=3)) for _ in range(images)],
        "several_label": several,
        "several_weight": [[draw(st.integers(1, 9)) for _ in each] for each in several],
        "lens_position": tuple(inside),
        "lens_label": tuple(draw(label) for _ in inside),
        "lens_inside": tuple(draw(st.integers(0, 1)) for _ in inside),
        "contrast_position": tokens,
        "contrast_label": [draw(said) for _ in tokens],
        "contrast_bag": [words] * images,
    }


@st.composite
def _maps(draw, rows, columns, image):
    positions = draw(rows)
    values = st.lists(st.integers(0, 2**20), min_size=len(columns), max_size=len(columns))
    return {
        "map_position": positions,
        "map_token_position": [p + draw(st.integers(0, 1)) for p in positions],
        "map_image": [image[draw(st.sampled_from(columns))] for _ in positions],
        "map_target": tuple(torch.tensor(draw(values)) for _ in positions),
    }


@st.composite
def _of_phrases(draw, rows):
    positions = [draw(rows) for _ in range(draw(st.integers(0, 4)))]
    found = [(p, n, draw(st.integers(0, 1))) for n, own in enumerate(positions) for p in own]
    numbers = sorted({n for _, n, _ in found})
    threes = st.lists(st.tuples(*3 * [st.sampled_from(numbers)]), max_size=2) if numbers else None
    names = ("phrase_position", "phrase_number", "phrase_subject")
    return {
        **dict(zip(names, zip(*found))),
        "phrase_composite": draw(threes) if threes is not None else [],
    }


@settings(max_examples=100, deadline=None)
@given(st.lists(documents(), min_size=1, max_size=5))
def test_each_document_of_a_row_means_what_it_meant_alone(drawn):
    fields, lengths, images = map(list, zip(*drawn))
    joined = pad_fields([join_fields(fields, lengths, images)], [sum(lengths)], left=False)
    assert joined.keys() == {f"gk_{name}" for name in FIELDS}
    start = rows = 0
    for own, length in zip(fields, lengths):
        alone = pad_fields([own], [length], left=False)
        found = meaning(joined, 0, start, start + length)
        assert found == meaning(alone, 0, 0, length)
        start, rows = start + length, rows + meant_rows(found)
    assert rows == supervised_rows(joined)  # and there is none besides
    for name, x in alone.items() if len(drawn) == 1 else ():
        assert torch.equal(joined[name], x), name
    ids = torch.full((1, sum(lengths)), 3)
    batch = GroundedBatch.pop(dict(joined), ids)
    batch.check_values(ids, visual=(), vocabulary=501)
