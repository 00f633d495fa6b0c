"""One process of `benchmarks.ranks.memory`: trains two steps and writes what it holds.

python -m benchmarks.ranks.holding FOLDER SHAPE TOKENS full|lora|checkpointed
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from benchmarks.timing.memory import RESET, resident
from benchmarks.training_step.model import SHAPES, Rows, Shape, build, sample
from groundkern.hf import DvSft, GroundingTrainer, Klal, Smam, attach
from groundkern.trainer.config import Lora

STEPS = 2  # the optimizer's state is there from the first one on


class Holding(TrainerCallback):
    """Counts bytes of this process where they are at their most.

    Args:
        before: the resident set before there was a model.
    """

    def __init__(self, before: int) -> None:
        self.before, self.found = before, {}
        self.trainer: GroundingTrainer | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 1:
            RESET.write_text("5")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:  # DeepSpeed has already freed them
            self.found["gradients"] = local_bytes(p.grad for p in self.trainer.model.parameters())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < STEPS:
            return
        trainer = self.trainer
        self.found["peak"] = resident("VmHWM") - self.before
        if trainer.is_deepspeed_enabled:
            self.found |= of_deepspeed(trainer.model_wrapped)
            return
        states = trainer.optimizer.state.values()
        self.found["weights"] = local_bytes(trainer.model.parameters())
        self.found["optimizer"] = local_bytes(x for state in states for x in state.values())


def local_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of this process's parts of tensors.

    Args:
        tensors: whole or sharded ones; what is no tensor counts nothing.
    """
    found = [x for x in tensors if isinstance(x, Tensor)]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in found]
    return sum(x.numel() * x.element_size() for x in local)


def of_deepspeed(engine: nn.Module) -> dict[str, int]:
    """Weights, gradients and optimizer states of a ZeRO-3 engine.

    Beside its part of every weight a process has those whole that are below DeepSpeed's threshold
    (100,000 numbers). Master copies that are the weights themselves count once.

    Args:
        engine: DeepSpeed's, after a step.
    """
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    parts = [p.ds_tensor for p in parameters]
    own = {x.untyped_storage().data_ptr() for x in parts}
    master = optimizer.fp32_partitioned_groups_flat
    master = [x for x in master if x.untyped_storage().data_ptr() not in own]
    states = optimizer.optimizer.state.values()
    return {
        "weights": local_bytes(parts) + local_bytes(parameters),
        "gradients": local_bytes([optimizer.grad_partitions_flat_buffer]),
        "optimizer": local_bytes(master)
        + local_bytes(x for state in states for x in state.values()),
    }


def made(shape: Shape, how: str) -> nn.Module:
    """The attached model of a run.

    Args:
        shape: of the model.
        how: full, lora or checkpointed.
    """
    model = build(shape, torch.device("cpu"), torch.float32)
    model.model.visual.requires_grad_(False)
    attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal())
    if how != "lora":
        return model
    targets = rf".*language_model.*\.({'|'.join(Lora().target_modules)})"
    return get_peft_model(model, LoraConfig(r=Lora().r, target_modules=targets))


def main() -> None:
    folder, name, tokens, how = sys.argv[1:]
    torch.set_num_threads(1)
    shape, holding = SHAPES[name], Holding(resident("VmRSS"))
    batch = sample(shape, int(tokens), Rows(), torch.device("cpu"))
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        gradient_checkpointing=how == "checkpointed",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = GroundingTrainer(
        made(shape, how),
        arguments,
        train_dataset=list(range(64)),
        data_collator=lambda indices: dict(batch),
        callbacks=[holding],
        examine=False,
    )
    holding.trainer = trainer
    trainer.train()
    if arguments.process_index == 0:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found = {**holding.found, "losses": losses}
        (Path(folder) / "held.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
