"""The whole demo in one folder: data set and model."""

from __future__ import annotations

from pathlib import Path

SAMPLES = 4800


def make_demo(folder: Path, *, samples: int = SAMPLES, seed: int = 0) -> None:
    """Write {train,dev,test}.jsonl, images/ and model/ under a folder and say what was made.

    Args:
        folder: made if missing; files of an earlier call are replaced.
        samples: training samples, all tasks together.
        seed: the same seed makes the same files.

    Raises:
        OSError: the folder cannot be written.
    """
    from groundkern.trainer.demo.generate import HELD_OUT, SHARES, corpus, generate

    generate(folder, samples=samples, seed=seed)

    from groundkern.trainer.demo.model import (
        save_model,
    )  # after the quick part: transformers takes seconds

    parameters = save_model(folder / "model", corpus(seed=seed), seed=seed)
    held_out = ", ".join(f"{count} {task}" for task, count in HELD_OUT.items())
    print(f"{folder}/train.jsonl  {samples} samples of the tasks {', '.join(SHARES)}")
    print(f"{folder}/dev.jsonl    {held_out}: to choose settings on")
    print(f"{folder}/test.jsonl   {held_out}: to look at last")
    print(f"{folder}/model        Qwen2.5-VL architecture, {parameters:,} parameters, untrained")
