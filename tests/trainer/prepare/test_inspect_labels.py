"""The table of labels on the page of `inspect`, and what it warns of."""

from __future__ import annotations

from collections import Counter

from groundkern.trainer.inspection.labels import label_table
from tests.trainer.prepare.records import sample
from tests.trainer.prepare.test_inspect import page

TEXT = {1: " ▁", 2: "red", 3: "7", 4: "grid"}.get


def test_a_label_that_most_words_share_is_seen_at_once():
    """As with Llama's tokenizer: every word was the blank before it."""
    counts = Counter(words=100, words_dropped_long=10, words_useless_blank=80, word_rows=90)
    table = label_table(counts, Counter({(1,): 80, (2,): 10}), TEXT)
    assert table.counts == {
        "words": "100",
        "kept": "90 (90.0%)",
        "dropped: long": "10 (10.0%)",
        "visual tokens labelled": "90",
        "distinct labels": "2",
        "useless labels": "80 (88.9% of kept)",
        "useless: blank": "80",
    }
    assert table.frequent == {"' ▁'": "88.9%", "'red'": "11.1%"}
    assert table.warnings == [
        "of the words kept, 88.9% have a label that says nothing (80 blank)",
        "88.9% of the labelled visual tokens have the label ' ▁'",
    ]


def test_good_labels_and_few_ones_are_not_warned_of():
    counts = Counter(words=100, words_shared_token=4, words_useless_digit=1)
    labels = Counter({(n,): 1 for n in range(80)}) + Counter({(2,): 15, (2, 3): 1})
    table = label_table(counts, labels, lambda token: TEXT(token, "x"))
    assert table.warnings == []
    assert table.counts["dropped: on a visual token with another"] == "4 (4.0%)"
    assert table.counts["distinct labels"] == "81"
    few = label_table(Counter(words=3), Counter({(2,): 3}), TEXT)
    assert few.warnings == []
    assert few.frequent == {"'red'": "100.0%"}
    assert label_table(Counter(words=3, words_dropped_long=3), Counter(), TEXT).counts["kept"] == (
        "0 (0.0%)"
    )
    assert label_table(Counter(), Counter(), TEXT) is None


def test_the_page_has_the_table(write, model):
    words = [
        {"text": "(the)", "box": [2, 2, 20, 20]},
        {"text": "12,121", "box": [30, 2, 50, 20]},
        {"text": "—", "box": [2, 30, 20, 50]},
    ]
    html = page(write(sample("Alice was tired", words=words)), "--model", str(model))
    shown = html.partition("Labels of words in the samples shown")[2]
    assert "<td>words</td><td>3</td>" in shown
    assert "<td>kept</td><td>2 (66.7%)</td>" in shown
    assert "<td>dropped: punctuation</td><td>1 (33.3%)</td>" in shown
    assert "<td>distinct labels</td><td>2</td>" in shown
    assert "&#39; the&#39;</code></td><td>50.0%</td>" in shown
