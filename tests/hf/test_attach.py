"""Attaching leaves a model as it was: in use, saved, copied, in company, and after detaching."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from groundkern.hf import GroundedOutput, Klal, Smam, attach, detach, objectives_of
from groundkern.hf.model.attach import _unwrap, _wrapped
from tests.hf.conftest import MODELS
from tests.hf.rows import plain_inputs
from tests.hf.samples import SAMPLES, make_batch


@pytest.fixture(autouse=True)
def _nothing_attached():
    """Detach models of other files' tests, which would leave the attention functions wrapped, and
    unwrap those whose models are gone."""
    for function in [*_wrapped.values()]:
        for model in [*function.users]:
            detach(model)
    for key in [*_wrapped]:
        _unwrap(key, torch.nn.Module())


@torch.no_grad()
def test_without_gk_inputs_nothing_changes(model, samples):
    batch = make_batch(model, samples, side="left")
    named = inspect.signature(model.forward).parameters
    inputs = {name: x for name, x in plain_inputs(batch).items() if name in named}
    labels = batch["input_ids"]
    before = model(**inputs, labels=labels)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    signature = inspect.signature(model.forward)
    attach(model, smam=Smam(), klal=Klal())
    after = model(**inputs, labels=labels)
    assert type(after) is type(before)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    model(**batch)
    again = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, tokens)
    assert inspect.signature(model.forward) == signature


def test_positional_arguments_are_the_same_as_keywords(qwen):
    batch = make_batch(attach(qwen, smam=Smam()), SAMPLES["qwen"])
    wanted = qwen(**batch).loss
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    assert torch.equal(qwen(ids, mask, **batch).loss, wanted)


def test_detach_restores_everything(model):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    keys = set(vars(model))
    marks = [set(vars(module)) for module in model.modules()]
    assert attach(model, smam=Smam()) is model
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert detach(model) is model
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert set(vars(model)) == keys
    assert [set(vars(module)) for module in model.modules()] == marks
    assert detach(model) is model
    with pytest.raises(ValueError, match=r"groundkern\.hf\.attach"):
        objectives_of(model)


def test_detach_leaves_later_registrations_visible(qwen):
    """The wrapper is an entry of this process's registry, which would shadow a global one."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    detach(attach(qwen))

    def another(*args, **kwargs):
        return original(*args, **kwargs)

    AttentionInterface.register("sdpa", another)
    try:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is another
    finally:
        AttentionInterface.register("sdpa", original)


def test_attaching_again_replaces_the_objectives_only(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    attach(qwen, smam=Smam(gamma=2.0))
    wrapper, forward = ALL_ATTENTION_FUNCTIONS["sdpa"], qwen.forward
    first = qwen(**batch).loss
    attach(qwen, smam=Smam(gamma=0.0, alpha=0.0))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is wrapper
    assert qwen.forward == forward
    output = qwen(**batch)
    assert torch.equal(output.loss, output.parts["text"])
    assert not torch.equal(output.loss, first)
    detach(qwen)
    assert "forward" not in vars(qwen)


def test_a_forward_of_the_instance_is_called_and_restored(qwen):
    calls = []
    own = qwen.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    qwen.forward = counted
    batch = make_batch(attach(qwen), SAMPLES["qwen"][2:3])
    calls.clear()  # attach looks at what it does with logits
    qwen(**plain_inputs(batch))
    assert len(calls) == 1
    detach(qwen)
    assert qwen.forward is counted


def test_several_attached_models_coexist():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    first, second = MODELS["qwen"](seed=1), MODELS["llava"](seed=2)
    alone = []
    for model, family in ((first, "qwen"), (second, "llava")):
        attach(model, smam=Smam(), klal=Klal())
        alone.append(model(**make_batch(model, SAMPLES[family])).loss)
        detach(model)
    attach(first, smam=Smam(), klal=Klal())
    attach(second, smam=Smam(), klal=Klal())
    assert torch.equal(first(**make_batch(first, SAMPLES["qwen"])).loss, alone[0])
    assert torch.equal(second(**make_batch(second, SAMPLES["llava"])).loss, alone[1])
    detach(first)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert torch.equal(second(**make_batch(second, SAMPLES["llava"])).loss, alone[1])
    detach(second)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_eager_attention_is_wrapped_in_its_modeling_file():
    before = modeling_qwen2_5_vl.eager_attention_forward
    model = attach(MODELS["qwen"](attention="eager"), smam=Smam())
    assert modeling_qwen2_5_vl.eager_attention_forward is not before
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    assert isinstance(model(**make_batch(model, SAMPLES["qwen"])), GroundedOutput)
    detach(model)
    assert modeling_qwen2_5_vl.eager_attention_forward is before


def test_another_attention_function_after_attach_is_noticed(qwen):
    batch = make_batch(attach(qwen, smam=Smam()), SAMPLES["qwen"])
    wanted = qwen(**batch).loss
    qwen.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attach again"):
        qwen(**batch)
    torch.testing.assert_close(attach(qwen, smam=Smam())(**batch).loss, wanted, rtol=1e-5, atol=0)


def test_only_text_attention_is_marked(model):
    attach(model)
    marked = [name for name, m in model.named_modules() if "_groundkern_layer" in vars(m)]
    assert len(marked) == 3
    assert all("language_model" in name for name in marked)


def test_a_deep_copy_grounds_on_its_own_weights(qwen):
    batch = make_batch(attach(qwen, smam=Smam()), SAMPLES["qwen"])
    twin = copy.deepcopy(qwen)
    before = qwen(**batch).loss
    assert torch.equal(twin(**batch).loss, before)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    assert torch.equal(qwen(**batch).loss, before)
    assert not torch.equal(twin(**batch).loss, before)


def test_saving_an_attached_model_saves_the_model(model, samples, tmp_path):
    batch = make_batch(model, samples)
    attach(model, smam=Smam(), klal=Klal())
    wanted = model(**batch).loss
    model.save_pretrained(tmp_path)
    assert "groundkern" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(loaded(**plain_inputs(batch))).__name__ != "GroundedOutput"
    attach(loaded, smam=Smam(), klal=Klal())
    assert torch.equal(loaded(**batch).loss, wanted)
    detach(loaded)
