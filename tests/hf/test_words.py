"""DV-SFT's labels: which visual token shows which word, and which words are dropped."""

from __future__ import annotations

import pytest

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern.hf import GroundingCollator
from groundkern.hf.data.example import Word
from tests.hf.collating import IMAGE, SMALL, live, make_collator, make_example
from tests.hf.families import FAMILIES


def _labels(collator, words, images=(IMAGE,)):
    batch = collator([make_example(images=images, words=tuple(words))])
    columns = live(batch["gk_map_columns"][0])
    tokenizer = collator.processor.tokenizer
    return {
        columns.index(p): tokenizer.convert_ids_to_tokens(label)
        for p, label in zip(
            live(batch["gk_word_position"][0]), live(batch["gk_word_label"][0]), strict=True
        )
    }, batch


def test_words_label_the_token_under_their_bottom_right_corner():
    words = [
        Word("grid", (0.05, 0.05, 0.2, 0.25), 0),  # ends exactly on the edges of token 0
        Word("row", (0.0, 0.3, 0.21, 0.4), 0),  # reaches into the second column
        Word("column", (0.7, 0.8, 1.0, 1.0), 0),  # ends with the image
    ]
    labels, batch = _labels(make_collator(), words)
    assert labels == {0: "Ġgrid", 6: "Ġrow", 19: "Ġcolumn"}
    assert sorted(live(batch["gk_word_bag"][0, 0])) == sorted(live(batch["gk_word_label"][0]))
    labels, _ = _labels(make_collator(leading_space=False), words[:1])
    assert list(labels) == [0]
    assert not labels[0].startswith("Ġ")


def test_only_the_first_token_is_the_label_and_long_or_tall_words_are_dropped():
    tokenizer = tiny_qwen_processor().tokenizer
    assert [len(tokenizer(" " + text)["input_ids"]) for text in ("coals", "zzzz")] == [2, 5]
    words = [
        Word("coals", (0, 0, 0.1, 0.1), 0),
        Word("zzzz", (0.4, 0, 0.5, 0.1), 0),
        Word("red", (0.8, 0.0, 0.9, 0.76), 0),  # 3.04 tokens tall
        Word("grid", (0.6, 0.0, 0.7, 0.75), 0),  # exactly 3
        Word(" \n", (0.6, 0.0, 0.7, 0.25), 0),
    ]
    collator = make_collator()
    labels, _ = _labels(collator, words)
    assert labels == {0: "Ġcoal", 13: "Ġgrid"}
    dropped = {key: n for key, n in collator.counts.items() if key.startswith("words_") and n}
    assert dropped == {
        "words_dropped_long": 1,
        "words_dropped_tall": 1,
        "words_dropped_blank": 1,
    }
    labels, _ = _labels(make_collator(max_label_tokens=5, max_word_patches=4), words)
    assert set(labels) == {0, 2, 13, 19}


def test_later_tokens_of_a_word_label_it_too():
    """ " coals" is 2 tokens, " zzzz" 5, which is long unless all of them are labels; a token that
    two words share has those of both."""
    words = [
        Word("coals", (0, 0, 0.1, 0.1), 0),
        Word("zzzz", (0.4, 0, 0.5, 0.1), 0),
        Word("red", (0.8, 0.0, 0.9, 0.1), 0),
        Word("coal", (0.8, 0.0, 0.85, 0.1), 0),
    ]
    collator = make_collator(word_label="several", on_shared_token="several")
    labels, batch = _labels(collator, words)
    assert set(labels) == {0, 2, 4}
    several = {frozenset(live(row)) for row in batch["gk_several_label"][0]}
    ids = collator.processor.tokenizer.convert_tokens_to_ids
    assert frozenset(ids(["Ġcoal", "s"])) in several
    assert frozenset(ids(["Ġred", "Ġcoal"])) in several
    assert collator.counts["words_dropped_long"] == 0
    last = make_collator(word_label="last")
    assert _labels(last, words[:2])[0] == {0: "s"}
    assert last.counts["words_dropped_long"] == 1


@pytest.mark.parametrize(
    ("mode", "wanted", "lost"), [("drop", {}, 2), ("last", "Ġrow", 1), ("largest", "Ġgrid", 1)]
)
def test_words_that_share_a_token(mode, wanted, lost):
    words = [Word("grid", (0, 0, 0.15, 0.1), 0), Word("row", (0.1, 0.1, 0.12, 0.12), 0)]
    collator = make_collator(on_shared_token=mode)
    labels, batch = _labels(collator, words)
    assert labels == ({0: wanted} if wanted else {})
    assert collator.counts["words_shared_token"] == lost
    assert collator.counts["word_rows"] == 2 - lost
    assert len(live(batch["gk_word_bag"])) == 2 - lost


def test_a_blank_first_token_is_no_label():
    words = [Word("\u4f60", (0, 0, 0.1, 0.1), 0)]  # " " + three bytes in this tokenizer
    collator = make_collator(max_label_tokens=8, byte_fragments="keep")
    labels, _ = _labels(collator, words)
    assert collator.processor.tokenizer(" \u4f60")["input_ids"][0] == (
        collator.processor.tokenizer.convert_tokens_to_ids("Ġ")
    )
    assert labels[0] != "Ġ"


def test_bags_are_the_distinct_labels_of_each_image():
    words = [
        Word("grid", (0.0, 0.0, 0.1, 0.1), 0),
        Word("grid", (0.4, 0.0, 0.5, 0.1), 0),
        Word("row", (0.8, 0.0, 0.9, 0.1), 0),
        Word("red", (0.0, 0.0, 0.4, 0.2), 1),
    ]
    labels, batch = _labels(make_collator(), words, images=(IMAGE, SMALL))
    assert labels == {0: "Ġgrid", 2: "Ġgrid", 4: "Ġrow", 20: "Ġred"}
    ids = tiny_qwen_processor().tokenizer.convert_tokens_to_ids
    assert [set(live(bag)) for bag in batch["gk_word_bag"][0]] == [
        {ids("Ġgrid"), ids("Ġrow")},
        {ids("Ġred")},
    ]


@pytest.mark.parametrize(("family", "views"), [("llava_next", (0, 16)), ("internvl", (-4, None))])
def test_a_word_in_two_views_labels_the_finer_one(family, views):
    """The global view comes first in LLaVA-NeXT and last in InternVL; its tokens are larger."""
    made = FAMILIES[family]
    collator = GroundingCollator(made.processor(), made.model().config)
    labels, batch = _labels(collator, [Word("row", (0.3, 0.3, 0.52, 0.4), 0)])
    tokens = range(len(live(batch["gk_map_columns"][0])))
    (token,) = labels
    assert token not in tokens[slice(*views)]
