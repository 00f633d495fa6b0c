"""The declared tensors of a batch: padding, counts, and the table in the documentation."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import row_counts
from groundkern.hf.data.batch import (
    COUNTS,
    FIELDS,
    VALUES,
    GroundedBatch,
    without_rows,
)
from groundkern.hf.data.padding import pad_fields, pad_tokens
from groundkern.hf.data.weights import composite_weights
from tests.hf.field_table import table, written

SAMPLES = (
    {
        "image": torch.tensor([-1, 0, 0, 1]),
        "text_position": [2],
        "side_position": [2, 2],
        "side_set": [0, -1],
        "side_inside": [torch.tensor([False, True, False, False])],
        "word_position": torch.tensor([1]),
        "word_label": [7],
        "word_bag": [[7, 9], []],
        "map_columns": torch.tensor([1, 2, 3]),
        "map_position": [3],
        "map_token_position": [3],
        "map_image": [0],
        "map_target": [torch.tensor([5, 6, 0])],
        "phrase_composite": [[0, 1, 2]],
    },
    {"image": torch.tensor([-1, -1]), "text_position": [0]},
)


def test_the_documentation_lists_every_field():
    assert written() == table(), "python -m tests.hf.field_table writes it"


def test_every_field_has_known_values_and_dimensions():
    for name, spec in FIELDS.items():
        assert spec.values in VALUES, name
        assert spec.dims.split()[0] == "B", name
        assert spec.is_position == name.endswith(("_position", "_columns")), name


@pytest.mark.parametrize("left", [False, True])
def test_fields_are_padded_to_the_widest_sample(left):
    batch = pad_fields(SAMPLES, [4, 2], left=left)
    assert batch.keys() == {f"gk_{name}" for name in FIELDS}
    assert all(batch[f"gk_{name}"].dtype == spec.dtype for name, spec in FIELDS.items())
    assert batch["gk_image"].tolist() == [[-1, 0, 0, 1], [-1] * 4]
    assert batch["gk_text_position"].tolist() == [[2], [2 if left else 0]]
    assert batch["gk_side_set"].tolist() == [[0, -1], [-1, -1]]
    assert batch["gk_side_inside"].tolist() == [[[False, True, False, False]], [[False] * 4]]
    assert batch["gk_word_bag"].tolist() == [[[7, 9], [-1, -1]], [[-1, -1], [-1, -1]]]
    assert batch["gk_map_target"].tolist() == [[[5, 6, 0]], [[-1, -1, -1]]]
    assert batch["gk_phrase_composite"].tolist() == [[[0, 1, 2]], [[-1, -1, -1]]]
    assert batch["gk_lens_position"].shape == (2, 0)
    ids = pad_tokens([[1, 2, 3, 4], [5, 6]], 9, left=left)
    assert ids.tolist() == [[1, 2, 3, 4], [9, 9, 5, 6] if left else [5, 6, 9, 9]]


def test_lengths_are_multiples_of_what_is_asked_for():
    batch = pad_fields(SAMPLES, [4, 2], left=False, multiple=3)
    assert batch["gk_image"].tolist() == [[-1, 0, 0, 1, -1, -1], [-1] * 6]
    assert batch["gk_text_position"].tolist() == [[2], [0]]
    assert batch["gk_side_inside"].shape[-1] == 6
    assert pad_tokens([[1, 2, 3]], 9, left=True, multiple=4).tolist() == [[9, 1, 2, 3]]
    assert pad_tokens([[1, 2, 3]], 9, left=False, multiple=3).shape == (1, 3)


def test_a_field_of_no_batch_is_a_mistake():
    with pytest.raises(AssertionError, match="word_labels"):
        pad_fields([{"word_labels": [1]}], [3], left=False)


def test_a_batch_without_rows_counts_nothing_and_is_complete():
    batch = pad_fields(SAMPLES, [4, 2], left=False)
    counted = dict(zip(COUNTS, row_counts(batch).tolist()))
    nonzero = {"text": 2, "word": 1, "map": 1, "aligned": 2, "visual": 3, "labelled_image": 1}
    nonzero["image"] = 2
    assert counted == dict.fromkeys(COUNTS, 0) | nonzero | {"composite": 1}
    blank = without_rows({**batch, "labels": torch.zeros(2, 4, dtype=torch.int64)})
    assert {name for name, n in zip(COUNTS, row_counts(blank)) if n} == {"visual"}
    assert blank["gk_image"] is batch["gk_image"]
    assert (blank["gk_map_columns"] == -1).all()
    assert (blank["labels"] == -100).all()
    assert all(blank[name].shape == x.shape for name, x in batch.items())
    inputs = dict(blank, weight=1)
    whole = GroundedBatch.pop(inputs, blank["labels"])
    assert inputs.keys() == {"labels", "weight"}
    assert torch.equal(whole.counts, row_counts(blank))
    missing = GroundedBatch.pop({}, blank["labels"])
    assert row_counts({}).tolist() == missing.counts.tolist() == [0] * len(COUNTS)
    for name, spec in FIELDS.items():
        assert getattr(missing, name).dtype == spec.dtype


def test_weights_that_are_left_out_are_one():
    """A sample without weights among others, a batch without them, and rows in other dtypes."""
    weighted = {**SAMPLES[0], "side_weight": [0.25, 2.0]}
    batch = pad_fields([SAMPLES[0], weighted], [4, 4], left=False)
    assert batch["gk_side_weight"].tolist() == [[1.0, 1.0], [0.25, 2.0]]
    assert batch["gk_word_weight"].tolist() == [[1.0], [1.0]]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    without = {name: x for name, x in batch.items() if not name.endswith("_weight")}
    without["gk_several_weight"] = batch["gk_several_weight"]  # of labels, not of rows
    found = GroundedBatch.pop(dict(without), ids)
    assert found.side_weight.tolist() == [[1.0, 1.0]] * 2
    assert torch.equal(found.counts, row_counts(without))
    half = {**batch, "gk_side_weight": batch["gk_side_weight"].bfloat16()}
    assert GroundedBatch.pop(half, ids).side_weight.dtype == torch.float32


def test_rows_of_weight_zero_do_not_count():
    """Phrases 0 = 1 + 2 and 3 = 4 + 5: a composite counts if none of its three counts 0."""
    sample = {
        "image": torch.tensor([0, 0, 1, -1, -1, -1, -1]),
        "word_position": [0, 1, 2],
        "word_label": [7, 8, 9],
        "word_bag": [[7, 8], [9]],
        "word_weight": [0.0, 0.5, 0.0],  # image 0 has a row that counts, image 1 has none
        "phrase_position": [3, 3, 4, 4, 5, 5],
        "phrase_number": [0, 1, 2, 3, 4, 5],
        "phrase_subject": [1, 0, 1, 0, 1, 0],
        "phrase_composite": [[0, 1, 2], [3, 4, 5]],
        "phrase_weight": [0.5, 1.0, 3.0, 2.0, 0.0, 1.0],
        "lens_position": [0, 1, 2],
        "lens_label": [7, 7, 7],
        "lens_inside": [1, 1, 0],
        "lens_weight": [0.0, 1.0, 2.0],
    }
    batch = pad_fields([sample], [7], left=False)
    counted = {name: n for name, n in zip(COUNTS, row_counts(batch).tolist()) if n}
    assert counted == {
        "word": 1,
        "visual": 3,
        "labelled_image": 1,
        "phrase": 5,
        "subject": 2,
        "composite": 1,
        "raise": 1,
        "suppress": 1,
    }
    fields = (batch[f"gk_phrase_{x}"] for x in ("composite", "position", "number", "weight"))
    assert composite_weights(*fields).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_weight_is_finite_and_not_negative(value):
    batch = pad_fields([{**SAMPLES[0], "side_weight": [1.0, value]}], [4], left=False)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    whole = GroundedBatch.pop(batch, ids)
    wanted = "`gk_side_weight`: expected finite numbers, 0 or more"
    with pytest.raises(ValueError, match=wanted):
        whole.check_values(ids, visual=(), vocabulary=100)
