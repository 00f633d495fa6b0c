"""Training that stops at its second step of four and goes on, on any number of ranks and under any
strategy: a program that test_resuming.py launches.

accelerate launch --config_file examples/accelerate/zero3.yaml -m tests.hf.resuming FOLDER WORDS
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import DvSft, GroundingTrainer, Klal, Smam, attach, detach
from tests.hf.ranks import BLANK, FIRST, FOURTH, SECOND
from tests.hf.training import make_trainer

STOPPED, STEPS = 2, 4


def make_model(kind: str, seed: int = 0) -> nn.Module:
    """Attached; LoRA with learned head weights beside the adapters."""
    model = tiny_qwen_model()
    learned = "learned" if kind == "lora" else "uniform"
    attach(model, smam=Smam(weight=0.7), dv_sft=DvSft(weight=0.5), klal=Klal(head_weight=learned))
    if kind == "lora":
        torch.manual_seed(seed)
        targets = r".*language_model.*\.(q_proj|v_proj)"
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    return model


def trainer_of(model: nn.Module, folder: Path, *, world: int) -> GroundingTrainer:
    """Four samples in a step, however many ranks there are; one of them has no row."""
    trainer = make_trainer(
        model,
        folder,
        examine=False,
        per_device_train_batch_size=4 // world,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STOPPED,
        optim="adamw_torch",
        adam_epsilon=1e-3,
        weight_decay=0.3,
        learning_rate=2e-2,
        lr_scheduler_type="linear",
    )
    trainer.train_dataset = [FIRST, SECOND, FOURTH, BLANK]  # sharded ranks all need images
    return trainer


def weights(kind: str, folder: Path) -> dict[str, Tensor]:
    """All that `save_model` wrote, by the names of the model or of its adapters."""
    if kind == "full":
        return AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for path in files for name, x in load_file(path).items()}


def run(model: nn.Module, folder: Path, *, world: int, start: Path | None = None) -> None:
    """Train to the end, from a run that stopped if there is one, and save under `folder/end`."""
    trainer = trainer_of(model, folder, world=world)
    trainer.train(None if start is None else str(start / f"checkpoint-{STOPPED}"))
    trainer.save_model(str(folder / "end"))
    detach(trainer.accelerator.unwrap_model(trainer.model))


def main(root: Path, kinds: list[str], name: str, start: str | None) -> None:
    """A run of each kind and, unless it starts from another, the same from its second step on."""
    world = int(os.environ["WORLD_SIZE"])
    runs = []  # all models come first: DeepSpeed would shard those that are made after its engine
    for kind in kinds:
        home = root / kind
        if start is not None:
            runs.append((make_model(kind, seed=9), home / name, home / start))
        else:
            runs.append((make_model(kind), home / name, None))
            runs.append((make_model(kind, seed=9), home / f"{name}-again", home / name))
    for model, folder, origin in runs:
        run(model, folder, world=world, start=origin)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3], (sys.argv[4:] or [None])[0])
