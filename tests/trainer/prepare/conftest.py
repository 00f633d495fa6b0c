"""A model folder without weights, and files of samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig

from groundkern.trainer.demo.model import build_processor, build_tokenizer
from groundkern.trainer.drawing.texts import texts
from groundkern.trainer.prepare.grid import visual_grid


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Config, tokenizer and processor of a small Qwen2.5-VL: 28 pixels to a visual token."""
    folder = tmp_path_factory.mktemp("model")
    processor = build_processor(build_tokenizer([" ".join(words) for words in texts()], size=800))
    ids = processor.tokenizer.convert_tokens_to_ids
    processor.save_pretrained(folder)
    Qwen2_5_VLConfig(
        image_token_id=ids("<|image_pad|>"), text_config={"vocab_size": len(processor.tokenizer)}
    ).save_pretrained(folder)
    visual_grid(folder)
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes objects or raw lines as `data.jsonl` beside an image `a.png` of 56 x 56 pixels."""
    Image.new("RGB", (56, 56), "white").save(tmp_path / "a.png")

    def write(*lines: dict | bytes) -> Path:
        path = tmp_path / "data.jsonl"
        raw = (each if isinstance(each, bytes) else json.dumps(each).encode() for each in lines)
        path.write_bytes(b"".join(line + b"\n" for line in raw))
        return path

    return write
