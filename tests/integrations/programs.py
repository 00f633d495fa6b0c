"""A tiny Qwen2.5-VL and a few samples on disk, as training programs are given them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor

BOX = (28, 28, 84, 56)  # of the first image, in pixels: visual tokens 1 and 2 of row 1
SIZES = ((140, 112), (56, 84))  # Qwen: 4 rows of 5 tokens, 3 rows of 2 tokens


def save_images(folder: Path) -> list[str]:
    """The paths of two images of noise."""
    noise = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        paths.append(str(folder / f"{number}.png"))
        pixels = noise.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    return paths


def save_tiny(folder: Path) -> str:
    """A folder with the tiny model, and its processor with a video part where it can be made."""
    tiny_qwen_model().save_pretrained(folder)
    tiny_qwen_processor().save_pretrained(folder)
    return str(folder)


def with_video_part(folder: str) -> None:
    """Add what a transformers with torchvision asks of the folder."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    processor = tiny_qwen_processor()
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=processor.chat_template,
    ).save_pretrained(folder)


def write_json(path: Path, value: Any) -> str:
    """The path of a file of JSON."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def write_lines(path: Path, values: list[Any]) -> str:
    """The path of a file of JSON lines."""
    path.write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    return str(path)


def torchaudio_stub() -> ModuleType:
    """What stands for torchaudio, of which PyPI has no build for this torch: samples with sound
    alone call it."""
    from importlib.machinery import ModuleSpec

    module = ModuleType("torchaudio")
    module.__spec__ = ModuleSpec("torchaudio", None)
    return module


def shown(processor: Any, batch: dict[str, torch.Tensor], b: int, predictors: torch.Tensor) -> str:
    """The text of the tokens that some rows of a sample predict."""
    at = predictors[b][predictors[b] >= 0] + 1
    return processor.tokenizer.decode(batch["input_ids"][b][at])
