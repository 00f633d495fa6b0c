"""`benchmarks.preparing.real_charts`: its labels, what a right link is, images by their bytes."""

import hashlib
import json
import re
from collections import defaultdict

import pytest
from PIL import Image

from benchmarks.preparing.links import Link, Score, agree
from benchmarks.preparing.real_charts import (
    LABELS,
    Labelled,
    Words,
    images_of,
    labelled,
    main,
    measure,
)
from groundkern.trainer.prepare.marks.grouping import PrintedWord
from groundkern.trainer.prepare.marks.matching import Match, Place, PrintedText

BOX = (10.0, 10.0, 40.0, 20.0)


def test_labels_name_forty_charts_half_of_them_held_out():
    halves = defaultdict(set)
    for label in labelled():  # finds each phrase in its answer
        halves[label.half].add(label.sha256)
        assert label.links and label.question
        for link in label.links + label.allowed:
            x0, y0, x1, y1 = link.box
            assert 0 <= x0 < x1 and 0 <= y0 < y1
    assert {half: len(each) for half, each in halves.items()} == {"development": 20, "held out": 20}
    assert not halves["development"] & halves["held out"]
    for line in LABELS.read_text().splitlines():
        row = json.loads(line)
        assert re.fullmatch(r"[0-9a-f]{64}", row["sha256"])
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"]) and "/" in row["repository"]


@pytest.mark.parametrize(
    ("text", "box", "right"),
    [
        ("45", BOX, True),
        ("45 percent", BOX, True),
        ("45 percent.", BOX, True),
        ("is 45", BOX, False),
        ("5", BOX, False),
        ("45", (24.0, 14.0, 26.0, 16.0), True),
        ("45", (38.0, 10.0, 60.0, 20.0), False),
        ("45", (0.0, 0.0, 200.0, 200.0), False),
    ],
)
def test_a_link_is_right_if_words_and_place_are(text, box, right):
    answer = "It is 45 percent."
    start = answer.index(text)
    true = Link(6, 8, BOX)
    assert agree(answer, true, Link(start, start + len(text), box)) is right


def test_allowed_links_are_neither_right_nor_false():
    score = Score()
    answer = "The wine of Spain"
    found = [Match(4, 8, (Place(0, BOX),), False), Match(12, 17, (Place(0, BOX),), False)]
    score.add(answer, [], found, "here", allowed=[Link(0, 8, BOX)])
    assert score.links == {"found": 1, "false": 1, "true": 0, "missing": 0}
    assert score.wrong == ["here: false 'Spain' (10, 10, 40, 20)"]
    assert (score.precision, score.recall) == (0.0, 1.0)


def test_images_are_found_by_their_bytes_and_missing_ones_counted(tmp_path, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "deep" / "er" / "chart.png"
    Image.new("RGB", (60, 40), "white").save(path)
    (tmp_path / "chart.png").write_bytes(b"another")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert images_of(tmp_path, {digest: "chart.png", "0" * 64: "chart.png"}) == {digest: path}
    assert main([str(tmp_path)]) == 0
    assert "0 of 40 images found" in capsys.readouterr().out


def test_an_image_is_read_once_and_drawn(tmp_path):
    path = tmp_path / "chart.png"
    Image.new("RGB", (200, 100), "white").save(path)
    reads = []

    def read(path):
        reads.append(path)
        return [PrintedWord("Spain", BOX), PrintedWord("7", (60.0, 10.0, 66.0, 20.0))]

    true = (Link(3, 8, BOX), Link(15, 16, (160.0, 10.0, 166.0, 20.0)))
    label = Labelled(
        "chart.png", "a", "held out", "made", "How many?", "In Spain it is 7.", true, ()
    )
    match = lambda words, label: PrintedText(words).matches(label.answer)  # noqa: E731
    for _ in range(2):
        words = Words(read, tmp_path / "words.json")
        scores = measure([label], {"a": path}, words, match, tmp_path)
    assert len(reads) == 1 and sorted(scores) == ["all", "held out", "held out, made"]
    assert scores["all"].links == {"found": 2, "true": 2, "false": 1, "missing": 1}
    assert Image.open(tmp_path / "chart.png (0).png").getpixel((10, 10)) != (255, 255, 255)
    assert measure([label], {}, words, match) == {}
