"""Grounding through PEFT: adapters in the decoder, on the head, and heads saved whole."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from groundkern.hf import attach, detach
from tests.hf.closeness import assert_same_gradients, assert_same_losses, gradients
from tests.hf.conftest import MODELS
from tests.hf.naive import naive_forward
from tests.hf.samples import make_batch

DECODER = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CONFIGS = {
    "decoder": LoraConfig(r=3, lora_alpha=6, target_modules=DECODER),
    "decoder and head": LoraConfig(r=3, lora_alpha=6, target_modules=rf"{DECODER}|.*lm_head"),
    "head saved whole": LoraConfig(
        r=3, lora_alpha=6, target_modules=DECODER, modules_to_save=["lm_head"]
    ),
}


def with_adapter(model, config):
    """A PEFT model whose adapters are the same every time and do something: B is not zero."""
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_the_naive_forward(family, samples, terms, config):
    model = with_adapter(MODELS[family](), CONFIGS[config])
    batch = make_batch(model, samples)
    naive = naive_forward(model, batch, **terms)
    wanted = gradients(model, naive.loss)
    assert all("lora" in name or "modules_to_save" in name for name in wanted)
    ours = attach(model, **terms)(**batch)
    assert_same_losses(ours, naive)
    assert_same_gradients(gradients(model, ours.loss), wanted, share=1e-4)
    detach(model)


def test_attach_before_and_after_peft_are_the_same(family, samples, terms):
    losses = []
    for before in (True, False):
        model = MODELS[family]()
        model = attach(model, **terms) if before else model
        model = with_adapter(model, CONFIGS["decoder"])
        model = model if before else attach(model, **terms)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        loss = model(**make_batch(model, samples)).loss
        losses.append((loss.detach(), gradients(model, loss)))
        detach(model)
    assert torch.equal(losses[0][0], losses[1][0])
    assert_same_gradients(losses[0][1], losses[1][1], share=1e-6)


def test_contributions_see_the_adapters(family, samples, terms):
    """With LoRA on o_proj and the head they equal those of the merged model."""
    model = with_adapter(MODELS[family](), CONFIGS["decoder and head"])
    batch = make_batch(model, samples)
    with torch.no_grad():
        adapted = attach(model)(**batch, gk_record="contributions").contributions
        detach(model)
        merged = attach(model.merge_and_unload())
        expected = merged(**batch, gk_record="contributions").contributions
    largest = float(expected.abs().max())
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4 * largest)
    bare = attach(MODELS[family]())(**batch, gk_record="contributions").contributions
    assert float((bare - expected).abs().max()) > 0.01 * largest
