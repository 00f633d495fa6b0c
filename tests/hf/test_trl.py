"""TRL's SFTTrainer with GroundingMixin trains as GroundingTrainer does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern.hf import GroundingMixin, detach
from tests.hf.packed import packed_batch
from tests.hf.rows import plain_inputs
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import PARTS, attached_model, settings, train

trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")


def make_sft_trainer(folder, collate=make_batch, **overrides):
    from datasets import Dataset

    class GroundingSFTTrainer(GroundingMixin, trl.SFTTrainer):
        pass

    model = attached_model()
    options = {"bf16": False, "gradient_checkpointing": False, **overrides}
    options["dataset_kwargs"] = {"skip_prepare_dataset": True}
    return GroundingSFTTrainer(
        model,
        trl.SFTConfig(**settings(folder, **options)),
        train_dataset=Dataset.from_dict({"row": range(4)}),
        eval_dataset=Dataset.from_dict({"row": range(4)}),
        processing_class=tiny_qwen_processor(),
        data_collator=lambda rows: collate(model, tuple(SAMPLES["qwen"][r["row"]] for r in rows)),
    )


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("wanted"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
    ],
    ids=["4", "2 x 2 checkpointed"],
)
def test_trains_as_grounding_trainer_does(wanted, tmp_path, options):
    trainer = make_sft_trainer(tmp_path, **options)
    trainer.train()
    for ours, theirs in zip(trainer.state.log_history[:3], wanted[0][:3], strict=True):
        for name in ("loss", "grad_norm", *PARTS):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert trainer.evaluate()["eval_loss"] < wanted[0][2]["loss"]
    found = dict(detach(trainer.model).named_parameters())
    for name, parameter in wanted[1].items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5)


def test_packed_rows_train_as_padded_ones(wanted, tmp_path):
    def packed(model, samples):
        return packed_batch(model, [samples[:2], samples[2:]])

    trainer = make_sft_trainer(tmp_path, packed)
    trainer.train()
    for ours, theirs in zip(trainer.state.log_history[:3], wanted[0][:3], strict=True):
        for name in ("loss", "grad_norm", *PARTS):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    detach(trainer.model)


def test_padding_free_batches_without_grounding_are_sft_trainers_own(tmp_path):
    """One row of all texts, as TRL's collator lays them: the mixin keeps them apart."""
    collate = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(0, padding_free=True)

    def plain(model, samples):
        texts = [[30 + i] * (5 + i) for i in range(len(samples))]
        batch = collate([{"input_ids": ids} for ids in texts])
        assert "attention_mask" not in batch and batch["position_ids"].shape == (1, 26)
        return batch

    trainer = make_sft_trainer(tmp_path, plain, max_steps=1)
    sums = []
    with torch.no_grad():
        for i in range(4):  # each text alone: one row would let them meet
            ids = torch.tensor([[30 + i] * (5 + i)])
            sums.append(trainer.model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(float(sum(sums)) / 22, rel=1e-4) and "text" not in log
    detach(trainer.model)


def test_batches_without_grounding_are_sft_trainers_own(tmp_path):
    def plain(model, samples):
        batch = make_batch(model, samples)
        return {**plain_inputs(batch), "labels": batch["input_ids"]}

    trainer = make_sft_trainer(tmp_path, plain, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["mean_token_accuracy"] >= 0  # of SFTTrainer.compute_loss
    assert "text" not in log
    detach(trainer.model)
