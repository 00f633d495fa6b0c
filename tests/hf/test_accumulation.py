"""Batch of 4 = 2 x 2 accumulated = checkpointed, losses and gradients."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import Klal, Smam, attach, row_counts
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.conftest import MODELS
from tests.hf.methods import METHODS
from tests.hf.samples import SAMPLES, make_batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_equals_the_whole_batch(model, samples, terms, checkpointing):
    attach(model, **terms).train()
    whole = model(**make_batch(model, samples))
    wanted = gradients(model, whole.loss)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    count = row_counts(make_batch(model, samples))
    loss, parts = 0.0, {}
    for micro in (samples[:2], samples[2:]):
        output = model(**make_batch(model, micro), gk_totals=count)
        output.loss.backward()
        loss += output.loss.detach()
        parts = {k: parts.get(k, 0.0) + v for k, v in output.parts.items()}
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-5, atol=0)
    for name, part in whole.parts.items():
        torch.testing.assert_close(parts[name], part, rtol=1e-5, atol=0)
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, wanted, share=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_at_once_is_counted_over_the_accumulated_batch(kind):
    """4 = 2 + 2 checkpointed (and = 1 + 1 + 1 + 1), left padded: every part and gradient."""
    model = attach(MODELS["qwen"](attention="eager"), **METHODS[kind]).train()
    samples = SAMPLES["qwen"]
    whole = model(**make_batch(model, samples))
    assert {"composition", "margin_max", "lens_suppress", "word", "map_kl"} <= whole.parts.keys()
    assert all(float(part) > 1e-5 for part in whole.parts.values())
    wanted = gradients(model, whole.loss)
    count = row_counts(make_batch(model, samples))
    for size, checkpointing in ((2, True), (1, False))[: 1 if kind == "gradcam" else 2]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        parts = dict.fromkeys(whole.parts, 0.0)
        for start in range(0, 4, size):
            batch = make_batch(model, samples[start : start + size], side="left")
            output = model(**batch, gk_totals=count)
            output.loss.backward()
            parts |= {k: parts[k] + v for k, v in output.parts.items()}
        for name, part in whole.parts.items():
            torch.testing.assert_close(parts[name], part, rtol=1e-5, atol=0)
        found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        assert_same_gradients(found, wanted, share=1e-5)


def test_checkpointed_equals_plain(model, samples, terms):
    """A recomputed layer does the same mathematics and adds nothing to the sums."""
    attach(model, **terms).train()
    batch = make_batch(model, samples)
    plain = model(**batch)
    wanted = gradients(model, plain.loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = model(**batch)
    assert torch.equal(again.loss, plain.loss)
    assert_same_gradients(gradients(model, again.loss), wanted, share=1e-6)


def test_reentrant_checkpointing_carries_side_tokens_and_refuses_maps(model, samples):
    batch = make_batch(model, samples)
    attach(model, smam=Smam()).train()
    plain = model(**batch)
    wanted = gradients(model, plain.loss)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = model(**batch)
    torch.testing.assert_close(again.loss, plain.loss, rtol=1e-6, atol=0)
    found = gradients(model, again.loss)
    decoder = [k for k in wanted if "language_model" in k or "lm_head" in k]
    assert_same_gradients({k: found[k] for k in decoder}, {k: wanted[k] for k in decoder})
    attach(model, smam=Smam(), klal=Klal())
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**batch)
