"""A tiny Qwen2.5-VL on disk and four samples in the canonical format, for trainers that read files.

torchvision has to be importable: these trainers load processors by `AutoProcessor`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.families.zoo.first import tiny_qwen_model
from benchmarks.families.zoo.making import QWEN_TEMPLATE, tiny_tokenizer

ANSWERS = ("The red patch is in row 2.", "Row 1, column 5.", "There is none.", "It is in row 3.")


def write_model(folder: Path, **text: Any) -> Path:
    """A model and its processor, with a video part."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tiny_qwen_model(**text).save_pretrained(folder)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=64 * 28 * 28),
        tokenizer=tiny_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def samples() -> list[dict[str, Any]]:
    """Uneven: other numbers of regions and words in each, one sample without either."""
    found = []
    for i, answer in enumerate(ANSWERS):
        question = [{"type": "image"}, {"type": "text", "text": "Where is the red patch?"}]
        words = [{"text": "patch", "box": [28 * k, 28, 28 * k + 28, 56]} for k in range(i % 3)]
        region = {"text": answer.split()[-1], "box": [10 + 20 * i, 10, 60 + 20 * i, 90]}
        found.append(
            {
                "id": f"s{i}",
                "images": [f"{i}.png"],
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                "regions": [] if i == 2 else [region],
                "words": words,
            }
        )
    return found


def write_samples(folder: Path) -> Path:
    """Their images, and a file with a line each."""
    for i in range(len(ANSWERS)):
        Image.new("RGB", (140, 112), (255, 40 * i, 0)).save(folder / f"{i}.png")
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples()), encoding="utf-8")
    return path
