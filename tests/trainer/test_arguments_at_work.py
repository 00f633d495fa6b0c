"""`training.arguments` at work: in a run from its settings to a continued checkpoint, and in what
is trained."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.neftune import activate_neftune

from groundkern.trainer import durable, trial
from groundkern.trainer import run_folder as folder
from groundkern.trainer.arguments import further
from groundkern.trainer.command_line import load_config
from groundkern.trainer.config import ConfigError
from groundkern.trainer.train import train
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import attached_model, make_trainer
from tests.trainer.tiny_run import config, losses

pytestmark = pytest.mark.usefixtures("one_thread")
NEEDED = ["--model.path", "nowhere", "--data.train", "nothing", "--training.output", "out"]
NEEDED += ["--training.steps", "4"]


# ---- a run from YAML to a continued checkpoint ----


ABSOLUTE = {"threshold_mode": "abs"}
ARGUMENTS = {
    "optim": "adafactor",
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-5},
    "neftune_noise_alpha": 5,
    "gradient_checkpointing_kwargs": {"preserve_rng_state": False},
    "run_name": "one",
}


def of_arguments(data: Path, output: Path, **arguments):
    training = {"steps": 3, "save_every": 2, "arguments": ARGUMENTS | arguments}
    return config(
        data,
        output,
        data={"test": None},
        model={"gradient_checkpointing": True},
        training=training,
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("arguments")
    train(of_arguments(data, output))
    return output


def test_arguments_have_their_effect_and_are_in_the_record(data, trained):
    rows = losses(trained)
    # warm-up: 0.03 of 3 steps is one step
    rates = [1e-5 + (1e-3 - 1e-5) * (1 - done / 2) ** 2 for done in range(3)]
    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx(rates[:2], rel=1e-6)
    found = durable.read_json(trained / folder.RECORD)["config"]["training"]["arguments"]
    assert found == ARGUMENTS


def test_a_continued_run_has_the_same_losses_and_the_same_arguments(data, trained, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(trained, output)
    whole = losses(output)
    shutil.rmtree(output / "checkpoint-3")
    other = of_arguments(data, output, neftune_noise_alpha=6)
    with pytest.raises(ConfigError, match=r"training.arguments.neftune_noise_alpha: 5.0 -> 6.0"):
        train(other)
    train(of_arguments(data, output, run_name="two", dataloader_pin_memory=False))
    assert losses(output) == whole


def test_arguments_about_evaluations_and_tokens(data, tmp_path):
    """No held-out loss is better by 1e9, so that each after the first halves the learning rate."""
    arguments = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 1e9} | ABSOLUTE,
        "eval_delay": 2,
        "include_num_input_tokens_seen": "non_padding",
        "full_determinism": True,
    }
    training = {"steps": 4, "arguments": arguments}
    try:
        train(config(data, tmp_path, training=training, evaluation={"every": 1, "heatmaps": 0}))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    rows = folder.read_metrics(tmp_path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3, 4]
    trained = [row for row in rows if "loss" in row]
    assert [row["learning_rate"] for row in trained] == [1e-3, 1e-3, 1e-3, 5e-4]
    seen = [row["num_input_tokens_seen"] for row in trained]
    real = Counter(durable.read_json(tmp_path / folder.RECORD)["supervision"])
    assert seen[-1] == real["tokens"]
    assert sorted(seen) == seen
    assert "num_input_tokens_seen" not in folder.loss_terms(rows)


@pytest.mark.long
def test_the_greedy_scheduler_follows_the_held_out_loss(tmp_path):
    kwargs = {"patience": 0, "factor": 0.5, "threshold": 1e9, "min_lr": 1e-6} | ABSOLUTE
    options = {"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": kwargs, "max_steps": 3}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "examine": False}
    trainer = make_trainer(attached_model(), tmp_path, **options, **evaluated)
    trainer.train()
    rates = [x["learning_rate"] for x in trainer.state.log_history if "learning_rate" in x]
    assert rates == [0.05, 0.1, 0.05]  # up after the first, which is better than none


# ---- what the arguments do to the losses ----


def first_losses(folder: Path, model=None, **options) -> list[dict]:
    trainer = make_trainer(model or attached_model(), folder, max_steps=2, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if k != "epoch"} for row in rows]


@pytest.mark.parametrize(
    "options", [{"offload": True}, pytest.param({"every_n_layers": 2}, marks=pytest.mark.long)]
)
def test_offloaded_activations_give_the_same_losses(options, tmp_path):
    """Of maps too, which are recorded inside of the layers. A CPU has no pinned memory."""
    if "activation_checkpointing_kwargs" not in vars(TrainingArguments("x")):
        pytest.skip("transformers < 5.23")
    words = ["--model.gradient_checkpointing", "true"]
    words += ["--training.arguments.gradient_checkpointing_kwargs", str(options)]
    passed = further(load_config(None, [*NEEDED, *words]))
    assert passed["activation_checkpointing_kwargs"] == {"use_reentrant": False, **options}
    whole = first_losses(tmp_path)
    kept = Mock(side_effect=lambda **_: torch.autograd.graph.save_on_cpu(pin_memory=False))
    with patch("transformers.modeling_utils.save_on_cpu", kept):
        assert first_losses(tmp_path, **passed) == whole
    assert kept.called == ("offload" in options)
    if "offload" in options and not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match="expected a GPU, since activations are kept in pin"):
            trial.try_arguments(load_config(None, [*NEEDED, *words]))


def test_reentrant_checkpointing_is_refused_where_maps_are_recorded(tmp_path):
    words = ["--model.gradient_checkpointing", "true"]
    words += ["--training.arguments.gradient_checkpointing_kwargs", "{use_reentrant: true}"]
    passed = further(load_config(None, [*NEEDED, *words]))
    with pytest.raises(ValueError, match="reentrant"):
        first_losses(tmp_path, **passed)


def test_neftune_moves_the_embeddings_of_training_only(tmp_path):
    quiet, noisy = first_losses(tmp_path), first_losses(tmp_path, neftune_noise_alpha=5.0)
    assert quiet[0]["text"] != pytest.approx(noisy[0]["text"], rel=1e-4)
    model = attached_model()
    trainer = make_trainer(model, tmp_path, max_steps=1, neftune_noise_alpha=5.0)
    held_out = []

    def evaluate(*_, **__):
        held_out.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "map" in k})
        held_out.append({k: v for k, v in trainer.evaluate().items() if "loss" in k or "map" in k})

    with patch.object(trainer.watch, "on_step_begin", evaluate):
        trainer.train()
    assert held_out[0] == held_out[1]
    plain = make_trainer(attached_model(), tmp_path).evaluate()
    assert held_out[0] == {k: plain[k] for k in held_out[0]}
    assert not model.get_input_embeddings()._forward_hooks


def test_side_tokens_have_noise_of_their_own():
    """As every token has, within the bound for the length of a row with its side tokens."""
    model = attached_model().train()
    batch = make_batch(model, tuple(SAMPLES["qwen"]))
    embeddings, noised = model.get_input_embeddings(), []
    activate_neftune(model, 5.0)
    embeddings.register_forward_hook(lambda module, given, made: noised.append((*given, made)))
    model(**batch)
    ((ids, made),) = [x for x in noised if x[1].requires_grad]
    length, side = batch["input_ids"].shape[1], batch["gk_side_position"].shape[1]
    assert ids.shape[1] == length + side
    noise = (made - embeddings.weight[ids]).detach()
    bound = 5.0 / (noise.shape[1] * noise.shape[2]) ** 0.5
    assert 0.9 * bound < noise.abs().max() < 1.001 * bound
    row = batch["gk_side_position"][0, 0]
    assert ids[0, row] == ids[0, length]
    assert not torch.allclose(noise[0, row], noise[0, length], rtol=0.1)


def test_weights_that_an_optimizer_averages_are_saved_as_they_are_evaluated(tmp_path):
    """schedulefree's optimizers train other weights than those that count."""

    class Averaging(torch.optim.SGD):
        mode = "train"

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    model = attached_model()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "examine": False}
    trainer = make_trainer(model, tmp_path, **options)
    optimizer = trainer.optimizer = Averaging(model.parameters(), lr=0.01)
    modes = []
    with patch.object(trainer, "_write_checkpoint", lambda *_: modes.append(optimizer.mode)):
        trainer.train()
    assert modes == ["eval", "eval"]
    assert optimizer.mode == "eval"
