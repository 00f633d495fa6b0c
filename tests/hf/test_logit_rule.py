"""What a forward does with its logits is measured, whoever wrote or patched it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Cohere2ForCausalLM, Gemma2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from groundkern.hf import attach, detach, doctor
from groundkern.hf.model.logit_rule import BLOCKED, logit_rule
from tests.hf.families import FAMILIES
from tests.hf.logit_decoders import DECODERS, text_batch


def test_the_rule_is_what_the_forward_does_and_not_what_the_config_says():
    rules = {name: logit_rule(make()) for name, make in DECODERS.items()}
    plain = (1.0, None, None)
    assert rules == {
        "gemma2": (1.0, 5.0, None),
        "cohere2": (0.25, None, None),
        "granite": (0.25, None, None),
    }
    assert logit_rule(FAMILIES["aya_vision"].model()) == plain  # its text config has 0.25
    assert logit_rule(DECODERS["gemma2"]().to("meta")) == rules["gemma2"]


def typed(base: type, forward) -> type:
    """A class without source, as one typed into a prompt."""
    return type("Typed", (base,), {"forward": forward})


def capped(self, input_ids=None, **kwargs):
    hidden = self.model(input_ids=input_ids, **kwargs)[0]
    logits = self.lm_head(hidden / 3.0) * 2.0
    return CausalLMOutputWithPast(logits=7.0 * torch.tanh(logits / 7.0))


def test_a_patched_forward_is_measured_too(monkeypatch):
    """Liger and users put plain functions on classes and on instances."""
    with monkeypatch.context() as patch:
        patch.setattr(Gemma2ForCausalLM, "forward", capped)
        rule = logit_rule(DECODERS["gemma2"]())
        assert rule.scale == pytest.approx(2 / 3, rel=1e-6)
        assert rule.softcap == 7.0
    model = DECODERS["gemma2"]()
    model.forward = capped.__get__(model)
    batch = text_batch()
    attach(model)
    report = doctor(model, batch)  # compares with the patched forward
    assert report.main <= 1e-5
    detach(model)
    assert logit_rule(model).softcap == 7.0
    model.__class__ = typed(Gemma2ForCausalLM, capped)
    assert logit_rule(model).softcap == 7.0


def test_ids_that_are_never_predicted_are_found():
    def masked(self, input_ids=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs)[0])
        logits[:, :, [3, 5]] = torch.finfo(logits.dtype).min
        return CausalLMOutputWithPast(logits=logits[..., :90])

    model = DECODERS["cohere2"]()
    model.__class__ = typed(Cohere2ForCausalLM, masked)
    offset = logit_rule(model).offset
    assert offset.nonzero()[:, 0].tolist() == [3, 5, *range(90, 96)]
    assert set(offset.tolist()) == {0.0, torch.tensor(BLOCKED).item()}
    ours = attach(model)(**text_batch())
    plain = model(text_batch()["input_ids"]).logits[:, [4, 8, 10]].log_softmax(-1)
    token = text_batch()["input_ids"][:, [5, 9, 11], None]
    kept = ~torch.isin(token, torch.tensor([3, 5, *range(90, 96)]))[..., 0]
    wanted = plain.gather(2, token.clamp(max=89))[..., 0]
    torch.testing.assert_close(ours.text_log_prob[kept], wanted[kept], rtol=1e-5, atol=1e-5)
    detach(model)


REFUSED = {
    "squared": lambda self, hidden: self.lm_head(hidden).square(),
    "with a bias by id": lambda self, hidden: self.lm_head(hidden) + torch.arange(96),
    "of a norm": lambda self, hidden: self.lm_head(self.model.norm(hidden)),
    "of two heads": lambda self, hidden: self.lm_head(hidden) + self.lm_head(hidden),
    "of no head": lambda self, hidden: hidden,
    "an error": lambda self, hidden: hidden.nothing,
}


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_cannot_be_repeated_are_refused(name):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        return CausalLMOutputWithPast(logits=REFUSED[name](self, hidden))

    model = DECODERS["cohere2"]()
    model.__class__ = typed(Cohere2ForCausalLM, forward)
    with pytest.raises(ValueError, match=r"`model`: expected (logits|a forward|a head)"):
        attach(model)


def test_a_scale_on_a_head_with_a_bias_is_refused():
    biased = DECODERS["cohere2"]()
    biased.lm_head.bias = nn.Parameter(torch.zeros(96))
    with pytest.raises(ValueError, match="a head without bias where logits are scaled"):
        logit_rule(biased)


def test_nothing_is_left_on_the_model():
    model = DECODERS["granite"]()
    before = set(vars(model)), set(vars(model.model))
    logit_rule(model)
    assert (set(vars(model)), set(vars(model.model))) == before
    assert isinstance(model.model, nn.Module)
    model.train()
    logit_rule(model)
    assert model.training
