"""Held-out figures from hand-made model outputs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from groundkern.maps import FIXED_POINT_ONE
from groundkern.trainer.data.bad_samples import BadSample
from groundkern.trainer.metrics import held_out as ev
from groundkern.trainer.metrics.tally import Tally, interval_of, paired_of, row_of, sampled


def batch() -> dict:
    """Two sequences of 8 positions: visual tokens 1-4 (two images of two) and 1-2 (one image)."""
    image = torch.full((2, 8), -1, dtype=torch.int32)
    image[0, 1:5] = torch.tensor([0, 0, 1, 1])
    image[1, 1:3] = 0
    labels = torch.full((2, 8), -100)
    labels[0, 6:8] = torch.tensor([11, 12])
    labels[1, 5] = 13
    inside = torch.zeros(2, 1, 8, dtype=torch.bool)
    inside[0, 0, 3] = True
    inside[1, 0, 1] = True
    one, half = FIXED_POINT_ONE, FIXED_POINT_ONE // 2
    return {
        "labels": labels,
        "gk_image": image,
        "gk_text_position": torch.tensor([[5, 6], [4, -1]], dtype=torch.int32),
        "gk_side_position": torch.tensor([[5], [4]], dtype=torch.int32),
        "gk_side_set": torch.zeros(2, 1, dtype=torch.int32),
        "gk_side_inside": inside,
        "gk_word_position": torch.tensor([[1, 2], [2, -1]], dtype=torch.int32),
        "gk_word_label": torch.tensor([[7, 8], [7, -1]]),
        "gk_map_position": torch.tensor([[7], [5]], dtype=torch.int32),
        "gk_map_token_position": torch.tensor([[7], [5]], dtype=torch.int32),
        "gk_map_image": torch.tensor([[1], [0]], dtype=torch.int32),
        "gk_map_target": torch.tensor([[[0, 0, one, half]], [[one, half, -1, -1]]]).int(),
        "gk_map_columns": torch.tensor([[1, 2, 3, 4], [1, 2, -1, -1]], dtype=torch.int32),
    }


def tallied(add, *args) -> Tally:
    tally = Tally(2)
    add(tally, *args)
    return tally


def figures(add, *args) -> dict[str, float]:
    found = tallied(add, *args).figures()
    assert found.pop("samples") == 2
    assert found.pop("per_sample")["sums"].keys() == found.keys()
    return found


def test_answers_count_rows_and_digits_by_the_predicted_token():
    output = SimpleNamespace(
        text_log_prob=torch.tensor([[-1.0, -2.0], [-6.0, 0.0]]),
        text_predicted=torch.tensor([[11, 0], [13, -1]]),
    )
    digits = torch.zeros(20, dtype=torch.bool)
    digits[[12, 13]] = True
    got = figures(ev.add_answers, batch(), output, digits)
    assert got == pytest.approx(
        {
            "answer_loss": 3.0,
            "token_accuracy": 2 / 3,
            "answer_accuracy": 0.5,
            "number_accuracy": 0.5,
        }
    )


def test_attention_is_measured_on_the_target_s_own_image():
    # row 0: image 1 owns columns 2, 3; the mass on image 0 takes no part
    maps = torch.tensor([[[0.4, 0.4, 0.15, 0.05]], [[0.1, 0.3, 0.0, 0.0]]])
    got = figures(ev.add_attention, batch(), maps)
    assert got["attention_mass"] == pytest.approx((0.75 + 0.25) / 2)
    assert got["attention_ratio"] == pytest.approx((1.5 + 0.5) / 2)
    assert got["attention_argmax"] == pytest.approx(0.5)


def test_contributions_are_ranked_over_all_visual_tokens_and_may_be_negative():
    contributions = torch.tensor([[[0.1, 0.2, 0.9, -5.0]], [[-2.0, -1.0, 9.0, 9.0]]])
    got = figures(ev.add_contributions, batch(), contributions)
    assert got == pytest.approx({"peak_in_mask": 0.5, "roc_auc": 0.5})


def test_words_count_labelled_tokens_only():
    predicted = torch.tensor([[7, 0], [0, -1]])
    tally = tallied(ev.add_words, batch(), predicted)
    assert figures(ev.add_words, batch(), predicted) == pytest.approx(
        {"word_accuracy": 1 / 3, "word_baseline": 2 / 3}
    )
    # labels 7 and 8 in the first sample, 7 in the second
    found = tally.by_sample()
    assert found["word_accuracy"].sums.tolist() == [1.0, 0.0]
    assert found["word_baseline"].sums.tolist() == [1.0, 1.0]
    assert found["word_baseline"].counts.tolist() == [2, 1]


def test_any_label_of_a_number_is_right():
    """The digits of 7,977 and of 89: 9 is predicted for both."""
    given = batch()
    given["gk_several_label"] = torch.tensor([[[7, 9], [8, 9]], [[-1, -1]] * 2])
    predicted = torch.tensor([[9, 9], [9, -1]])
    tally = tallied(ev.add_words, given, predicted)
    found = tally.by_sample()
    assert found["word_accuracy"].sums.tolist() == [2.0, 0.0]
    assert found["word_accuracy"].counts.tolist() == [2, 1]
    assert found["word_baseline"].sums.tolist() == [1.0, 1.0]  # 7 comes as often as 9, and first


def test_a_batch_without_regions_gives_no_figure():
    empty = batch()
    for key, width in (("gk_side_position", 0), ("gk_side_set", 0), ("gk_word_position", 0)):
        empty[key] = empty[key][:, :width]
    empty["gk_side_inside"] = empty["gk_side_inside"][:, :0]
    empty["gk_word_label"] = empty["gk_word_label"][:, :0]
    assert figures(ev.add_words, empty, torch.zeros(2, 0)) == {}
    assert figures(ev.add_contributions, empty, torch.zeros(2, 0, 4)) == {}


def test_undefined_values_take_no_part_in_a_mean():
    tally = Tally(3)
    tally.add("x", torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([0, 0, 2]))
    tally.add("y", torch.tensor([float("nan")]), torch.tensor([1]))
    found = tally.figures()
    assert {k: v for k, v in found.items() if k != "per_sample"} == {"samples": 3, "x": 2.0}
    assert found["per_sample"]["sums"] == {"x": "1 0 3"}
    assert found["per_sample"]["counts"] == {"x": "1 0 1"}


def test_sums_and_counts_stay_with_their_sample():
    output = SimpleNamespace(
        text_log_prob=torch.tensor([[-1.0, -2.0], [-6.0, 0.0]]),
        text_predicted=torch.tensor([[11, 0], [13, -1]]),
    )
    tally = Tally(5)
    for rows in ([0, 1], [4, 2]):  # the second batch's rows are not in order
        tally.begin(rows, map(str, rows))
        ev.add_answers(tally, batch(), output, torch.ones(20, dtype=torch.bool))
    found = tally.by_sample()
    assert found["answer_loss"].sums.tolist() == [3.0, 6.0, 6.0, 0.0, 3.0]
    assert found["answer_loss"].counts.tolist() == [2, 1, 1, 0, 2]
    assert found["answer_accuracy"].sums.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert found["answer_accuracy"].counts.tolist() == [1, 1, 1, 0, 1]


def test_the_compact_form_gives_back_what_went_in():
    tally = Tally(4)
    values = torch.tensor([1 / 3, 2e-7, 12345.678, float("inf")])
    tally.add("x", values, torch.tensor([0, 1, 2, 3]))
    kept = json.loads(json.dumps(tally.figures(), allow_nan=True))
    got = sampled(kept, "x")
    np.testing.assert_allclose(got.sums, values.double(), rtol=1e-5)
    assert got.counts.tolist() == [1, 1, 1, 1]
    assert sampled(kept, "y") is None


def test_ten_thousand_samples_of_fifteen_metrics_take_little_room():
    tally, rows = Tally(10_000), torch.arange(10_000)
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    for number in range(15):
        tally.add(f"metric {number}", values > 0.5 if number % 2 else values, rows)
    assert len(json.dumps(tally.figures())) < 1_500_000


def results(sums: list[float], *, names: list[str] | None = None, data: str = "d") -> dict:
    tally = Tally(len(sums))
    tally.begin(range(len(sums)), names or [str(i) for i in range(len(sums))])
    tally.add("x", torch.tensor(sums), torch.arange(len(sums)))
    return tally.figures(data)


def test_only_the_same_samples_are_paired():
    left, right = results([0.0, 0.0, 1.0, 0.0]), results([1.0, 1.0, 1.0, 0.0])
    difference, samples = paired_of(left, right, "x")
    assert (difference.value, samples) == (0.5, 4)
    assert paired_of(left, right, "x", scale=2.0)[0].value == pytest.approx(0.25)
    assert paired_of(left, right, "y") is None
    for other in ({"names": list("abcd")}, {"data": "other"}):
        assert paired_of(left, results([1.0, 1.0, 1.0, 0.0], **other), "x") is None


def test_a_record_of_an_older_version_has_no_interval():
    old = {"samples": 4, "x": 0.25}
    assert sampled(old, "x") is interval_of(old, "x") is None
    assert paired_of(old, results([0.0] * 4), "x") is None
    assert interval_of(results([0.0, 0.0, 1.0, 0.0]), "x").value == 0.25


def test_rows_are_those_of_the_examples_that_were_not_left_out():
    examples = [SimpleNamespace(name=name) for name in ("a:1", "a:2", "a:3")]
    left_out = {"counts": {"bad": [BadSample("a:2", "why")]}}
    assert ev.rows_of(examples, {"labels": torch.zeros(2, 4), **left_out}) == [0, 2]
    assert ev.rows_of(examples, {"labels": torch.zeros(3, 4)}) == [0, 1, 2]
    none = {"counts": {"bad": [BadSample(e.name, "why") for e in examples]}}
    assert ev.rows_of(examples, {"labels": torch.zeros(1, 4), **none}) == [0]
    assert row_of(torch.tensor([[True, False], [True, True]])).tolist() == [0, 1, 1]


def test_samples_are_picked_per_task_in_order():
    tasks = ["a", "b", "a", "a", "b"]
    assert ev.pick(tasks, 2) == {"a": [0, 2], "b": [1, 4]}
    assert ev.pick(tasks, None) == {"a": [0, 2, 3], "b": [1, 4]}


class Letters:
    """A tokenizer of six tokens."""

    texts = ("a", "1", " 23", "4.", "", "x7")

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, ids):
        return [self.texts[i] for (i,) in ids]


def test_digit_tokens_are_digits_only_and_cover_padded_vocabularies():
    assert ev.digit_tokens(Letters(), 8).tolist() == [False, True, True] + [False] * 5
    assert ev.digit_tokens(Letters(), 3).tolist() == [False, True, True]
