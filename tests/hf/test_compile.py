"""Compiled layers give the losses and gradients of eager ones, and share their graphs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import Smam, attach, compile_layers, detach, doctor
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.logit_decoders import build_moe, padded_batch
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import PARTS, make_trainer, train

QWEN = SAMPLES["qwen"]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def model(terms):
    model = attach(tiny_qwen_model(), **terms).train()
    yield model
    detach(model)


def losses_and_gradients(model, batches: list[dict]) -> list[tuple]:
    found = []
    for batch in batches:
        loss = model(**batch).loss
        found.append((loss.detach(), gradients(model, loss)))
    return found


def assert_same_steps(found: list[tuple], wanted: list[tuple]) -> None:
    for (loss, own), (other_loss, other) in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0)
        assert_same_gradients(own, other, share=1e-5)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.long), True])
def test_layers_share_graphs_whatever_the_lengths(model, checkpointing):
    """With side tokens, maps and words: graphs for one shape, then for any."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [make_batch(model, x) for x in (QWEN, QWEN[:2], QWEN[1:3], QWEN[2:], QWEN[1:])]
    wanted = losses_and_gradients(model, batches)
    compile_layers(model, backend="eager")
    found, counted = [], []
    for batch in batches:
        found += losses_and_gradients(model, [batch])
        counted.append(graphs())
    assert_same_steps(found, wanted)
    assert counted[0] > 0
    assert counted[1] <= 2 * counted[0]
    assert counted[1:] == [counted[1]] * 4  # no length is new any more
    assert not counters["recompile_limit"]


def test_a_compiled_model_compiles_its_layers(model, monkeypatch):
    """As a user's `torch.compile(model)` has it."""
    asked = []
    monkeypatch.setattr(
        "groundkern.hf.model.attach.compile_layers",
        lambda model: (asked.append(model), compile_layers(model, backend="eager")),
    )
    batch = make_batch(model, QWEN)
    wanted = losses_and_gradients(model, [batch, batch])
    compiled = torch.compile(model, backend="eager")
    found = []
    for _ in range(2):
        loss = compiled(**batch).loss
        found.append((loss.detach(), gradients(model, loss)))
    assert_same_steps(found, wanted)
    assert asked == [model]  # once


@pytest.mark.long
def test_a_compiled_model_can_be_attached_and_examined(model):
    compiled = torch.compile(model, backend="eager")
    assert attach(compiled, smam=Smam()) is compiled
    assert doctor(compiled, make_batch(model, QWEN)).main <= 1e-5


@pytest.mark.long
def test_compiled_layers_with_adapters(model):
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"])).train()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    batches = [make_batch(model, QWEN)]
    wanted = losses_and_gradients(peft, batches)
    compile_layers(peft, backend="aot_eager")
    assert_same_steps(losses_and_gradients(peft, batches), wanted)


@pytest.mark.long
def test_compiled_routers_keep_their_loss(terms):
    model = attach(build_moe("Qwen3MoeForCausalLM"), **terms).train()
    wanted = losses_and_gradients(model, [padded_batch()])
    compile_layers(model, backend="eager")
    assert_same_steps(losses_and_gradients(model, [padded_batch()]), wanted)
    detach(model)


def test_the_trainer_compiles(tmp_path):
    wanted, _ = train(tmp_path / "eager", max_steps=2)
    found, _ = train(tmp_path / "compiled", max_steps=2, torch_compile_backend="eager")
    assert graphs() > 0
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        for name in ("loss", "grad_norm", *PARTS):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [make_batch(model, x) for x in (QWEN, QWEN[:2], QWEN[1:3])]
    wanted = losses_and_gradients(model, batches)
    compile_layers(model)
    assert_same_steps(losses_and_gradients(model, batches), wanted)


@pytest.mark.long
def test_the_trainer_compiles_with_inductor(tmp_path, terms):
    wanted, _ = train(tmp_path / "eager", max_steps=2)
    found, _ = train(tmp_path / "compiled", max_steps=2, torch_compile=True)
    for ours, theirs in zip(found[:2], wanted[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    model = attach(tiny_qwen_model(), **terms)
    trainer = make_trainer(model, tmp_path / "evaluated", torch_compile=True, max_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    detach(model)
