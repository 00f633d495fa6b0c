"""The registry: what a sample is measured by, and that no text makes a metric raise."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from groundkern.hf.data.example import Region
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.metrics.golds import Gold, coord_of, gold_places
from groundkern.trainer.metrics.registry import (
    METRICS,
    TASK_METRICS,
    default_metrics,
    gold_of,
    task_metrics,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
BOX = Region(turn=1, start=0, stop=1, image=0, boxes=((0.1, 0.2, 0.5, 0.5),))
POINTS = Region(turn=1, start=0, stop=1, image=0, points=((0.1, 0.2), (0.5, 0.5)))


def scored(name, predicted, gold):
    return METRICS[name].score(predicted, gold)


def test_names_and_tasks():
    assert all(name == metric.name for name, metric in METRICS.items())
    assert {name for names in TASK_METRICS.values() for name in names} <= set(METRICS)
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {
        "cer",
        "wer",
        "cer_plain",
        "wer_plain",
    }


def test_every_metric_is_in_the_documentation():
    root = Path(__file__).parents[3]
    page = root.joinpath("docs", "running", "metrics.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1] for line in page.partition("## Where")[0].splitlines() if "|" in line
    ]
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == set(METRICS)


@pytest.mark.parametrize(
    ("task", "answer", "names"),
    [
        ("chartqa_human", "12", ("relaxed_accuracy", "relaxed_accuracy_pix2struct")),
        ("docvqa", "12", ("anls", "exact_match")),
        ("squad", "Denver", ("squad_match", "token_f1")),
        ("grid_patch", "row 3 column 5", ("exact_match", "coordinates")),
        ("word_page", "a b c", ("exact_match", "cer", "wer")),
        ("line_tracing", "3", ("exact_match",)),
        ("refcoco", "[1, 2, 3, 4]", ("box_accuracy", "box_iou", "centre_accuracy")),
        (
            "refcoco_val",
            "<loc0001>" * 2 + "<loc0009>" * 2,
            ("box_accuracy", "box_iou", "centre_accuracy"),
        ),
        ("refcocog", "the left cat", ("exact_match",)),  # asked for words, not for a box
        ("pixmo_points", "3", ("exact_match",)),  # asked how many there are
        (
            "pixmo_points",
            '<point x="1" y="2">',
            ("exact_match", "pointing_accuracy", "pointing_f1"),
        ),
        ("chart_to_table", "a | b\n1 | 2", ("table_f1", "number_set_similarity")),
        ("", "[1, 2, 3, 4]", ("box_accuracy", "box_iou", "centre_accuracy")),
        ("", "(1, 2)", ("pointing_accuracy", "pointing_f1")),
        ("", "| a | b |\n|---|---|\n| 1 | 2 |", ("table_f1", "number_set_similarity")),
        ("", "12, 15", ("exact_match", "coordinates")),  # bare numbers may count anything
        ("", "1, 2, 3, 4", ("exact_match", "coordinates")),
        ("", "as figures (3, 5) of this page show", ("exact_match", "token_f1", "cer", "wer")),
        ("", "12.5 %", ("exact_match", "relaxed_accuracy")),
        ("pages", "Paris", ("exact_match", "normalised_match", "anls")),
        ("", "row 3 column 5", ("exact_match", "coordinates")),
        ("", "他于2022年6月入选神舟16号", ("exact_match", "token_f1", "cer", "wer")),
        ("", "第3行 第5列", ("exact_match", "token_f1", "cer", "wer")),
        ("", "巴黎", ("exact_match", "normalised_match", "anls")),
        ("", "one two three four five six", ("exact_match", "token_f1", "cer", "wer")),
        ("", "", ("exact_match", "normalised_match", "anls")),
    ],
)
def test_what_a_sample_gets(task, answer, names):
    gold = Gold((answer,), task=task, regions=(BOX, POINTS))
    assert default_metrics(gold) == names


def test_a_sample_s_own_metrics_come_first_if_they_fit():
    gold = Gold(("cat",), task="docvqa", regions=(BOX,), metrics=("wer", "box_iou", "table_f1"))
    assert default_metrics(gold) == ("wer", "box_iou")
    assert default_metrics(Gold(("cat",), metrics=("table_f1",))) == ("exact_match",)


def test_a_task_s_samples_are_all_measured_alike():
    golds = [Gold(("12",)), Gold(("Paris",))]
    assert task_metrics(golds) == ("exact_match", "normalised_match", "relaxed_accuracy", "anls")
    assert task_metrics([]) == ()


def test_scores_are_sums_and_counts():
    gold = Gold(("row 3 column 5",))
    assert scored("coordinates", "row 3 column 4", gold) == (1, 2)
    assert scored("cer", "row 3 column 4", gold) == (1, 14)
    assert scored("wer", "row 3 column 4", gold) == (1, 4)
    assert scored("wer_plain", "ROW 3, column 5!", gold) == (0, 4)
    assert scored("exact_match", "row 3 column 5", gold) == (1, 1)


def test_boxes_of_another_notation_than_the_gold_s():
    gold = Gold(("[100, 200, 500, 500]",))
    for text in ("<box>(100,200),(500,500)</box>", '{"box_2d": [200, 100, 500, 500]}'):
        assert scored("box_iou", text, gold) == (1, 1)
    assert scored("box_iou", "[0.1, 0.2, 0.5, 0.5]", gold) == (0, 1)
    assert scored("box_accuracy", "somewhere", gold) == (0, 1)


def test_boxes_of_regions_where_the_answer_is_words():
    gold = Gold(("the cat",), size=(640, 480), regions=(BOX,))
    assert METRICS["box_iou"].fits(gold)
    assert scored("box_iou", "[100, 200, 500, 500]", gold) == (1, 1)
    pixels = Gold(("the cat",), size=(640, 480), regions=(BOX,), coord="pixel")
    assert scored("box_iou", '{"bbox_2d": [64, 96, 320, 240]}', pixels) == (1, 1)
    assert not METRICS["box_iou"].fits(Gold(("the cat",)))


def test_pixels_of_an_image_of_unknown_size():
    gold = Gold(("[64, 96, 320, 240]",), coord="pixel")
    assert scored("box_iou", "[64, 96, 320, 168]", gold) == (0.5, 1)


def test_pointing_at_regions_by_points_and_by_boxes():
    gold = Gold(("2",), regions=(POINTS,))
    both = '<points x1="50" y1="50" x2="10" y2="20" alt="cats">cats</points>'
    assert scored("pointing_f1", both, gold) == (1, 1)
    assert scored("pointing_f1", "(100, 200)", gold)[0] == pytest.approx(2 / 3)
    assert scored("pointing_accuracy", "<box>(90,190),(110,210)</box>", gold) == (1, 1)
    assert scored("pointing_accuracy", "there", gold) == (0, 1)
    written = Gold(('<point x="10" y="20" alt="cat">cat</point>',))
    assert scored("pointing_accuracy", "(110, 210)", written) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "coord"),
    [
        ("[100, 200, 500, 500]", "per_mille"),
        ("[64, 96, 320, 240]", "pixel"),
        ("[0.1, 0.2, 0.5, 0.5]", "unit"),
        ("[10, 20, 50, 50]", "percent"),
        ("the cat", "per_mille"),
        ("[700, 700, 800, 800]", "per_mille"),
    ],
)
def test_regions_tell_what_the_numbers_of_boxes_count(answer, coord):
    assert coord_of(Gold((answer,), size=(640, 480), regions=(BOX,))) == coord


@pytest.fixture
def sample(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")

    def make(answer="[64, 96, 320, 240]", **fields):
        messages = [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": answer},
        ]
        record = {"images": ["a.png"], "messages": messages, "task": "t", **fields}
        return parse_sample(record, root=tmp_path, where="a:1")

    return make


def test_the_gold_of_a_sample(sample):
    region = {"text": "64", "turn": 3, "box": [64, 96, 320, 240]}
    gold = gold_of(sample(regions=[region], answers=["there"], metrics=["box_iou"]))
    assert gold.answers == ("[64, 96, 320, 240]", "there")
    assert gold.size == (640, 480)
    assert gold.coord == "pixel"
    assert gold.metrics == ("box_iou",)
    assert [r.boxes for r in gold.regions] == [((0.1, 0.2, 0.5, 0.5),)]
    first = gold_of(sample(regions=[region], answers=["there"]), turn=1)
    assert first.answers == ("2",)
    assert first.regions == ()


def test_masks_and_heats_are_places_that_are_pointed_at(sample, tmp_path):
    left = np.zeros((48, 64), bool)
    left[:, :16] = True
    np.save(tmp_path / "heat.npy", np.fliplr(left) * 5.0)
    Image.fromarray(np.uint8(left)).save(tmp_path / "left.png")
    where = {"text": "there", "turn": 3}
    regions = [{**where, "mask": "left.png"}, {**where, "heat": "heat.npy"}]
    regions.append({"text": "2", "turn": 1, "mask": {"size": [1, 1], "counts": [0, 1]}})
    gold = gold_of(sample("there", regions=regions, metrics=["pointing_accuracy", "pointing_f1"]))
    assert default_metrics(gold) == ("pointing_accuracy", "pointing_f1")
    assert len(gold_places(gold)) == len(gold.rasters) == 2
    assert METRICS["pointing_accuracy"].score('{"point_2d": [100, 500]}', gold) == (1, 1)
    assert METRICS["pointing_accuracy"].score('{"point_2d": [500, 500]}', gold) == (0, 1)
    points = '[{"point_2d": [900, 500]}, {"point_2d": [100, 900]}, {"point_2d": [500, 500]}]'
    assert METRICS["pointing_f1"].score(points, gold) == (2 * 2 / (3 + 2), 1)


def test_an_answer_that_is_given_twice_counts_once(sample):
    assert gold_of(sample("a", answers=["b", "a", "b"])).answers == ("a", "b")


def test_votes_are_the_answers_as_often_as_they_were_given(sample):
    votes = ["nokia"] * 3 + ["phone"] * 7
    gold = gold_of(sample("Nokia", answers=votes))
    assert gold.votes == tuple(votes)
    assert gold.answers == ("Nokia", "nokia", "phone")
    assert scored("vqa_accuracy", "Nokia", gold) == (pytest.approx(0.9), 1)
    assert METRICS["vqa_accuracy"].fits(gold)
    assert gold_of(sample("2", answers=votes), turn=1).votes == ()


def test_vqa_accuracy_wants_the_answers_of_four_people():
    votes = ("yes",) * 3
    assert default_metrics(Gold(("yes",), votes, task="textvqa_val")) == ("exact_match",)
    assert default_metrics(Gold(("yes",), (*votes, "no"), task="vqav2")) == ("vqa_accuracy",)


def test_what_rewards_long_answers_is_never_measured_unless_asked_for():
    asked = {name for names in TASK_METRICS.values() for name in names}
    assert not asked & {"contains", "contains_formula"}
    assert default_metrics(Gold(("a",), task="ocrbench")) != ("contains",)
    assert default_metrics(Gold(("a",), metrics=("contains",))) == ("contains",)


def test_an_unknown_metric_is_an_error_of_its_sample(sample):
    with pytest.raises(SampleError, match=r"a:1: `metrics\[1\]`: expected one of exact_match, .*"):
        gold_of(sample(metrics=["cer", "bleu"]))


texts = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from([*"[](),|<>=%-. \n0123456789", "<box>", "<loc0001>", "row ", "<0x0A>"]),
        max_size=20,
    ).map("".join),
)


@quick
@given(texts, texts, st.booleans())
def test_no_text_makes_a_metric_raise(predicted, answer, placed):
    regions = (BOX, POINTS) if placed else ()
    gold = Gold((answer, "b"), (answer,) * 4, size=(640, 480), regions=regions)
    for metric in METRICS.values():
        total, count = metric.score(predicted, gold)
        assert 0 <= total < float("inf")
        assert count >= 0
        assert total <= count + 1e-9 or not metric.higher_is_better
    assert set(default_metrics(gold)) <= set(METRICS)
