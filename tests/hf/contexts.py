"""Training whose ranks share each sequence (context parallelism), as one process trains: a program
that test_contexts.py starts.

python -m tests.hf.forked tests.hf.contexts FOLDER SIZE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState

from benchmarks.ranks.fsdp2_on_cpu import shard_on_cpu
from groundkern.hf import GroundingTrainer, detach
from tests.hf.samples import SAMPLES
from tests.hf.training import attached_model, make_trainer

STEPS, SAVED = 3, 2
SAMPLES_OF_RUN = [SAMPLES["qwen"][i % 4] for i in range(6)]  # of a data set that no step divides


def trainer_of(folder: Path, *, size: int, **settings) -> GroundingTrainer:
    """Steps of four samples each in two micro-batches, however many ranks share them.

    Args:
        folder: of the run.
        size: ranks that share a sequence; 1 in one process.
        settings: of `make_trainer`.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // size
    if size > 1:
        settings["parallelism_config"] = ParallelismConfig(cp_size=size, dp_shard_size=ranks)
    given = {
        "per_device_train_batch_size": 2 // ranks,
        "per_device_eval_batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "logging_steps": 2,  # a checkpoint may interrupt a line
        "include_num_input_tokens_seen": "all",
    }
    trainer = make_trainer(attached_model(), folder, **{**given, **settings})
    trainer.train_dataset = trainer.eval_dataset = list(SAMPLES_OF_RUN)
    return trainer


def ran(folder: Path, *, size: int, start: Path | None = None, **settings) -> dict:
    """What a run logged, measured and learned.

    Args:
        folder: of the run.
        size: ranks that share a sequence.
        start: the checkpoint that it goes on from; None: none.
        settings: of `make_trainer`.
    """
    trainer = trainer_of(folder, size=size, **settings)
    trainer.train(None if start is None else str(start))
    found = {"log": trainer.state.log_history}
    found["tokens"] = trainer.state.num_input_tokens_seen
    found["flos"] = trainer.state.total_flos
    found["held_out"] = trainer.evaluate()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    found["weights"] = {k.removeprefix("module."): x.clone() for k, x in weights.items()}
    detach(trainer.accelerator.unwrap_model(trainer.model))
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return found


RUNS = {"plain": {"term_norms_every": 1}, "mean": {"average_tokens_across_devices": False}}


def main(folder: Path, size: int) -> None:
    """The runs of a context of that size; the first rank writes what they came to."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    found = {}
    for name, settings in RUNS.items():
        if name == "plain" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            settings = {}
        found[name] = ran(folder / name, size=size, **settings)
    start = folder / "plain" / f"checkpoint-{SAVED}"
    found["resumed"] = ran(folder / "resumed", size=size, start=start, **({} if os.environ.get("ACCELERATE_USE_FSDP") == "true" else RUNS["plain"]))
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(found, folder / "found.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
