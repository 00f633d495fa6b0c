"""Training whose ranks share each sequence (context parallelism): a program that test_contexts.py
starts.

FORKED=2 python -m tests.hf.forked tests.hf.contexts FOLDER SIZE NAMES
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState

from benchmarks.families.zoo import families
from benchmarks.ranks.fsdp2_on_cpu import shard_on_cpu
from groundkern.hf import GroundingTrainer
from tests.hf.samples import SAMPLES
from tests.hf.training import attached_model, make_trainer

STEPS, SAVED = 3, 2
SIX = [SAMPLES["qwen"][i % 4] for i in range(6)]  # a step takes four: an epoch ends within one


def trainer_of(folder: Path, size: int, **settings) -> GroundingTrainer:
    """Steps of four samples in two micro-batches, however many ranks share them.

    Args:
        folder: of the run.
        size: ranks that share a sequence; 1: none do.
        settings: of `make_trainer`.
    """
    readers = int(os.environ.get("WORLD_SIZE", "1")) // size
    if size > 1:
        settings["parallelism_config"] = ParallelismConfig(cp_size=size, dp_shard_size=readers)
    given = {
        "per_device_train_batch_size": 2 // readers,
        "per_device_eval_batch_size": 4 // readers,  # of six samples, some are repeated
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "logging_steps": SAVED,
        "include_num_input_tokens_seen": "non_padding",
    }
    trainer = make_trainer(attached_model(), folder, **{**given, **settings})
    trainer.train_dataset = trainer.eval_dataset = list(SIX)
    if readers > 1:  # one may have a micro-batch without images
        trainer.processing_class = families()["qwen2_5_vl"].processor()
    return trainer


def ran(folder: Path, size: int, start: Path | None = None, **settings) -> dict:
    """What a run logged, measured and learned.

    Args:
        folder: of the run.
        size: ranks that share a sequence.
        start: the folder of a run whose checkpoint it goes on from; None: none.
        settings: of `make_trainer`.
    """
    trainer = trainer_of(folder, size, **settings)
    trainer.train(None if start is None else str(start / f"checkpoint-{SAVED}"))
    found = {
        "log": trainer.state.log_history,
        "tokens": trainer.state.num_input_tokens_seen,
        "operations": trainer.state.total_flos,
        "held_out": trainer.evaluate(),
    }
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    found["weights"] = {k.removeprefix("module."): x.clone() for k, x in weights.items()}
    return found


def refused(folder: Path, size: int, change: Callable[[GroundingTrainer], None]) -> str:
    """Why training is refused.

    Args:
        folder: of the run.
        size: ranks that share a sequence.
        change: what is done to the trainer before.
    """
    trainer = trainer_of(folder, size)
    change(trainer)
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    return ""


def other_batches(trainer: GroundingTrainer) -> None:
    """Every rank gets samples of its own."""
    turn = trainer.args.process_index
    trainer.train_dataset = SIX[turn:] + SIX[:turn]


def plain_batches(trainer: GroundingTrainer) -> None:
    """Batches have nothing that supervises."""
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: {
        k: x for k, x in collate(samples).items() if not k.startswith("gk_")
    }


RUNS = {
    "plain": ran,
    "norms": partial(ran, term_norms_every=2),
    "mean": partial(ran, average_tokens_across_devices=False),
    "other": partial(refused, change=other_batches),
    "unsupervised": partial(refused, change=plain_batches),
}


def main(folder: Path, size: int, names: list[str]) -> dict:
    """The runs, one after another; the first rank writes what they came to.

    Args:
        folder: for everything.
        size: ranks that share a sequence.
        names: of RUNS; "resumed": on from the first run's checkpoint.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    found = {}
    for name in names:
        run = partial(ran, start=folder / names[0]) if name == "resumed" else RUNS[name]
        found[name] = run(folder / name, size)
        AcceleratorState._reset_state()
        GradientState._reset_state()
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, folder / "found.pt")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
