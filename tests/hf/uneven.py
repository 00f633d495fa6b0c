"""GroundingTrainer where ranks have images in different micro-batches: a program that
test_even_ranks.py launches.

accelerate launch --config_file examples/accelerate/ddp.yaml -m tests.hf.uneven FOLDER adamw_torch
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import SequentialSampler

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern.hf import GroundingTrainer, detach
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import arguments, attached_model

FIRST, SECOND, TEXT, FOURTH = SAMPLES["qwen"]
# Of one sample each, alternately on two ranks. A step is two micro-batches: images on one rank in
# the first and on the other in the second; none at all; images on both.
STEPS = ((FIRST, TEXT, TEXT, FOURTH), (TEXT, TEXT, TEXT, TEXT), (SECOND, FIRST, FOURTH, FIRST))
SETTINGS = {
    "max_steps": 4,  # the last one is the first of a second epoch
    "adam_epsilon": 0.1,  # noise of floats is not to decide over a sign
    "weight_decay": 0.1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


class InOrder(GroundingTrainer):
    """The samples as they stand."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def train(folder: Path, **settings) -> list[dict]:
    """What was logged, with an evaluation before and after, if the model is not sharded by then."""
    model = attached_model()
    trainer = InOrder(
        model,
        arguments(folder, **SETTINGS, **settings),
        train_dataset=[sample for step in STEPS for sample in step],
        eval_dataset=[FIRST, TEXT, TEXT, SECOND, TEXT],
        data_collator=lambda samples: make_batch(model, tuple(samples)),
        processing_class=tiny_qwen_processor(),
    )
    trainer.train()
    trainer.evaluate()
    detach(model)
    return trainer.state.log_history


if __name__ == "__main__":
    folder, optimizer = Path(sys.argv[1]), sys.argv[2]
    log = train(
        folder,
        optim=optimizer,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    if torch.distributed.get_rank() == 0:
        (folder / "log.json").write_text(json.dumps(log))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
