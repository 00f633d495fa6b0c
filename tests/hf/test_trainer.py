"""GroundingTrainer: accumulation, checkpointing and ranks change nothing; precision little."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import DvSft, GroundingTrainer, Klal, Smam, attach, detach
from groundkern.hf.watching.context_ranks import ContextRanks
from tests.hf.launching import accelerate_launch, run
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import PARTS, arguments, attached_model, make_trainer, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three steps at batch size 4."""
    return train(tmp_path_factory.mktemp("whole"))


def assert_same_run(run, whole, steps: int = 3) -> None:
    log, parameters = run
    for ours, wanted in zip(log[:steps], whole[0][:steps], strict=True):
        for name in ("loss", *PARTS):
            assert ours[name] == pytest.approx(wanted[name], rel=2e-5), name
    if steps == 3:
        for name, parameter in whole[1].items():
            torch.testing.assert_close(parameters[name], parameter, rtol=1e-4, atol=1e-5)


def test_the_log_has_every_part_and_the_loss_falls(whole):
    log, parameters = whole
    assert len(log) == 4  # three steps and the summary
    for step in log[:3]:
        weighted = step["text"] + 0.5 * step["word"] + step["map_kl"]
        weighted += 0.7 * (2.0 * step["smam_grounding"] + 0.1 * step["smam_cross_entropy"])
        assert step["loss"] == pytest.approx(weighted, rel=1e-5)
    assert log[2]["loss"] < log[0]["loss"]
    assert not set(PARTS) & set(log[3])
    start = dict(tiny_qwen_model().named_parameters())
    assert not any(torch.equal(start[k], p) for k, p in parameters.items() if "proj.weight" in k)


def test_first_step_is_the_loss_of_the_batch(whole):
    model = attached_model().train()
    output = model(**make_batch(model, SAMPLES["qwen"]))
    assert whole[0][0]["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-5)
    detach(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ],
    ids=["2 x 2", "1 x 4", "2 x 2 checkpointed"],
)
def test_accumulation_changes_nothing(whole, tmp_path, settings):
    assert_same_run(train(tmp_path, **settings), whole)


def test_resuming_restores_every_weight(whole, tmp_path):
    train(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    model = attached_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # nothing of the starting weights may survive
    trainer = make_trainer(model, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    detach(model)
    assert_same_run((trainer.state.log_history, dict(model.named_parameters())), whole)


def test_parts_are_averaged_over_the_steps_between_logs(whole, tmp_path):
    log, _ = train(tmp_path, logging_steps=3)
    for name in ("loss", *PARTS):
        mean = sum(step[name] for step in whole[0][:3]) / 3
        assert log[0][name] == pytest.approx(mean, rel=1e-4), name


@pytest.mark.long
def test_two_ranks_equal_one(whole, tmp_path):
    """The terms' gradients too, and the held-out means, though ranks hold two samples twice."""
    run("tests.hf.training", str(tmp_path), launcher=accelerate_launch("ddp"))
    found = json.loads((tmp_path / "log.json").read_text())
    assert_same_run((found["log"], None), whole, steps=2)
    model = attached_model()
    alone = make_trainer(model, tmp_path, max_steps=2, term_norms_every=1)
    alone.train()
    for ours, theirs in zip(found["log"][:2], alone.state.log_history, strict=False):
        for name in (f"grad_norm_{part}" for part in PARTS):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    held_out = alone.evaluate()
    for name in ("loss", *PARTS, "token_accuracy", "word_accuracy"):
        wanted = pytest.approx(held_out[f"eval_{name}"], rel=1e-4)
        assert found["held_out"][f"eval_{name}"] == wanted, name
    kept = json.loads((tmp_path / "checkpoint-1" / "groundkern_trainer.json").read_text())
    assert kept["nonfinite"] == [0, 0, 0]
    detach(model)


def test_bf16_through_accelerate(whole, tmp_path):
    log, _ = train(tmp_path, bf16=True)
    assert log[0]["loss"] == pytest.approx(whole[0][0]["loss"], rel=0.03)
    assert log[2]["loss"] < log[0]["loss"]


def test_peft_and_evaluation(tmp_path):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model = get_peft_model(attached_model(), config)
    trainer = make_trainer(model, tmp_path, learning_rate=1.0, max_steps=6)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    loss, logits, labels = trainer.prediction_step(
        model, make_batch(model, SAMPLES["qwen"]), prediction_loss_only=False
    )
    assert loss.ndim == 0
    assert logits is None
    assert labels is None
    detach(model)


def test_batches_without_grounding_train_plainly(tmp_path):
    """A model may see both kinds: without gk_ inputs the Trainer does what it always does."""
    model = attached_model()
    trainer = make_trainer(model, tmp_path, max_steps=1)
    collate = trainer.data_collator

    def plain(samples):
        batch = {k: v for k, v in collate(samples).items() if not k.startswith("gk_")}
        return {**batch, "labels": batch["input_ids"]}

    trainer.data_collator = plain
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert "text" not in trainer.state.log_history[0]
    detach(model)


def test_rows_in_some_micro_batches_only_are_refused(tmp_path):
    """Their terms would count as often as there are micro-batches."""
    model = attached_model()
    trainer = make_trainer(model, tmp_path, max_steps=1)
    batch = make_batch(model, SAMPLES["qwen"])
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    with pytest.raises(ValueError, match="of a step or in none, got some in 1 of 2"):
        trainer.get_batch_samples(iter([batch, plain]), 2, torch.device("cpu"))
    detach(model)


def test_plain_packed_batches_train_each_document_alone(tmp_path):
    model = attached_model()
    documents = [torch.arange(20, 30), torch.arange(40, 45)]
    with torch.no_grad():
        losses = [model(input_ids=x[None], labels=x[None]).loss * (len(x) - 1) for x in documents]
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.train_dataset = [{"input_ids": x.tolist()} for x in documents]
    trainer.data_collator = DataCollatorWithFlattening()
    trainer.train()
    wanted = float(sum(losses)) / 13
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    detach(model)


def test_doctor_runs_once_on_the_first_batch_with_rows(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("groundkern.hf.trainer.doctor", lambda m, b, tolerance: seen.append(b))
    model = attached_model()
    make_trainer(model, tmp_path, max_steps=2).train()
    assert len(seen) == 1
    assert (seen[0]["gk_text_position"] >= 0).any()
    make_trainer(model, tmp_path, max_steps=1, examine=False).train()
    assert len(seen) == 1
    detach(model)


def test_what_cannot_be_exact_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"groundkern\.hf\.attach"):
        GroundingTrainer(tiny_qwen_model(), arguments(tmp_path))
    model = attach(tiny_qwen_model(), smam=Smam(), dv_sft=DvSft(), klal=Klal())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        GroundingTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="compute_loss_func"):
        GroundingTrainer(model, arguments(tmp_path), compute_loss_func=lambda *a, **k: 0)
    detach(model)


def test_ligers_fused_loss_is_refused(tmp_path):
    model = attach(tiny_qwen_model(), smam=Smam())
    liger = arguments(tmp_path)
    liger.use_liger_kernel = True
    liger.liger_kernel_config = {"fused_linear_cross_entropy": False}
    try:
        GroundingTrainer(model, liger)
    except ImportError as error:  # older transformers look for the package at once
        detach(model)
        pytest.skip(str(error))
    liger.liger_kernel_config = None
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        GroundingTrainer(model, liger)
    detach(model)


@pytest.mark.parametrize("name", ["sp_size", "tp_size"])
def test_splitting_layers_or_batches_over_ranks_is_refused(tmp_path, name):
    """Before accelerate sees it, which raises an error of its own on CPU."""
    model = attached_model()
    config = ParallelismConfig(**{name: 2})
    with pytest.raises(ValueError, match=rf"parallelism_config\.{name}.*expected 1"):
        make_trainer(model, tmp_path, parallelism_config=config)
    trainer = make_trainer(model, tmp_path)  # the same if `accelerate launch` configured it
    trainer.accelerator.state.parallelism_config = config
    with pytest.raises(ValueError, match=rf"parallelism_config\.{name}"):
        ContextRanks.of(trainer.accelerator)
    detach(model)


def test_a_context_of_more_ranks_than_there_are_is_refused(tmp_path):
    model = attached_model()
    with pytest.raises(ValueError, match="whose product is 1, the number of processes, got 2"):
        make_trainer(model, tmp_path, parallelism_config=ParallelismConfig(cp_size=2))
    detach(model)
