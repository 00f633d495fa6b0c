"""What a model's own forward adds to its text loss beside its routers' is refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Gemma2ForCausalLM

from benchmarks.families.zoo import families
from groundkern.hf import Hist, Klal, Margins, attach, detach
from groundkern.hf.model import attach as attaching
from groundkern.hf.model.attention import LAYER
from tests.hf.conftest import MODELS
from tests.hf.logit_decoders import DECODERS, build_moe, text_batch
from tests.hf.samples import SAMPLES, make_batch


def test_a_loss_of_logits_is_refused(monkeypatch):
    """Bamba adds the square of the log-sum-exp, with a coefficient of its config."""
    own = Gemma2ForCausalLM.forward

    def forward(self, input_ids=None, labels=None, **kwargs):
        output = own(self, input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + self.weight * output.logits.logsumexp(-1).square().mean()
        return output

    monkeypatch.setattr(Gemma2ForCausalLM, "forward", forward)
    model = DECODERS["gemma2"]()
    model.weight = 0.0
    detach(attach(model))
    model.weight = 1e-4
    with pytest.raises(ValueError, match=r"a loss of next tokens.*Gemma2ForCausalLM, which adds"):
        attach(model)


def test_labels_of_other_losses_are_refused():
    model = MODELS["qwen"]()
    batch = make_batch(attach(model), SAMPLES["qwen"])
    with pytest.raises(ValueError, match=r"`router_labels`: expected nothing beside gk_ inputs"):
        model(**batch, router_labels=torch.zeros(4))
    detach(model)


def test_router_logits_of_images_are_no_experts():
    """Granite-Docling's body returns one for each image, as a tensor."""
    model, batch = attach(build_moe("MixtralForCausalLM", output_router_logits=False)), text_batch()

    def with_logits(_, __, output):
        output["router_logits"] = torch.zeros(1)

    model.model.register_forward_hook(with_logits)
    assert "router_aux" not in model(**batch).parts
    detach(model)


def test_maps_of_windowed_layers_alone_are_warned_of():
    model = families()["dots3_note"].model()
    with pytest.warns(UserWarning, match="adds nothing to the loss") as caught:
        detach(attach(model, klal=Klal(), hist=Hist(), margins=Margins()))
    messages = [str(warning.message).partition(" of ")[0] for warning in caught]
    assert messages == [f"`{n}` reads sliding_attention alone" for n in ("klal", "hist", "margins")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detach(attach(DECODERS["gemma2"](), klal=Klal()))  # every second layer has no window
    with pytest.warns(UserWarning, match="`klal` reads sliding_attention alone"):
        detach(attach(DECODERS["gemma2"](), klal=Klal(layers=(0,))))


def test_an_attach_that_fails_leaves_nothing(monkeypatch):
    model = MODELS["qwen"]()
    before = dict(attaching._wrapped)

    def fails(model):
        raise RuntimeError("no mixers")

    with monkeypatch.context() as patch:
        patch.setattr(attaching, "wrap_mixers", fails)
        with pytest.raises(RuntimeError, match="no mixers"):
            attach(model)
    assert attaching._wrapped == before
    assert not any(LAYER in module.__dict__ for module in model.modules())
