"""A run of a tiny model on a tiny data set, for tests of what is on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.families.zoo.first import tiny_qwen_model, tiny_qwen_processor
from benchmarks.red_squares import red_square
from groundkern.trainer import run_folder as folder
from groundkern.trainer.config import Config, validate

ROOT = Path(__file__).parents[2]
STEPS = 6


def sample(where: Path, i: int) -> dict:
    """A red square on a 3 x 3 grid, with two words written beside it."""
    words = [{"text": "red", "box": [0, 0, 27, 27]}, {"text": "the", "box": [29, 0, 55, 27]}]
    return {"task": "pointing", **red_square(where, i, 3), "words": words}


def make_data(where: Path) -> Path:
    """Nine training and four test samples, and a model with its processor, in a folder."""
    samples = [sample(where, i) for i in range(13)]
    for name, part in (("train", samples[:9]), ("test", samples[9:])):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(s) + "\n" for s in part))
    tiny_qwen_model().save_pretrained(where / "model")
    tiny_qwen_processor().save_pretrained(where / "model")
    return where


def config(where: Path, output: Path, **changed: dict) -> Config:
    """Settings of a run of `STEPS` steps, with fields of sections changed."""
    values = {
        "model": {"path": str(where / "model")},
        "data": {"train": str(where / "train.jsonl"), "test": str(where / "test.jsonl")},
        "objectives": {"smam": {}, "dv_sft": {}, "klal": {}},
        "training": {
            "output": str(output),
            "steps": STEPS,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-3,
            "save_every": 100,
            "log_every": 1,
        },
        "evaluation": {"heatmaps": 1},
    }
    for section, fields in changed.items():
        values[section] = {**values.get(section, {}), **fields}
    return validate(values, where=lambda loc: "test")


def losses(output: Path) -> list[dict]:
    """The rows of a run's metrics without times."""
    timeless = ("samples_per_second", "tokens_per_second", "steps")
    rows = folder.read_metrics(output)
    return [{k: v for k, v in row.items() if k not in timeless} for row in rows]


def run(words: list[str], **options) -> subprocess.Popen:
    """`groundkern` in a process, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "groundkern", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)
