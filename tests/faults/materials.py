"""What a tiny run needs: data, a model of one layer, and a config that saves after each step."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor

STEPS = 3
CONFIG = "config.json"


def make(folder: Path) -> None:
    """Write everything into a folder; `config.json` lacks only `training.output`."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [json.dumps(_sample(folder, i)) + "\n" for i in range(STEPS + 1)]
    (folder / "train.jsonl").write_text("".join(samples[:STEPS]))
    (folder / "test.jsonl").write_text(samples[STEPS])
    tiny_qwen_model(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_qwen_processor().save_pretrained(folder / "model")
    training = {
        "steps": STEPS,
        "batch_size": 1,
        "accumulation": 1,
        "learning_rate": 1e-3,
        "save_every": 1,
        "keep": 1,
        "log_every": 1,
    }
    config = {
        "model": {"path": str(folder / "model"), "freeze_vision": True},  # fewer states to write
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "objectives": {"smam": {}},
        "training": training,
        "evaluation": {"heatmaps": 0},
    }
    (folder / CONFIG).write_text(json.dumps(config))  # JSON is YAML


def _sample(folder: Path, i: int) -> dict:
    """A red square in one of four places."""
    row, column = divmod(i, 2)
    box = [28 * column, 28 * row, 28 * column + 28, 28 * row + 28]
    image = Image.new("RGB", (56, 56), "white")
    ImageDraw.Draw(image).rectangle(box, fill="red")
    image.save(folder / f"{i}.png")
    asked = [{"type": "image"}, {"type": "text", "text": "Where is the red patch?"}]
    answer = f"row {row} column {column}"
    return {
        "images": [f"{i}.png"],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ],
        "regions": [{"text": answer, "box": box}],
    }
