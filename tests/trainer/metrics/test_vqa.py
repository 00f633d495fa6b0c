"""VQA accuracy against the paper's own examples and what its evaluation code documents."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.metrics.answers import normalised_match
from groundkern.trainer.metrics.vqa import CONTRACTIONS, vqa_accuracy, vqa_words


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_ten_answers(agree, accuracy):
    votes = ["red"] * agree + [f"colour {i}" for i in range(10 - agree)]
    assert vqa_accuracy("red", votes) == pytest.approx(accuracy)
    assert vqa_accuracy("Red.", votes[::-1]) == pytest.approx(accuracy)


quick = settings(max_examples=60, deadline=None, derandomize=True)


@quick
@given(st.lists(st.sampled_from("xyz"), max_size=12), st.sampled_from("xyz"))
def test_it_is_the_mean_over_all_votes_but_one(votes, said):
    others = list(combinations(votes, len(votes) - 1)) if votes else []
    each = [min(1.0, left.count(said) / 3) for left in others]
    mean = sum(each) / len(each) if each else 0
    assert vqa_accuracy(said, votes) == pytest.approx(mean)


@pytest.mark.parametrize(
    ("answers", "best"), [(1, 0), (2, 1 / 3), (3, 2 / 3), (4, 1), (5, 1), (10, 1)]
)
def test_fewer_than_four_answers_cannot_make_one_right(answers, best):
    assert vqa_accuracy("yes", ["yes"] * answers) == pytest.approx(best)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Red\nBus\t", "red bus"),
        ("two", "2"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("1,000 a/b", "1000 ab"),  # a comma between digits takes the gaps of all marks
        ("a/b", "b"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("red-white", "red white"),
        ("red - white-blue", "red whiteblue"),  # a mark with a space beside it somewhere
        ("2.5", "2.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("p.m.", "pm"),
        ("3:30", "3:30"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("-5", "5"),
        ("dont", "don't"),
        ("Don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("ill", "ill"),
        ("what is this?!", "what is this"),
        ("the", ""),
    ],
)
def test_texts_are_made_comparable_as_vqa_does(text, words):
    assert vqa_words(text) == words


def test_the_table_of_contractions():
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == "y'all'd've"
    assert {CONTRACTIONS[word] for word in ("twas", "oclock", "maam")} == {
        "'twas",
        "o'clock",
        "ma'am",
    }
    assert CONTRACTIONS["somebody'd"] == "somebodyd"  # the table's own slip
    assert not {"its", "id", "im", "ive", "well", "were", "shes"} & set(CONTRACTIONS)


def test_all_the_same_votes_are_treated_as_others_are():
    """vqaEval.py then changes the prediction alone: "u.s." is "us" and wrong."""
    assert vqa_accuracy("U.S.", ["u.s."] * 10) == 1
    assert vqa_accuracy("the bus", ["The bus"] * 5 + ["a bus"] * 5) == 1


def test_numbers_lose_their_sign_as_in_vqa_s_code_and_not_in_normalised_match():
    assert vqa_accuracy("-5", ["5"] * 10) == 1
    assert normalised_match("-5", "5") == 0
    for words in ("two", "the two", "Two."):
        assert vqa_accuracy(words, ["2"] * 10) == normalised_match(words, "2") == 1


def test_no_votes_and_empty_texts():
    assert vqa_accuracy("yes", []) == 0
    assert vqa_accuracy("", ["yes"] * 10) == 0
    assert vqa_accuracy("", [""] * 10) == 1


@quick
@given(st.text(max_size=40))
def test_every_text_agrees_with_itself(text):
    assert vqa_accuracy(text, [text] * 4) == 1
