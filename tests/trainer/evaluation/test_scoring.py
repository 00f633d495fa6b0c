"""Metrics that a sample gets, boxes in special tokens, and what a failure is."""

from __future__ import annotations

import pytest
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.evaluation.pictures import _entry, _mark
from groundkern.trainer.evaluation.report import tables
from groundkern.trainer.evaluation.rows import identity
from groundkern.trainer.evaluation.scoring import Marks, Scoring, about, check_names

BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"
NEAR = "<|box_start|>(100,200),(300,390)<|box_end|>"


def sample(tmp_path, answer: str, **fields):
    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.png")
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return parse_sample(
        {"images": ["a.png"], "messages": chat, **fields}, root=tmp_path, where="test.jsonl:1"
    )


def row(text: str, gold: str, **fields) -> dict:
    return {"sample": 0, "hash": identity(0), "prediction": text, "gold": [gold], **fields}


def test_boxes_are_read_with_special_tokens_and_texts_without(tmp_path):
    """A tokenizer drops <|box_start|> from the text; the notation says that these are per mille."""
    scoring = Scoring(["box_accuracy", "exact_match"], None)
    scoring.prepare([(0, sample(tmp_path, BOX))])
    same = row("(100,200),(300,400)", "(100,200),(300,400)", raw=BOX)
    assert scoring.score(same) == {"box_accuracy": [1, 1], "exact_match": [1, 1]}
    near = row("(100,200),(300,390)", "(100,200),(300,400)", raw=NEAR, task="")
    assert scoring.score(near) == {"box_accuracy": [1, 1], "exact_match": [0, 1]}
    marks = scoring.marks(near)
    assert marks.right.boxes == [(0.1, 0.2, 0.3, 0.4)]
    assert marks.answered.boxes == [(0.1, 0.2, 0.3, 0.39)]


def test_masks_are_marked_and_outlined(tmp_path):
    region = {"text": "four", "mask": {"size": [20, 40], "counts": [200, 400, 200]}}
    scoring = Scoring(["pointing_accuracy"], None)
    scoring.prepare([(0, sample(tmp_path, "four", regions=[region]))])
    point = row('{"point_2d": [500, 100]}', "four", task="")
    assert scoring.score(point) == {"pointing_accuracy": [1, 1]}
    marks = scoring.marks(point)
    (mask,) = marks.right.masks
    assert mask[:, 10:30].all()
    assert mask.sum() == 400
    (line,) = _entry(marks.right)["polylines"]
    assert {x for x, _ in line} == {0.25, 0.75} | {x for x, _ in line if 0.25 < x < 0.75}


def test_a_metric_that_does_not_fit_leaves_the_sample_out(tmp_path):
    scoring = Scoring(["box_accuracy", "anls"], None)
    scoring.prepare([(0, sample(tmp_path, "four"))])
    assert scoring.score(row("four", "four")) == {"anls": [1, 1]}
    assert scoring.marks(row("four", "four", task="")).answered == Marks([], [])


def test_several_golds_and_error_rates(tmp_path):
    scoring = Scoring(["exact_match", "cer"], None)
    scoring.prepare([(0, sample(tmp_path, "four", answers=["4"]))])
    found = scoring.score({**row("4", "four"), "gold": ["four", "4"]})
    assert found["exact_match"] == [1, 1]
    assert found["cer"][0] == 0


def test_votes_count_as_often_as_they_were_given_and_without_special_tokens(tmp_path):
    scoring = Scoring(["vqa_accuracy", "exact_match"], None)
    votes = ["four<|im_end|>"] * 2 + ["five"] * 8
    scoring.prepare([(0, sample(tmp_path, "four", answers=votes))])
    found = scoring.score({**row("four", ""), "gold": ["four", "four", "five"]})
    assert found == {"vqa_accuracy": [pytest.approx(0.6), 1], "exact_match": [1, 1]}
    with_token = scoring.score({**row("Five.", ""), "gold": ["four", "four", "five"]})
    assert with_token["vqa_accuracy"] == [1, 1]


@pytest.mark.parametrize(
    ("names", "figures", "bad"),
    [
        (["anls"], {"anls": [1, 1]}, None),
        (["anls"], {"anls": [0.25, 1]}, 0.75),
        (["cer", "anls"], {"cer": [0, 4], "anls": [0, 1]}, None),
        (["cer", "anls"], {"cer": [6, 4], "anls": [1, 1]}, 1.5),
        (["box_iou", "anls"], {"anls": [0, 1]}, 1),
        (["box_iou"], {}, None),
    ],
)
def test_badness_is_that_of_the_first_metric_a_sample_has(tmp_path, names, figures, bad):
    scoring = Scoring(names, None)
    scoring.prepare([(0, sample(tmp_path, "four"))])
    assert scoring.badness({**row("x", "four"), "task": "", "figures": figures}) == bad


def test_names_are_checked_and_every_figure_has_a_title():
    with pytest.raises(ConfigError, match=r"--metrics: expected some of exact_match.*, got wit"):
        check_names(["anls", "wit"])
    check_names(None)
    assert about("cer").higher_is_better is False
    assert about("attention_ratio").teacher_forced
    assert about("answer_loss").higher_is_better is False


def test_answers_far_off_the_image_are_not_drawn():
    image = Image.new("RGB", (40, 20), "white")
    _mark(image, Marks(boxes=[(1e300, 0, 2e300, 1)], points=[(-1e9, 3.0)]))
    assert len(image.getcolors()) == 1
    _mark(image, Marks(boxes=[(0.1, 0.1, 0.5, 0.9)], points=[(0.5, 0.5)]))
    assert len(image.getcolors()) == 2


@pytest.mark.parametrize(
    ("name", "value", "p_value", "samples", "verdict", "shown"),
    [
        ("exact_match", 0.25, 0.0004, 20, "better", "<0.001"),
        ("exact_match", -0.25, 0.04, 20, "worse", "0.040"),
        ("cer", -0.25, 0.04, 90, "better", "0.040"),
        ("cer", 0.05, 0.4, 90, "", "0.400"),  # its interval has 0
        ("cer", 0.05, 0.04, 90, "", "0.040"),
        ("exact_match", 1.0, 0.125, 4, "", "0.125"),  # 4 of 4 against 0 of 4
        ("exact_match", 0.25, 0.06, 90, "", "0.060"),
        ("exact_match", 0.25, 0.04, 19, "", "0.040"),
    ],
)
def test_a_difference_is_coloured_beyond_chance_alone(
    name, value, p_value, samples, verdict, shown
):
    figure = {"value": 0.5, "low": 0.4, "high": float("nan"), "samples": 9}
    gap = {"of": 0.5, "other": 0.5 - value, "value": value, "p_value": p_value, "samples": samples}
    gap |= {"low": value - 0.1, "high": value + 0.1}
    evaluation = {
        "metrics": {name: about(name)._asdict()},
        "tasks": {"t": {"samples": 9, "figures": {name: figure}}},
        "compared": {"tasks": {"t": {name: gap}}},
    }
    ((task, (row,)),) = tables(evaluation)
    assert (task, row["verdict"], row["p"]) == ("t", verdict, shown)
    assert row["interval"] == "–"
    assert row["difference"].startswith(f"{value:+.3f} (")
