"""What a checker says of the trainer's parts that other trainers import, as in `ops`."""

from pathlib import Path
from typing import assert_type

from groundkern.hf import GroundedExample
from groundkern.trainer import demo, load_samples
from groundkern.trainer.data.dataset import JsonLinesDataset


def own_data() -> None:
    samples = load_samples("train.jsonl", boxes="none")
    assert_type(samples, JsonLinesDataset)
    assert_type(samples[0], GroundedExample)
    assert_type(len(samples), int)


def demo_data(folder: Path) -> None:
    assert_type(demo.small_model(folder, seed=1), Path)
    assert_type(demo.examples(4, tasks=["page"]), list[GroundedExample])
