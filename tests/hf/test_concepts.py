"""Rows of phrases and concepts, and the collator's options for the other methods."""

from __future__ import annotations

from collections import Counter

import pytest

from groundkern.hf import GroundedExample, Phrase, Word
from groundkern.hf.data.concepts import composites
from tests.hf.collating import (
    IMAGE,
    SMALL,
    live,
    make_collator,
    make_dialogue,
    make_example,
    make_region,
    token_bytes,
)

ANSWER = "The red patch in row 2."


def phrase(text: str, subject: str | None = None, *, answer: str = ANSWER) -> Phrase:
    start = answer.index(text)
    own = None if subject is None else (answer.index(subject), answer.index(subject) + len(subject))
    return Phrase(1, start, start + len(text), own)


PHRASES = (
    phrase("The red patch in row 2"),
    phrase("The red patch", "patch"),
    phrase("red"),
    phrase("row 2", "row"),
)


@pytest.mark.parametrize("side", ["right", "left"])
def test_phrase_rows_predict_the_tokens_of_each_phrase(side):
    collator = make_collator(side=side)
    short = make_example("2", phrases=(Phrase(1, 0, 1),))
    batch = collator([make_example(ANSWER, phrases=PHRASES), short])
    position = live(batch["gk_phrase_position"][0])
    pieces = [
        x.strip().decode() for x in token_bytes(collator, batch, 0, [p + 1 for p in position])
    ]
    number, subject = (live(batch[f"gk_phrase_{n}"][0]) for n in ("number", "subject"))
    words = {n: [w for w, m in zip(pieces, number) if m == n] for n in set(number)}
    assert words[1] == ["The", "red", "patch"]
    assert words[2] == ["red"]
    assert words[0] == [*words[1], "in", *words[3]]
    assert [w for w, own in zip(pieces, subject) if own] == ["patch", "row"]
    assert batch["gk_phrase_composite"].tolist() == [[[0, 1, 3]], [[-1, -1, -1]]]
    assert live(batch["gk_phrase_number"][1]) == [0]
    assert collator.counts["phrases"] == 5
    assert collator.counts["composites"] == 1
    assert collator.counts["subject_rows"] == 2


def test_a_phrase_that_was_cut_takes_its_composite_with_it():
    whole = make_collator()([make_example(ANSWER, phrases=PHRASES)])
    length = whole["input_ids"].shape[1] - 4  # the end of turn, the stop and a piece of row 2
    collator = make_collator(max_length=length)
    batch = collator([make_example(ANSWER, phrases=PHRASES)])
    assert collator.counts["phrases_truncated"] == 2
    assert set(live(batch["gk_phrase_number"][0])) == {0, 1}
    assert batch["gk_phrase_composite"].shape[1] == 0


def test_composites_are_phrases_of_exactly_two_others():
    assert composites(PHRASES) == [(0, 1, 3)]
    assert composites(PHRASES[:2]) == []  # one part
    three = (phrase("The red patch in row 2"), phrase("The"), phrase("red"), phrase("row 2"))
    assert composites(three) == []
    overlapping = (phrase("The red patch"), phrase("The red"), phrase("red patch"))
    assert composites(overlapping) == []


def test_lens_rows_are_the_object_and_as_many_tokens_off_it():
    regions = [
        make_region(ANSWER, "red patch"),  # tokens 0
        make_region(ANSWER, "red", boxes=((0.8, 0.75, 1, 1),)),  # the same concept: token 19
        make_region(ANSWER, "row", boxes=((0, 0, 0.6, 0.25),)),  # tokens 0, 1, 2
    ]
    collator = make_collator(lens=True)
    batch = collator([make_example(ANSWER, regions)])
    columns = live(batch["gk_map_columns"][0])
    found = Counter()
    rows = (live(batch[f"gk_lens_{n}"][0]) for n in ("position", "label", "inside"))
    on: dict[int, set] = {}
    for position, label, inside in zip(*rows):
        found[label, inside] += 1
        if inside:
            on.setdefault(label, set()).add(columns.index(position))
    red, row = (collator._encoder.encode(w).labels[0].token for w in ("red", "row"))
    assert on == {red: {0, 19}, row: {0, 1, 2}}
    assert found == {(red, 1): 2, (red, 0): 2, (row, 1): 3, (row, 0): 3}
    everything = make_collator(lens=True, lens_outside=None)([make_example(ANSWER, regions)])
    assert len(live(everything["gk_lens_position"][0])) == 40
    assert make_collator()([make_example(ANSWER, regions)])["gk_lens_position"].shape == (1, 0)


def test_contrast_rows_say_which_words_of_their_image_they_are_on():
    regions = [
        make_region(ANSWER, "red patch"),  # tokens 0
        make_region(ANSWER, "red", boxes=((0.8, 0.75, 1, 1),)),  # the same word: token 19
        make_region(ANSWER, "row", boxes=((0, 0, 0.6, 0.25),)),  # tokens 0, 1, 2
    ]
    collator = make_collator(contrast=True)
    batch = collator([make_example(ANSWER, regions), make_example(ANSWER, regions[:2])])
    columns = live(batch["gk_map_columns"][0])
    labels = [set(live(row)) for row in batch["gk_contrast_label"][0]]
    said = dict(zip(map(columns.index, live(batch["gk_contrast_position"][0])), labels))
    red, row = (collator._encoder.encode(w).labels[0].token for w in ("red", "row"))
    assert said == {0: {red, row}, 1: {row}, 2: {row}, 19: {red}}
    assert set(live(batch["gk_contrast_bag"][0])) == {red, row}
    # a word alone in its image has nothing to be told from
    assert not live(batch["gk_contrast_position"][1])
    assert not live(batch["gk_contrast_bag"][1])
    names = ("rows", "words", "words_alone")
    assert [collator.counts[f"contrast_{name}"] for name in names] == [4, 2, 1]
    assert make_collator()([make_example(ANSWER, regions)])["gk_contrast_bag"].numel() == 0


@pytest.mark.parametrize(
    ("which", "pieces"),
    [
        ("last", ["."]),
        ("predictor", ["2"]),
        ("phrase", ["red", "patch", "row"]),
        ("phrase_predictor", ["The", "red", "in"]),
        ("answer", ["The", "red", "patch", "in", "row", "2", "."]),
        ("answer_predictor", ["", "The", "red", "patch", "in", "row", "2"]),
    ],
)
def test_map_rows_are_the_ones_asked_for(which, pieces):
    regions = [
        make_region(ANSWER, "red patch"),
        make_region(ANSWER, "row", boxes=((0.8, 0.75, 1, 1),)),
    ]
    collator = make_collator(map_rows=which, map_kind="uniform")
    batch = collator([make_example(ANSWER, regions)])
    found = token_bytes(collator, batch, 0, live(batch["gk_map_position"][0]))
    assert [piece.strip().decode().split("\n")[-1] for piece in found] == pieces
    tokens = live(batch["gk_map_token_position"][0])
    after = which.endswith("predictor")  # else the row is the token's own
    assert tokens == [row + after for row in live(batch["gk_map_position"][0])]
    peaks = [
        row.eq(row.max()).nonzero()[:, 0].tolist()
        for row in batch["gk_map_target"][0][: len(found)]
    ]
    own = which.startswith("phrase")
    assert peaks == ([[0], [0], [19]] if own else [[0, 19]] * len(pieces))
    if which == "phrase_predictor":
        assert live(batch["gk_map_position"][0]) == live(batch["gk_side_position"][0])


def test_a_token_without_a_visual_one_is_left_out_or_sees_language_alone():
    """The second image comes after the first answer: its region is empty there."""
    answers = ["The red patch.", "row 2 "]
    regions = (make_region(answers[0], "red", image=1),)
    example = GroundedExample((IMAGE, SMALL), make_dialogue(*answers), regions)
    assert make_collator()([example])["gk_side_position"].shape[1] == 0
    collator = make_collator(empty_region="language")
    batch = collator([example])
    assert collator.counts["side_rows_without_region"] == collator.counts["side_rows"] == 1
    (row,) = live(batch["gk_side_position"][0])
    assert not batch["gk_side_inside"][0, 0][: row + 1].any()


def test_a_multiset_bag_keeps_every_copy():
    words = tuple(
        Word(text, (x, 0, x + 0.2, 0.25), 0) for text, x in (("red", 0), ("row", 0.2), ("red", 0.4))
    )
    sizes = []
    for bag in ("distinct", "multiset"):
        batch = make_collator(label_bag=bag)([make_example(words=words)])
        sizes.append(len(live(batch["gk_word_bag"][0, 0])))
    assert sizes == [2, 3]


def test_unknown_options_are_refused():
    for option in ({"label_bag": "bag"}, {"map_rows": "first"}, {"empty_region": "all"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            make_collator(**option)
