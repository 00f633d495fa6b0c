"""A few steps of GroundingTrainer on the hand-made samples; also run as a program by the two-rank
test.

python -m torch.distributed.run --nproc-per-node 2 -m tests.hf.training FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import DvSft, GroundingTrainer, Klal, Smam, attach, detach
from tests.hf.samples import SAMPLES, make_batch

PARTS = ("text", "word", "smam_grounding", "smam_cross_entropy", "map_kl")


def settings(folder: Path, **overrides) -> dict:
    """Plain SGD with a visible learning rate; at batch size 4 one pass is one step."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **overrides,
    }


def arguments(folder: Path, **overrides) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **overrides))


def make_trainer(
    model, folder: Path, *, examine: bool = True, term_norms_every: int | None = None, **overrides
) -> GroundingTrainer:
    """A trainer of an attached model on the four samples of its family."""
    return GroundingTrainer(
        model,
        arguments(folder, **overrides),
        train_dataset=list(SAMPLES["qwen"]),
        eval_dataset=list(SAMPLES["qwen"]),
        data_collator=lambda samples: make_batch(model, tuple(samples)),
        examine=examine,
        term_norms_every=term_norms_every,
    )


def attached_model():
    return attach(tiny_qwen_model(), smam=Smam(weight=0.7), dv_sft=DvSft(weight=0.5), klal=Klal())


def train(folder: Path, **overrides) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The log and the trained parameters."""
    model = attached_model()
    trainer = make_trainer(model, folder, **overrides)
    trainer.train()
    detach(model)
    return trainer.state.log_history, dict(model.named_parameters())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sharded = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys()
    trainer = make_trainer(
        attached_model(),
        folder,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,  # two ranks hold six, of four samples
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        term_norms_every=None if sharded else 1,
    )
    trainer.train()
    found = {"log": trainer.state.log_history, "held_out": trainer.evaluate()}
    if torch.distributed.get_rank() == 0:
        (folder / "log.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
