"""The mixin over trainers with other parameters, and mixed precision in all that it calls."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from groundkern.hf import GroundingMixin, GroundingTrainer, detach
from groundkern.hf.model import attach as wiring
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import arguments, attached_model, make_trainer

QWEN = SAMPLES["qwen"]


class FactoryTrainer(Trainer):
    """As LLaMA-Factory's: own parameters come first, the rest by name."""

    def __init__(self, finetuning_args, processor, model_args=None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.finetuning_args, self.processor = finetuning_args, processor


class GroundingFactoryTrainer(GroundingMixin, FactoryTrainer):
    pass


def test_a_trainer_with_other_parameters_first(tmp_path):
    model = attached_model()
    common = {
        "model": model,
        "args": arguments(tmp_path, max_steps=1),
        "train_dataset": list(QWEN),
        "data_collator": lambda samples: make_batch(model, tuple(samples)),
    }
    trainer = GroundingFactoryTrainer(
        finetuning_args="own", processor=None, examine=False, **common
    )
    assert trainer.finetuning_args == "own"
    assert trainer.args.max_steps == 1
    batch = make_batch(model, QWEN[2:3])
    assert trainer.compute_loss(model.train(), batch) > 0
    detach(model)


def test_positional_arguments_stay_in_order(tmp_path):
    model = attached_model()
    collate = lambda samples: make_batch(model, tuple(samples))  # noqa: E731
    trainer = GroundingTrainer(model, arguments(tmp_path), collate, list(QWEN))
    assert trainer.data_collator is collate
    assert len(trainer.train_dataset) == len(QWEN)
    detach(model)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_everything_runs_in_the_asked_precision(tmp_path, monkeypatch, compiled):
    """Doctor, training, norms of terms and evaluation: accelerate's autocast is around each."""
    seen = []
    forward = wiring.grounded_forward

    def watched(model, objectives, inputs, teacher):
        dtype = torch.get_autocast_dtype("cpu")
        part = inputs.get("gk_part") or inputs.get("gk_record")
        seen.append((part, model.training, torch.is_autocast_enabled("cpu"), dtype))
        return forward(model, objectives, inputs, teacher)

    monkeypatch.setattr(wiring, "grounded_forward", watched)
    options = {"torch_compile_backend": "eager"} if compiled else {}
    options |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 4}
    trainer = make_trainer(
        attached_model(), tmp_path, bf16=True, max_steps=1, term_norms_every=1, **options
    )
    trainer.train()
    trainer.evaluate()
    assert {call[:2] for call in seen} >= {("logits", False), ("text", True), (None, True)}
    assert (None, False) in {call[:2] for call in seen}
    assert {call[2:] for call in seen} == {(True, torch.bfloat16)}
    detach(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
