"""Processors load without torchvision, and save as what they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, Qwen2_5_VLProcessor

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern.hf import load_processor
from groundkern.hf.data.processor import without_video
from tests.hf.conftest import MODELS

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


def test_what_is_missing_is_the_error(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
    MODELS["llava"]().config.save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        load_processor(tmp_path)
