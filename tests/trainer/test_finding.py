"""Item 15: a text is found under another Unicode form, at the answer's own characters, or named."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundkern.trainer.data.finding import cuts, difference, occurrences
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("café", "un cafe\u0301 noir", ["cafe\u0301"]),
        ("cafe\u0301", "un café noir", ["café"]),
        ("\u1ec7", "e\u0323\u0302z e\u0302\u0323", ["e\u0323\u0302", "e\u0302\u0323"]),
        ("x\u0302", "x\u0302y", ["x\u0302"]),
        ("한국", unicodedata.normalize("NFD", "x 한국 y"), [unicodedata.normalize("NFD", "한국")]),
        ("...", "wait… and… ", ["…", "…"]),
        ("wait…", "wait... and", ["wait..."]),
        ("fine", "a ﬁne day", ["ﬁne"]),
        ("ﬁne", "a fine day", ["fine"]),
        ("ABC 12", "x ＡＢＣ\u3000１２ y", ["ＡＢＣ\u3000１２"]),
        ("ガス", "ｶﾞｽ", ["ｶﾞｽ"]),
        ("10 km", "10\u00a0km", ["10\u00a0km"]),
        ("株式会社", "㍿x", ["㍿"]),
        ("aa", "aaa", ["aa", "aa"]),  # they may overlap
        ("fi", "fi ﬁ", ["fi"]),  # as it is written comes first, alone
    ],
)
def test_found_under_another_form(text, answer, found):
    spans = occurrences(text, answer)
    assert [answer[start:stop] for start, stop in spans] == found


@pytest.mark.parametrize(
    ("text", "answer", "named"),
    [
        ("cafe", "un café", "has U+00E9 LATIN SMALL LETTER E WITH ACUTE where this has U+0065"),
        ("cafe", "un cafe\u0301", "the message goes on with U+0301 COMBINING ACUTE ACCENT"),
        ("naïve", "naive", "has U+0069 LATIN SMALL LETTER I where this has U+00EF"),
        ("..", "wait…", "has U+2026 HORIZONTAL ELLIPSIS where this has U+002E FULL STOP"),
        ("i", "ﬁ", "has U+FB01 LATIN SMALL LIGATURE FI where this has U+0069"),
        ("1", "½", "has U+00BD VULGAR FRACTION ONE HALF"),
        ("하", unicodedata.normalize("NFD", "한"), "U+1112 HANGUL CHOSEONG HIEUH"),
        ("か", unicodedata.normalize("NFD", "が"), "goes on with U+3099"),
        ("ﬁance", "fiance\u0301", "has U+0066 LATIN SMALL LETTER F where this has U+FB01"),
        ("don't", "I don’t", "has U+2019 RIGHT SINGLE QUOTATION MARK where this has U+0027"),
        ("a - b", "a – b", "has U+2013 EN DASH where this has U+002D HYPHEN-MINUS"),
        ("The cat", "the cat", "has U+0074 LATIN SMALL LETTER T where this has U+0054"),
        ("ab", "a\u200bb", "has U+200B ZERO WIDTH SPACE where this has U+0062"),
        ("ab\u200b", "ab", "this goes on with U+200B ZERO WIDTH SPACE"),
        ("dog", "the cat", None),
    ],
)
def test_not_found_and_what_differs_is_named(text, answer, named):
    assert occurrences(text, answer) == []
    why = difference(text, answer)
    assert why == named if named is None else named in why


ALPHABET = "aeiofx. …ﬁé\u0301\u0323가각각ｶﾞガ²½ﷺＡ\u200b"


@given(st.text(ALPHABET, max_size=12), st.text(ALPHABET, min_size=1, max_size=5))
def test_a_span_is_whole_characters_that_equal_the_text(answer, text):
    """Never a wrong span: it is NFKC-equal to the text, and cuts no character at either end."""
    for start, stop in occurrences(text, answer):
        assert 0 <= start < stop <= len(answer)
        part = answer[start:stop]
        assert unicodedata.normalize("NFKD", part) == unicodedata.normalize("NFKD", text)
        composed = unicodedata.normalize("NFC", answer)
        ends = (answer[:start], part, answer[stop:])
        assert "".join(unicodedata.normalize("NFC", end) for end in ends) == composed
        assert not cuts(answer, start)


@given(st.text(ALPHABET, max_size=8), st.text("abcé각 ﬁ", min_size=1, max_size=5), st.text("x "))
def test_a_text_in_any_form_is_found_in_an_answer_of_any_form(before, text, behind):
    answer = before + " " + text + " " + behind
    for written in ("NFC", "NFD", "NFKC", "NFKD"):
        for asked in ("NFC", "NFD", "NFKC", "NFKD"):
            found = occurrences(
                unicodedata.normalize(asked, text), unicodedata.normalize(written, answer)
            )
            assert found, (written, asked)


def _parse(answer, **span):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    phrases = [span]
    return parse_sample({"messages": messages, "phrases": phrases}, root=None, where="d.jsonl:3")


def test_samples_find_texts_and_subjects_under_another_form():
    answer = "un cafe\u0301 noir, cafe\u0301"
    (phrase,) = _parse(answer, text="café noir", subject="café").phrases
    assert (phrase.start, phrase.stop, phrase.subject) == (3, 13, (3, 8))
    (phrase,) = _parse(answer, text="café", occurrence=1).phrases
    assert answer[phrase.start : phrase.stop] == "cafe\u0301"
    assert phrase.start == 15
    for span, message in (
        ({"text": "cafe"}, "`phrases[0].text`: expected text that occurs in message 1, "),
        ({"text": "cafe"}, "got 'cafe': the message goes on with U+0301 COMBINING ACUTE ACCENT"),
        ({"text": "café", "occurrence": 2}, "`phrases[0].occurrence`: expected less than 2"),
        ({"text": "café noir", "subject": "cafe"}, "`phrases[0].subject`: expected words of"),
        ({"text": "café noir", "subject": "Noir"}, "has U+006E LATIN SMALL LETTER N where this"),
    ):
        with pytest.raises(SampleError) as caught:
            _parse(answer, **span)
        assert message in str(caught.value)


@pytest.mark.parametrize("character", [0, 0xFDD0, 0xFDD1])
def test_text_that_the_collator_refuses_is_refused_before_training(character):
    for messages in ([("user", "a{}b"), ("assistant", "x")], [("assistant", "a{}b")]):
        chat = [{"role": r, "content": c.format(chr(character))} for r, c in messages]
        with pytest.raises(SampleError, match=rf"messages\[0\].content`: .*U\+{character:04X}"):
            parse_sample({"messages": chat}, root=None, where="d.jsonl:3")
