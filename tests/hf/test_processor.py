"""Processors load without torchvision, and save as what they are."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, Qwen2_5_VLProcessor

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from benchmarks.families.zoo.making import Unavailable
from benchmarks.families.zoo.qwens import FAMILIES as QWENS
from benchmarks.families.zoo.slices import FAMILIES as MINICPMS
from groundkern.hf import image_geometry, load_processor
from groundkern.hf.data.processor import with_image_options, without_video
from tests.hf.conftest import MODELS
from tests.hf.families import FAMILIES

MAKE = {"qwen": tiny_qwen_processor, "llava": tiny_llava_processor}
CLASS = {"qwen": Qwen2_5_VLProcessor, "llava": LlavaProcessor}


def test_round_trip(family, tmp_path):
    processor = MAKE[family](padding_side="left")
    processor.save_pretrained(tmp_path)
    MODELS[family]().config.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    assert isinstance(loaded, CLASS[family])
    assert loaded.tokenizer.padding_side == "left"
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == CLASS[family].__name__
    message = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "Where?"}],
    }
    pixels = np.random.default_rng(0).integers(0, 255, (70, 120, 3), dtype=np.uint8)
    batches = []
    for p in (processor, loaded):
        text = p.apply_chat_template([message], add_generation_prompt=True)
        batches.append(p(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt"))
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_without_video_is_one_class_per_processor():
    assert without_video(Qwen2_5_VLProcessor) is without_video(Qwen2_5_VLProcessor)
    assert "video_processor" not in without_video(Qwen2_5_VLProcessor).get_attributes()


def test_processors_without_video_go_to_spawned_workers():
    processor = tiny_qwen_processor()
    sent = pickle.loads(pickle.dumps(processor))
    assert type(sent) is type(processor) and sent.chat_template == processor.chat_template
    assert sent.image_processor.to_dict() == processor.image_processor.to_dict()
    assert sent.tokenizer("Where?").input_ids == processor.tokenizer("Where?").input_ids


def test_omni_processors_lose_the_part_before_their_tokenizer(tmp_path):
    try:
        made = QWENS["qwen2_5_omni_thinker"].processor()
    except Unavailable as error:
        pytest.skip(str(error))
    made.save_pretrained(tmp_path)
    loaded = type(made).from_pretrained(tmp_path)
    for processor in (made, loaded):
        assert processor.get_attributes() == ["image_processor", "feature_extractor", "tokenizer"]
        assert processor.tokenizer.is_fast
        assert not hasattr(processor, "video_processor")
    assert loaded.image_processor.size == made.image_processor.size


def test_what_is_missing_is_the_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
    MODELS["llava"]().config.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)


OPTIONS = {
    "qwen2_5_vl": ({"max_pixels": 20 * 28 * 28}, 20),
    "llava": ({"size": {"shortest_edge": 70}, "crop_size": {"height": 70, "width": 70}}, 25),
    "idefics3": ({"do_image_splitting": False}, 4),
    "internvl": ({"max_patches": 2}, 4),
    "llava_next": ({"image_grid_pinpoints": [[56, 112]]}, 16 + 4 * 7),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_image_options_are_seen_by_calls_tables_and_what_is_saved(name, tmp_path):
    options, tokens = OPTIONS[name]
    made = FAMILIES[name]
    processor, config = made.processor(), made.model().config
    if name == "llava_next":
        config.image_grid_pinpoints = options["image_grid_pinpoints"]
    before = processor.image_processor.to_dict()
    other = with_image_options(processor, options)
    image = Image.new("RGB", (500, 400))
    batch = other(images=[[image]], text=[other.image_token])
    (table,) = image_geometry(other, config, [[image]], batch)
    found = sum(token == config.image_token_id for token in batch["input_ids"][0])
    assert len(table) == found == tokens
    assert processor.image_processor.to_dict() == before
    other.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    again = load_processor(tmp_path)(images=[[image]], text=[other.image_token])
    assert np.array_equal(again["pixel_values"], batch["pixel_values"])
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path, image_options=options)
    again = loaded(images=[[image]], text=[other.image_token])
    assert np.array_equal(again["pixel_values"], batch["pixel_values"])


def test_tiles_that_the_model_does_not_know_are_refused():
    made, image = FAMILIES["llava_next"], Image.new("RGB", (100, 100))
    other = with_image_options(made.processor(), OPTIONS["llava_next"][0])
    with pytest.raises(ValueError, match=r"image_grid_pinpoints.*: expected config.json's"):
        image_geometry(other, made.model().config, [[image]], {})


def test_a_bound_in_pixels_leaves_the_other_one():
    processor = with_image_options(tiny_qwen_processor(), {"min_pixels": 9 * 28 * 28})
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (9 * 28 * 28, 64 * 28 * 28)


def test_unknown_and_fixed_image_options_are_refused():
    with pytest.raises(ValueError, match=r"`image_options.max_pixel`: expected a setting of Llava"):
        with_image_options(tiny_llava_processor(), {"max_pixel": 3})
    gemma = FAMILIES["gemma3"].processor()
    with pytest.raises(ValueError, match=r"image_options.do_pan_and_scan`: .* fix at False, got"):
        with_image_options(gemma, {"do_pan_and_scan": True})


def test_a_processor_that_reads_its_video_part_says_what_is_missing(tmp_path):
    """MiniCPM-V's: not that an attribute is missing, but what cannot be loaded, and why."""
    if find_spec("torchvision"):
        pytest.skip("its video part can be loaded")
    made = MINICPMS["minicpmv4_6"]
    try:
        made.model().config.save_pretrained(tmp_path)
        made.processor().save_pretrained(tmp_path)
    except Unavailable as error:
        pytest.skip(str(error))
    with pytest.raises((ImportError, OSError, ValueError), match="ideo"):
        load_processor(tmp_path)
