"""What a tiny run needs: data, a model of one layer, and a config that saves after each step."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.red_squares import red_square

STEPS = 3
CONFIG = "config.json"


def make(folder: Path) -> None:
    """Write everything into a folder; `config.json` lacks only `training.output`."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [json.dumps(red_square(folder, i, 2)) + "\n" for i in range(STEPS + 1)]
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
