"""Doctor passes the families that are wired, and names what is wrong with a model that is not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from groundkern.hf import Klal, Smam, attach, detach, doctor
from groundkern.hf.model import layer as wiring
from tests.hf.conftest import MODELS
from tests.hf.samples import SAMPLES, make_batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_wired_families_pass(model, samples, side):
    attach(model, smam=Smam(), klal=Klal()).train()
    model.lm_head.eval()
    report = doctor(model, make_batch(model, samples, side=side))
    assert report.rows == 6
    assert report.tolerance == 1e-5
    assert report.main <= 1e-5
    assert report.side <= 1e-5
    assert report.control > 0.1
    assert model.training
    assert not model.lm_head.training
    assert not any(p.grad is not None for p in model.parameters())


def test_bf16_peft_and_text_rows(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    for name in ("gk_side_position", "gk_side_set", "gk_side_inside"):
        del batch[name]
    peft = get_peft_model(attach(qwen.bfloat16()), LoraConfig(target_modules=["q_proj", "lm_head"]))
    report = doctor(peft, batch)
    assert report.tolerance == 0.05
    assert report.rows == 16
    assert report.control > 0.05


def broken_model(break_it):
    """A model whose wiring went wrong in one place."""
    model = attach(MODELS["qwen"](), smam=Smam())
    break_it(model)
    return model, make_batch(model, SAMPLES["qwen"])


def test_a_changed_main_pass_is_found():
    """Logits that the model's own forward post-processes in a way that is not copied."""

    def scale_logits(model):
        head = model.lm_head.register_forward_hook(lambda m, a, out: out * 1.5)
        model.base_model.register_forward_pre_hook(
            lambda m, a, k: head.remove() if "gk_body_run" in k else None, with_kwargs=True
        )

    model, batch = broken_model(scale_logits)
    with pytest.raises(ValueError, match="main logits with side tokens within"):
        doctor(model, batch)
    detach(model)


def test_side_tokens_that_see_less_are_found(monkeypatch):
    ask = wiring.SideRows.ask

    def less(self, layer):
        return ask(self, layer._replace(k=layer.k * 0.9))

    monkeypatch.setattr(wiring.SideRows, "ask", less)
    model, batch = broken_model(lambda model: None)
    with pytest.raises(ValueError, match="every key allowed"):
        doctor(model, batch)
    detach(model)


def test_side_tokens_that_ignore_their_set_are_found(monkeypatch):
    init = wiring.SideRows.__init__
    monkeypatch.setattr(wiring.SideRows, "__init__", lambda self, rows, *_: init(self, rows, None))
    model, batch = broken_model(lambda model: None)
    with pytest.raises(ValueError, match="to move by more than"):
        doctor(model, batch)
    detach(model)


def test_bad_batches_are_refused(qwen):
    batch = make_batch(attach(qwen, smam=Smam()), SAMPLES["qwen"])
    with pytest.raises(ValueError, match="gk_side_position or gk_text_position"):
        doctor(qwen, {k: v for k, v in batch.items() if not k.startswith("gk_")})
    image_row = {**batch, "gk_side_position": batch["gk_word_position"]}
    with pytest.raises(ValueError, match="image token"):
        doctor(qwen, image_row)
    detach(qwen)
    with pytest.raises(ValueError, match=r"groundkern\.hf\.attach"):
        doctor(qwen, batch)


def test_attention_dropout_is_refused():
    model = attach(MODELS["qwen"](attention_dropout=0.1), smam=Smam())
    batch = make_batch(model, SAMPLES["qwen"])
    with pytest.raises(ValueError, match="attention_dropout"):
        doctor(model, batch)
    assert torch.isfinite(model(**batch).loss)  # in eval there is none
    with pytest.raises(ValueError, match="attention_dropout"):
        model.train()(**batch)
    detach(model)
