"""`{box}` and `{point}` in questions and answers, in the style of a family."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.trainer.prepare.reading_samples import prepared, said

SIZE = (200, 100)
DOG, CAT = [20, 20, 100, 80], [0, 0, 200, 50]


@pytest.fixture
def qwen(model):
    return str(model)


@pytest.fixture
def root(tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    return tmp_path


def placed(root, place: dict, *words: str, label: str = "dog") -> list[dict]:
    record = {
        "image": "a.png",
        "label": label,
        "places": place if isinstance(place, list) else [place],
    }
    (root / "in.jsonl").write_text(json.dumps(record))
    status, samples, rejected = prepared(root / "out.jsonl", "maps", root / "in.jsonl", *words)
    assert status == 0
    return samples or rejected


def words_of(sample: dict) -> list[str]:
    text = said(sample)[1]
    return [text[slice(*region["char_span"])] for region in sample["regions"]]


def test_templates_write_boxes_in_a_style(root):
    two = [{"box": DOG}, {"box": CAT}]
    (sample,) = placed(root, two, "--answer", "{box}", "--box-style", "internvl")
    assert said(sample)[1] == "<ref>dog</ref><box>[[100, 200, 500, 800], [0, 0, 1000, 500]]</box>"
    assert words_of(sample) == ["[100, 200, 500, 800]", "dog", "[0, 0, 1000, 500]", "dog"]
    assert [region["box"] for region in sample["regions"]] == [DOG, DOG, CAT, CAT]
    words = ("--answer", "The {label} is at {box}.", "--box-style", "qwen2", "--overwrite")
    (sample,) = placed(root, two[0], *words)
    assert said(sample)[1] == "The dog is at <|box_start|>(100,200),(500,800)<|box_end|>."
    assert words_of(sample) == ["dog"]
    words = ("--question", "What is at {box}?", "--box-style", "gemini", "--overwrite")
    (sample,) = placed(root, two[0], *words)
    assert said(sample) == ('What is at [{"box_2d": [200, 100, 800, 500]}]?', "dog")


def test_templates_write_points_and_middles(root):
    places = [{"points": [[20, 50], [40, 50]]}, {"box": DOG}]
    (sample,) = placed(root, places, "--answer", "{point}", "--box-style", "molmo")
    text = 'x1="10.0" y1="50.0" x2="20.0" y2="50.0" x3="30.0" y3="50.0" alt="dog">dog</points>'
    assert said(sample)[1] == f"<points {text}"
    assert "box" not in sample["regions"][0]
    assert sample["regions"][-1]["box"] == DOG


def test_templates_refuse_what_a_style_has_not(root, capsys):
    (root / "in.jsonl").write_text("")
    command = ("maps", root / "in.jsonl", "--answer", "{box}", "--box-style")
    assert prepared(root / "out.jsonl", *command, "molmo")[0] == 2
    assert "a style that has {box}, got molmo" in capsys.readouterr().err
    assert prepared(root / "out.jsonl", *command, "x")[0] == 2
    assert "`--box-style`: expected one of per_mille" in capsys.readouterr().err
    place = {"polygon": [[1, 1], [9, 1], [9, 9]]}
    (rejected,) = placed(root, place, "--answer", "{box}", "--overwrite")
    assert "`places`: expected a box, for {box}, got none" in rejected["reason"]
    words = ("--answer", "{box}", "--box-style", "internvl", "--overwrite")
    (rejected,) = placed(root, {"box": DOG}, *words, label="a</ref>")
    assert rejected["reason"] == "expected a label that internvl can hold, got 'a</ref>'"


def test_lines_may_count_pixels_of_the_processor(root, qwen):
    place = {"box": [28, 28, 112, 84], "coord": "resized"}  # 196 x 112 for the model
    (sample,) = placed(root, place, "--model", qwen)
    assert sample["regions"][0]["box"] == pytest.approx([28 * 200 / 196, 25, 112 * 200 / 196, 75])
    (rejected,) = placed(root, place, "--overwrite")
    assert "`places[0].coord`: expected a unit, or --model, whose" in rejected["reason"]


def test_lines_that_look_like_another_unit_are_warned_of(root, capsys):
    placed(root, {"box": [0.1, 0.2, 0.5, 0.8]})
    err = capsys.readouterr().err
    assert "warning: in.jsonl:1: numbers of 1 boxes or points never leave [0, 1]" in err
    placed(root, {"box": DOG}, "--overwrite")
    assert "warning" not in capsys.readouterr().err
