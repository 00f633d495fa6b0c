"""A model and samples for a script that has to run anywhere in seconds: no download, no file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from groundkern.hf import GroundedExample
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.demo.generate import TASKS, corpus, generate
from groundkern.trainer.demo.model import save_model
from groundkern.trainer.scratch import temporary_folder


def small_model(folder: str | Path | None = None, *, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL of 1.2 million random weights, as any model's folder has it.

    It takes a second or two. What it says is noise until it is trained.

    Args:
        folder: gets weights, config, tokenizer and processor; made if missing. None: a temporary
            folder, which is removed when the process ends.
        seed: of the weights.

    Returns:
        The folder, for `from_pretrained` and `load_processor`.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder is None:
        folder = temporary_folder()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        save_model(Path(folder), corpus(), seed=seed)
    finally:
        if bars:
            logging.enable_progress_bar()
    return Path(folder)


def examples(
    count: int, *, tasks: Sequence[str] = tuple(TASKS), seed: int = 0
) -> list[GroundedExample]:
    """Draw samples of the demo's tasks: a picture, a question, its answer, regions and words.

    Args:
        count: how many samples, in a shuffled order.
        tasks: "pointing" (where is the red patch of a grid?), "page" (read the marked line) and
            "chart" (read the marked bar), as many samples of each as of the others.
        seed: the same seed draws the same samples; another one draws others.

    Returns:
        Examples as the trainer makes them of a JSON-lines file.

    Raises:
        ValueError: an unknown task, or none.
    """
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(f"`tasks`: expected some of {', '.join(TASKS)}, got {list(tasks)}")
    with TemporaryDirectory(prefix="groundkern-") as name:
        folder, shares = Path(name), dict.fromkeys(tasks, 1)
        generate(folder, samples=count, seed=seed, held_out={}, shares=shares, shown=False)
        text = (folder / "train.jsonl").read_text(encoding="utf-8")
        named = enumerate(text.removesuffix("\n").split("\n"), 1)
        return [parse_sample(x, root=folder, where=f"demo:{n}").load() for n, x in named]
