"""Two steps of GroundingModule on the hand-made samples; also a program for several processes.

python -m torch.distributed.run --nproc-per-node 2 -m tests.integrations.lightning_ranks FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import DvSft, Klal, Objectives, Smam
from groundkern.integrations.lightning import GroundingModule, StepCollator
from tests.hf.samples import SAMPLES, make_batch

OBJECTIVES = Objectives(smam=Smam(weight=0.7), dv_sft=DvSft(weight=0.5), klal=Klal())
SAMPLES_OF_STEP = 4


class Noted(GroundingModule):
    """Keeps what it logged of every training step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noted: list[dict[str, float]] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = self.trainer.callback_metrics
        self.noted.append({name: float(x) for name, x in metrics.items() if name[:4] != "val_"})


def sgd(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def make_module(**options: Any) -> Noted:
    return Noted(tiny_qwen_model(), sgd, objectives=OBJECTIVES, **options)


def make_loader(module: GroundingModule, size: int, ranks: int = 1) -> DataLoader:
    """Each step has all four samples, in pieces of `size`."""
    collate = StepCollator(lambda samples: make_batch(module.model, tuple(samples)), size)
    samples = list(SAMPLES["qwen"])
    return DataLoader(samples, batch_size=SAMPLES_OF_STEP // ranks, collate_fn=collate)


def make_trainer(folder: Path, *, steps: int = 2, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **options}
    return Trainer(default_root_dir=folder, max_steps=steps, **quiet, **settings)


def weights(module: GroundingModule) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.model.named_parameters()}


def main(folder: Path) -> None:
    module = make_module()
    trainer = make_trainer(folder, devices=2, strategy="ddp_find_unused_parameters_true")
    held_out = DataLoader(
        list(SAMPLES["qwen"]), batch_size=1, collate_fn=lambda x: make_batch(module.model, tuple(x))
    )
    trainer.fit(module, make_loader(module, 1, ranks=2), held_out)
    if trainer.is_global_zero:
        means = {name: float(x) for name, x in trainer.callback_metrics.items()}
        found = {"noted": module.noted, "means": means, "weights": weights(module)}
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
