"""Error rates of read text against jiwer and its documented cases."""

from __future__ import annotations

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundkern.trainer.metrics.reading import cer, plain, wer

quick = settings(max_examples=60, deadline=None, derandomize=True)


# jiwer's test_cer.py and test_wer.py; the second table is of "From WER and RIL to MER and WIL".
@pytest.mark.parametrize(
    ("gold", "predicted", "value"),
    [
        ("This is a test", "This is a test", (0, 14)),
        ("This is a test", "", (14, 14)),
        ("This is a test", "This test", (5, 14)),
        ("X", "X", (0, 1)),
        ("X", "X X Y Y", (6, 1)),
        ("X Y X", "X Z", (3, 5)),
        ("X", "Y", (1, 1)),
        ("X", "Y Z", (3, 1)),
    ],
)
def test_jiwer_s_cases_of_characters(gold, predicted, value):
    assert cer(predicted, gold) == value


@pytest.mark.parametrize(
    ("gold", "predicted", "value"),
    [
        ("This is a test", "This is a test", (0, 4)),
        ("This is a test", "", (4, 4)),
        ("This is a test", "This test", (2, 4)),
        ("X", "X X Y Y", (3, 1)),
        ("X Y X", "X Z", (2, 3)),
        ("X", "Y Z", (2, 1)),
    ],
)
def test_jiwer_s_cases_of_words(gold, predicted, value):
    assert wer(predicted, gold) == value


def test_a_rate_of_several_is_the_sum_of_edits_over_the_sum_of_lengths():
    golds, predicted = ["i", "am i good"], ["i am", "y good"]  # jiwer's: 0.7
    counted = [cer(p, g) for p, g in zip(predicted, golds, strict=True)]
    edits, lengths = map(sum, zip(*counted, strict=True))
    assert edits / lengths == jiwer.cer(golds, predicted) == 0.7
    assert sum(e / n for e, n in counted) / 2 != pytest.approx(0.7)


def test_an_empty_gold_counts_as_one_character_so_that_inventions_count():
    assert cer("test", "") == (4, 1)
    assert wer("a b", " \n") == (2, 1)
    assert cer("", "") == wer("", "") == (0, 1)


def test_white_space_and_composed_accents_are_no_errors_and_case_is():
    assert cer("a\n b", " a b") == (0, 3)
    assert cer("cafe\u0301", "caf\u00e9") == (0, 4)
    assert cer("A b.", "a b") == (2, 3)
    assert wer("A b.", "a b") == (2, 2)


def test_plain_text_has_neither_case_nor_punctuation_nor_ligatures():
    assert cer("A, b.", "a b", normalise=plain) == (0, 3)
    assert wer("A b!", "a b", normalise=plain) == (0, 2)
    assert cer("\ufb01n", "fin", normalise=plain) == (0, 3)
    assert cer("\ufb01n", "fin") == (2, 3)


def test_of_several_golds_the_one_with_the_lowest_rate():
    assert cer("abd", ["x", "abc", "abdefgh"]) == (1, 3)
    assert cer("ab", ["a", "abcd"]) == (2, 4)  # more edits, and a lower rate
    assert cer("a", []) == (0, 0)


texts = st.one_of(st.text(max_size=30), st.text(alphabet="ab \n.", max_size=30))


@quick
@given(texts, texts)
def test_edits_are_jiwer_s(predicted, gold):
    edits, length = cer(predicted, gold, normalise=_spaces)
    if _spaces(gold):
        assert edits / length == pytest.approx(jiwer.cer(_spaces(gold), _spaces(predicted)))
    else:
        assert (edits, length) == (len(_spaces(predicted)), 1)


@quick
@given(texts)
def test_the_same_text_has_no_error(text):
    for metric in (cer, wer):
        for normalise in (plain, _spaces):
            assert metric(text, text, normalise=normalise)[0] == 0


def _spaces(text):
    return " ".join(text.split())
