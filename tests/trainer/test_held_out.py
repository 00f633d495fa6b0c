"""Held-out figures from hand-made model outputs."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from groundkern.maps import FIXED_POINT_ONE
from trainer.evaluation import held_out as ev


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
        "gk_map_image": torch.tensor([[1], [0]], dtype=torch.int32),
        "gk_map_target": torch.tensor([[[0, 0, one, half]], [[one, half, -1, -1]]]).int(),
        "gk_map_columns": torch.tensor([[1, 2, 3, 4], [1, 2, -1, -1]], dtype=torch.int32),
    }


def figures(add, *args) -> dict[str, float]:
    tally = ev.Tally()
    add(tally, *args)
    return tally.means()


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
    labels = Counter()
    assert figures(ev.add_words, batch(), predicted, labels) == pytest.approx(
        {"word_accuracy": 1 / 3}
    )
    assert labels == {7: 2, 8: 1}


def test_a_batch_without_regions_gives_no_figure():
    empty = batch()
    for key, width in (("gk_side_position", 0), ("gk_side_set", 0), ("gk_word_position", 0)):
        empty[key] = empty[key][:, :width]
    empty["gk_side_inside"] = empty["gk_side_inside"][:, :0]
    empty["gk_word_label"] = empty["gk_word_label"][:, :0]
    assert figures(ev.add_words, empty, torch.zeros(2, 0), Counter()) == {}
    assert figures(ev.add_contributions, empty, torch.zeros(2, 0, 4)) == {}


def test_undefined_values_take_no_part_in_a_mean():
    tally = ev.Tally()
    tally.add("x", torch.tensor([1.0, float("nan"), 3.0]))
    tally.add("y", torch.tensor([float("nan")]))
    assert tally.means() == {"x": 2.0}


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
