"""`training.arguments`: names and values checked at once, and tried before any work."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.trainer import checkpoints, trial
from groundkern.trainer.arguments import OURS, REFUSED, checked
from groundkern.trainer.command_line import load_config
from groundkern.trainer.config import Config, ConfigError, validate
from groundkern.trainer.fields import field_names
from groundkern.trainer.train import train
from tests.hf.training import attached_model, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# What goes through as it is. A name that transformers adds shows here as a failure: try it.
# fmt: off
PASSED = (
    "activation_checkpointing_kwargs", "adam_beta1", "adam_beta2", "adam_epsilon",
    "average_tokens_across_devices", "dataloader_multiprocessing_context",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_timeout", "eval_delay", "full_determinism", "gradient_checkpointing_kwargs",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "log_on_each_node",
    "logging_first_step", "lr_scheduler_kwargs", "lr_scheduler_type", "neftune_noise_alpha",
    "optim", "optim_args", "optim_target_modules", "project", "run_name", "tf32", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id",
    "trackio_space_id", "trackio_static_space_id",
)
# fmt: on
WITHOUT_PACKAGE = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
NEEDED = ["--model.path", "nowhere", "--data.train", "nothing", "--training.output", "out"]
NEEDED += ["--training.steps", "4"]


def given(**arguments):
    """A config with these arguments, of paths that do not exist."""
    words = [*NEEDED, "--training.arguments", str(arguments)]
    return load_config(None, words)


def test_every_argument_is_ours_or_refused_or_passes():
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hub = {name for name in names if name.startswith(("push_to_hub", "hub_"))}
    known = [set(OURS) & names, set(REFUSED) & names, hub, set(PASSED)]
    assert names - set().union(*known) == set()
    assert sum(map(len, known)) == len(set().union(*known))
    assert set(OURS.values()) <= set(field_names(Config))


def test_arguments_of_the_file_and_of_the_command_line(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("training: {arguments: {optim: sgd, adam_epsilon: 1e-6, adam_beta1: 0.5}}")
    words = ["--training.arguments.optim", "adafactor", "--training.arguments.adam_beta1=0.7"]
    found = load_config(file, [*NEEDED, *words]).training.arguments
    assert found == {"optim": "adafactor", "adam_epsilon": 1e-6, "adam_beta1": 0.7}
    words = ["--training.arguments", '{"optim": "rmsprop"}']
    words += ["--training.arguments.optim_args", "alpha=0.9,eps=1e-6"]
    found = load_config(None, [*NEEDED, *words]).training.arguments
    assert found == {"optim": "rmsprop", "optim_args": "alpha=0.9,eps=1e-6"}
    kwargs = ["--training.arguments.lr_scheduler_kwargs", "{power: 2}"]
    found = load_config(None, [*NEEDED, *kwargs]).training.arguments
    assert found == {"lr_scheduler_kwargs": {"power": 2}}


@pytest.mark.parametrize(
    ("arguments", "words", "sentence"),
    [
        ({"optin": "sgd"}, [], "no such argument of TrainingArguments; did you mean `optim`?"),
        ({"learning_rat": 1}, [], "did you mean `training.learning_rate`?"),
        ({"learning_rate": 1}, [], "give `training.learning_rate` instead"),
        ({"optim": "adafacto"}, [], "no such name, 'adafacto'; did you mean adafactor?"),
        ({"optim": "Nothing"}, [], "no such name, 'Nothing'; expected one of adamw_torch, "),
        ({"lr_scheduler_type": "cosin"}, [], "no such name, 'cosin'; did you mean cosine?"),
        ({"optim": "lomo"}, [], "it steps in the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, [], "it steps in the backward pass"),
        ({"neftune_noise_alpha": -1}, [], "expected a number above 0, got -1.0"),
        ({"neftune_noise_alpha": "x"}, [], "expected a valid number, got 'x'"),
        ({"adam_beta1": float("inf")}, [], "expected a finite number, got inf"),
        ({"label_smoothing_factor": 0.1}, [], "not supported: the text loss is not smoothed"),
        ({"auto_find_batch_size": True}, [], "count batches of training.batch_size"),
        ({"hub_model_id": "x"}, [], "a run sends nothing away"),
        ({"ddp_backend": "gloo"}, [], "gloo on CPUs"),
        ({"ddp_timeout": 0}, [], "expected seconds above 0, got 0"),
        ({"lr_scheduler_type": "linear"}, ["--training.scheduler", "linear"], "left out beside it"),
        ({"lr_scheduler_type": "greedy"}, [], "expected evaluation.every beside greedy, got none"),
        (
            {"lr_scheduler_kwargs": {"patience": 2}, "lr_scheduler_type": "greedy"},
            ["--evaluation.every", "1", "--data.test", "x"],
            "expected min_lr of at most training.learning_rate, 1e-05, beside greedy, got 0.001",
        ),
        ({"gradient_checkpointing_kwargs": {"offload": True}}, [], "gradient_checkpointing true"),
        (
            {"gradient_checkpointing_kwargs": {"offlod": True}},
            ["--model.gradient_checkpointing", "true"],
            "expected some of determinism_check, ",
        ),
        (
            {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}},
            ["--model.gradient_checkpointing", "true", "--model.lora.dropout", "0.1"],
            "expected preserve_rng_state true beside model.lora.dropout, got 0.1",
        ),
        ({"deepspeed": "x.json"}, [], "training.strategy or accelerate's config file shards"),
        ({"fsdp": True}, [], "training.strategy or accelerate's config file shards"),
        ({"dataloader_prefetch_factor": 2}, [], "expected training.workers above 0"),
        ({"use_liger_kernel": True}, [], "Liger's kernels need a GPU"),
        ({"debug": "underflow_overflow"}, [], "training.max_nonfinite"),
        ({"skip_memory_metrics": False}, [], "would stand among held-out losses"),
        ({"eval_delay": 2}, [], "expected evaluation.every beside it, got none"),
        ({"include_num_input_tokens_seen": "real"}, [], "expected one of all, non_padding, no"),
        (
            {"include_num_input_tokens_seen": "non_padding"},
            ["--data.pack_to", "512"],
            "expected all beside data.pack_to",
        ),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_read(arguments, words, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*NEEDED, *words, "--training.arguments", str(arguments)])
    said = str(caught.value)
    assert f"`training.arguments.{next(iter(arguments))}" in said
    assert sentence in said
    assert len(said) < 1000


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_an_optimizer_works_or_says_what_is_missing(name):
    """With bitsandbytes, torchao and others installed, theirs are tried too."""
    arguments = {"optim": name, "optim_target_modules": ["q_proj"]}
    try:
        trial.try_arguments(given(**arguments))
        said = None
    except ConfigError as error:
        said = str(error)
    if said is None or name in WITHOUT_PACKAGE:
        assert said is None
    else:
        assert f"{name} cannot be used: " in said or f"{name} is not supported: " in said
        assert "\n" not in said


def test_the_timeout_is_that_of_the_processes(monkeypatch):
    """They meet before the Trainer could say how long a collective may take."""
    asked = []

    def meet(**options):
        asked.append(options["collectives"])
        raise KeyboardInterrupt

    monkeypatch.setattr("groundkern.trainer.train.joined", meet)
    for arguments in ({"ddp_timeout": 7}, {}):
        with pytest.raises(KeyboardInterrupt):
            train(given(**arguments))
    assert asked == [7, TrainingArguments.ddp_timeout]


def test_a_missing_package_ends_a_run_before_anything_is_read(tmp_path):
    missing = given(optim="adamw_torch_xla").model_dump()
    missing["training"]["output"] = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"adamw_torch_xla cannot be used: .*torch_xla"):
        train(validate(missing, where=lambda loc: "test"))


@pytest.mark.parametrize("name", [each.value for each in SchedulerType])
def test_every_scheduler_is_tried(name):
    words = [
        "--evaluation.every",
        "1",
        "--data.test",
        "x",
        "--training.arguments.lr_scheduler_type",
    ]
    kwargs = {"cosine_with_min_lr": {"min_lr": 1e-6}, "cosine_warmup_with_min_lr": {"min_lr": 1e-6}}
    kwargs |= {"warmup_stable_decay": {"num_decay_steps": 2}, "greedy": {"min_lr": 1e-7}}
    words += [name, "--training.arguments.lr_scheduler_kwargs", str(kwargs.get(name))]
    if name not in kwargs:
        words = words[:-2]
    trial.try_arguments(load_config(None, [*NEEDED, *words]))
    given = kwargs.get(name, {}) | {"nothing_like_it": 1}
    wrong = ["--training.arguments.lr_scheduler_kwargs", str(given)]
    if name not in ("constant", "constant_with_warmup"):  # which take none
        with pytest.raises(ConfigError, match=r"cannot be used: .*nothing_like_it"):
            trial.try_arguments(load_config(None, [*NEEDED, *words, *wrong]))


def test_an_optimizer_s_argument_is_tried():
    with pytest.raises(
        ConfigError, match=r"`training.arguments.optim`: adamw_torch.* cannot .*1.5"
    ):
        trial.try_arguments(given(adam_beta1=1.5))
    with pytest.raises(ConfigError, match="rmsprop cannot be used"):
        trial.try_arguments(given(optim="rmsprop", optim_args="alpha"))
    with pytest.raises(ConfigError, match="torch_empty_cache_steps"):
        trial.try_arguments(given(torch_empty_cache_steps=0))


def test_trying_draws_no_random_number():
    state = torch.get_rng_state()
    trial.try_arguments(given(optim="adafactor"))
    assert torch.equal(state, torch.get_rng_state())


QUICK = ("adafactor", "rmsprop")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x in QUICK else pytest.mark.long) for x in WITHOUT_PACKAGE],
)
def test_an_optimizer_trains(name, tmp_path):
    """Each has steps of its own: none is quietly replaced by another."""
    model = attached_model()
    before = model.lm_head.weight.detach().clone()
    options = {"learning_rate": 1e-3, **checked({"optim": name})}
    trainer = make_trainer(model, tmp_path, max_steps=1, examine=False, **options)
    trainer.train()
    kind = type(trainer.optimizer.optimizer).__name__
    assert kind.lower() == {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"}.get(name, name)
    moved = float((model.lm_head.weight.detach() - before).abs().max())
    assert 1e-6 < moved < 0.02


# ---- precision ----


def bf16_arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, **options)


def test_lost_updates_are_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    model = tiny_qwen_model()
    args = bf16_arguments(tmp_path)
    assert not trial.warn_of_lost_updates(model, args, fp32_copies=False)
    model = model.to(torch.bfloat16)
    assert not trial.warn_of_lost_updates(model, args, fp32_copies=True)
    assert not caplog.records
    assert trial.warn_of_lost_updates(model, args, fp32_copies=False)
    assert "bfloat16 weights are trained without an fp32 copy: adamw_torch_fused" in caplog.text
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trained = {p.dtype for p in adapted.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert not trial.warn_of_lost_updates(adapted, args, fp32_copies=False)


def test_an_optimizer_that_rounds_at_random_keeps_small_updates(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    options = {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}
    model = tiny_qwen_model().to(torch.bfloat16)
    assert not trial.warn_of_lost_updates(
        model, bf16_arguments(tmp_path, **options), fp32_copies=False
    )
    assert trial.warn_of_lost_updates(
        model, bf16_arguments(tmp_path, optim="adamw_torch_8bit"), fp32_copies=False
    )


def test_target_modules_are_looked_for_in_the_model():
    model = tiny_qwen_model()
    trial.refuse_no_target(model, given(optim_target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"expected names of linear layers, such as .*, got"):
        trial.refuse_no_target(model, given(optim_target_modules=["no_such"]))


def test_no_arguments_import_nothing():
    with patch.dict(sys.modules):
        sys.modules.pop("groundkern.trainer.arguments", None)
        load_config(None, NEEDED)
        assert "groundkern.trainer.arguments" not in sys.modules


def test_arguments_that_change_no_loss_may_change():
    free = [name for name in checkpoints.FREE_TO_CHANGE if name.startswith("training.arguments.")]
    passes = {f"training.arguments.{name}" for name in PASSED}
    for beginning in free:
        assert any(name.startswith(beginning) for name in passes), beginning
    lossy = ("optim", "adam_", "lr_", "neftune", "average_", "full_", "tf32", "torch_compile")
    for name in lossy:
        assert not f"training.arguments.{name}".startswith(tuple(free))
