"""Boxes in pixels of the image that the processor made, on processors that change its size."""

from __future__ import annotations

from functools import partial

import pytest
from PIL import Image

from benchmarks.families.zoo.first import (
    tiny_llava_model,
    tiny_llava_processor,
    tiny_qwen_model,
    tiny_qwen_processor,
)
from groundkern.hf import GroundedExample
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.evaluation.generating import Answerer
from groundkern.trainer.evaluation.questions import Asking
from groundkern.trainer.evaluation.scoring import Scoring

SIZE, RESIZED = (100, 50), (112, 56)  # to whole cells of 28 pixels
REGION = {"text": "[", "box": [25, 10, 75, 40]}
GOLDS = {
    "per_mille": "[250, 200, 750, 800]",
    "pixel": "[25, 10, 75, 40]",
    "resized": "[28, 11.2, 84, 44.8]",
}
WRITTEN = '```json\n[{"bbox_2d": [28, 11, 84, 45], "label": "patch"}]\n```'


def example(*sizes: tuple[int, int]) -> GroundedExample:
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    return GroundedExample(tuple(Image.new("RGB", size) for size in sizes), chat, name="a")


def sizes(model, processor, *examples: GroundedExample) -> list:
    asking, answerer = Asking(processor), Answerer(model, processor, max_new_tokens=1)
    questions = [asking.question(each) for each in examples]
    return answerer.resized(questions, answerer.inputs(questions))


def test_the_size_is_that_of_each_question_s_first_image():
    of = partial(sizes, tiny_qwen_model(), tiny_qwen_processor())
    small, large, none = example(SIZE), example((900, 300), SIZE), example()
    assert of(small) == [RESIZED]
    assert of(none, large, none, small) == [None, (364, 112), None, RESIZED]
    assert of(none) == [None]


def test_a_processor_that_crops_has_no_such_size():
    assert sizes(tiny_llava_model(), tiny_llava_processor(), example(SIZE)) == [None]


@pytest.fixture
def sample(tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "a.png")

    def make(answer: str, **fields):
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        record = {"images": ["a.png"], "messages": chat, **fields}
        return parse_sample(record, root=tmp_path, where="a:1")

    return make


def iou(sample, text: str, coord: str | None, resized: tuple[int, int] | None = RESIZED) -> float:
    """The IoU of an answer with a gold that is read right."""
    row = {"prediction": text, "gold": [], "task": ""}
    row |= {} if resized is None else {"resized": list(resized)}
    scoring = Scoring(["box_iou"], coord)
    scoring.prepare([(0, sample)], {0: row})
    row["sample"] = 0
    assert scoring.marks(row).right.boxes == [(0.25, 0.2, 0.75, 0.8)]
    total, _ = scoring.score(row)["box_iou"]
    return total


@pytest.mark.parametrize("answer", [*GOLDS.values(), "[here]"])
def test_what_a_model_off_the_shelf_writes_whatever_the_data_is_in(sample, answer):
    asked = sample(answer, regions=[REGION])
    assert iou(asked, WRITTEN, "resized") > 0.97
    assert iou(asked, WRITTEN, "pixel") < 0.9
    assert iou(asked, WRITTEN, "per_mille") == 0


@pytest.mark.parametrize(("unit", "answer"), GOLDS.items())
def test_what_a_model_writes_that_has_learnt_the_data(sample, unit, answer):
    asked = sample(answer, regions=[REGION])
    assert iou(asked, answer, None) == pytest.approx(1)
    assert iou(asked, answer, unit) == pytest.approx(1)


def test_a_gold_without_regions_is_in_thousandths_if_answers_are_in_resized_pixels(sample):
    assert iou(sample(GOLDS["per_mille"]), WRITTEN, "resized") > 0.97
    assert iou(sample(GOLDS["pixel"]), GOLDS["pixel"], "pixel") == pytest.approx(1)


def test_points_are_scaled_too(sample):
    scoring = Scoring(["pointing_accuracy"], "resized")
    point = {**REGION, "box": [95, 40, 100, 50]}  # the resized image's last pixels
    row = {"sample": 0, "prediction": '{"point_2d": [110, 50]}', "gold": [], "resized": [*RESIZED]}
    scoring.prepare([(0, sample("[", regions=[point]))], {0: row})
    assert scoring.score(row) == {"pointing_accuracy": [1, 1]}


def test_answers_about_an_image_of_unknown_size_are_refused(sample):
    with pytest.raises(ConfigError, match=r"--coord: expected .* for resized, got none for a:1"):
        iou(sample(GOLDS["pixel"]), WRITTEN, "resized", None)
