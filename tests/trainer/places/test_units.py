"""What numbers count: sizes after a processor's resize, squares, what a file's boxes look like."""

from __future__ import annotations

import json
import pickle

import pytest
from PIL import Image

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern.trainer.config import ConfigError
from groundkern.trainer.places.kinds import Kinds
from groundkern.trainer.places.layouts import Place
from groundkern.trainer.places.units import Resized, extent
from groundkern.trainer.places.writing import Writer, resized_of


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with Qwen2.5-VL's processor (56 to 224 pixels, cells of 28) and its model_type."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen_processor().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    return folder


SIZES = [(640, 480), (100, 50), (1, 1), (1, 200), (200, 1), (27, 29), (900, 300), (13, 777)]


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_what_the_processor_makes_of_an_image(qwen, size):
    processor = tiny_qwen_processor().image_processor
    made = processor(images=[Image.new("RGB", size)], return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    assert Resized.of(qwen)(size) == (14 * columns, 14 * rows)


def test_a_resize_can_be_sent_to_other_processes(qwen):
    resized = Resized.of(qwen)
    assert pickle.loads(pickle.dumps(resized)) == resized


def test_an_image_that_the_processor_refuses_is_an_error(qwen):
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got 300"):
        Resized.of(qwen)((1, 300))


def test_models_without_such_a_resize_are_refused(tmp_path):
    tiny_llava_processor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a model whose processor .* got Llava"):
        Resized.of(tmp_path)
    with pytest.raises(ConfigError, match="has no image processor"):
        Resized.of(tmp_path / "none")
    with pytest.raises(ConfigError, match="coord resized`: expected --model"):
        resized_of("resized", None, "--coord resized")


def test_qwen_s_boxes_are_in_pixels_of_the_resized_image(qwen):
    writer = Writer.of("auto", qwen)
    assert writer.style == "qwen2.5"
    assert writer.resized((100, 50)) == (112, 56)
    box = Place((0.25, 0.2, 0.75, 0.8), "cat")
    text = '[{"bbox_2d": [28, 11, 84, 45], "label": "cat"}]'
    assert writer.write([box], (100, 50)).text == text
    assert pickle.loads(pickle.dumps(writer)) == writer
    with pytest.raises(ConfigError, match=r"box-style qwen2.5`: expected --model"):
        Writer.of("qwen2.5", None)


def test_llava_counts_on_the_padded_square():
    assert extent("square", (200, 100), None).numbers((0, 0, 1, 1)) == (0, 0.25, 1, 0.75)
    tall = extent("square", (101, 200), None)  # 49 pixels in front, 50 behind, as expand2square
    assert tall.numbers((0.0,)) == (49 / 200,)
    assert tall.fractions((49 / 200, 0.5)) == (0, 0.5)
    writer = Writer("llava")
    assert writer.write([Place((0, 0, 1, 1))], (200, 100)).text == "[0.0, 0.25, 1.0, 0.75]"


UNIT, MILLE, LARGE = (0.1, 0.2, 0.5, 0.9), (100, 200, 500, 900), (100, 200, 1500, 900)
TOLD = [
    ("pixel", UNIT, (640, 480), "never leave [0, 1]: probably fractions of the image"),
    (None, UNIT, (640, 480), "(--coord unit); what they count is not said"),
    ("pixel", MILLE, (3000, 2000), "never leave [0, 1000], though images of 1 of them are larger"),
    ("pixel", MILLE, (640, 480), "leave their image, but never [0, 1000]: probably thousandths"),
    ("pixel", LARGE, (1200, 1200), "leave their image: probably pixels of what the model's"),
    ("unit", MILLE, (640, 480), "probably thousandths"),
    ("per_mille", UNIT, (640, 480), "probably fractions"),
    ("per_mille", LARGE, (2000, 2000), "lie within their images: probably pixels of the image"),
    (None, LARGE, (2000, 2000), "(--coord pixel)"),
    ("pixel", LARGE, (2000, 2000), None),
    ("pixel", (10, 10, 641, 480), (640, 480), None),  # sticks out by a rounding
    ("pixel", (0, 0, 1, 2), (640, 480), None),
    ("per_mille", MILLE, (640, 480), None),
    ("per_mille", MILLE, (3000, 2000), None),
    ("unit", UNIT, (640, 480), None),
    ("square", UNIT, (640, 480), None),
    ("resized", LARGE, (1200, 1200), None),
]


@pytest.mark.parametrize(("unit", "numbers", "size", "told"), TOLD)
def test_a_file_s_numbers_are_judged_and_the_first_line_is_named(unit, numbers, size, told):
    kinds = Kinds(unit)
    kinds.add(numbers, size, "a.json:7")
    found = kinds.warning("--coord")
    if told is None:
        assert found is None
    else:
        assert found.startswith("a.json:7: numbers of 1 boxes")
        assert told in found


def test_one_box_that_speaks_against_it_is_enough():
    kinds = Kinds("pixel")
    kinds.add(UNIT, (640, 480), "a:1")
    kinds.add(LARGE, (2000, 2000), "a:2")
    kinds.add(MILLE, (3000, 2000), "a:3")
    assert kinds.warning("--coord") is None
    assert Kinds("pixel").warning("--coord") is None
    kinds = Kinds("pixel")
    for i in range(3):
        kinds.add(MILLE, (640, 480) if i < 1 else (300, 3000), f"a:{i}")
    assert kinds.warning("--coord").startswith("a:0: numbers of 3 boxes")
