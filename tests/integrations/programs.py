"""A tiny Qwen2.5-VL and a few samples on disk, as training programs are given them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.families.zoo.making import build_model
from benchmarks.labels.vocabularies import tokenizer

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
    processor = tiny_qwen_processor()
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(),
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


def shown(processor: Any, batch: dict[str, torch.Tensor], b: int, predictors: torch.Tensor) -> str:
    """The text of the tokens that some rows of a sample predict."""
    at = predictors[b][predictors[b] >= 0] + 1
    return processor.tokenizer.decode(batch["input_ids"][b][at])


QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)  # from 151643 on: ms-swift knows 151655 and 151656 by number


def save_tiny_with_qwens_tokens(folder: Path) -> str:
    """A folder with a tiny model of Qwen's whole vocabulary, and a processor with a video part.

    Raises:
        Missing: no package with the vocabulary is installed.
    """
    backend = tokenizer("Qwen2 / 2.5 / 3").backend_tokenizer
    backend.add_special_tokens(list(QWEN_SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in QWEN_SPECIAL[1:] if token != "<|im_end|>"],
    )
    token = fast.convert_tokens_to_ids
    config = tiny_qwen_model().config
    config.text_config.vocab_size = len(fast)
    config.text_config.eos_token_id = fast.eos_token_id
    config.text_config.pad_token_id = fast.pad_token_id
    config.text_config.max_position_embeddings = 1024
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", token(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(config, f"vision_{name}_token_id", token(f"<|vision_{name}|>"))
    model = build_model(Qwen2_5_VLForConditionalGeneration, config, 0, "sdpa")
    model.save_pretrained(folder)
    processor = tiny_qwen_processor()
    Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=fast,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return str(folder)
