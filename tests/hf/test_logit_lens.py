"""Logit-lens loss: a concept's token raised on its object's visual tokens, suppressed off it."""

from __future__ import annotations

import torch

from groundkern.hf import LogitLens, attach
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch


def test_loss_and_gradients_are_those_written_out(model, samples):
    batch = make_batch(model, samples, side="left")
    del batch["gk_text_position"]
    attach(model, logit_lens=LogitLens(raise_weight=0.5, suppress_weight=3.0)).train()
    ours = model(**batch)
    found = gradients(model, ours.loss)
    inside, outside = [], []
    for b, sample in enumerate(run_samples(model, batch)):
        p = sample.log_probs(sample.main).exp()
        labels, on = batch["gk_lens_label"][b].tolist(), batch["gk_lens_inside"][b].tolist()
        for n, i in enumerate(sample.positions("lens")):
            value = p[i, labels[n]]
            inside += [-value.log()] if on[n] else []
            outside += [] if on[n] else [-(1 - value).log()]
    assert len(inside) == 3
    raised, suppressed = torch.stack(inside).mean(), torch.stack(outside).mean()
    torch.testing.assert_close(ours.parts["lens_raise"], raised.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours.parts["lens_suppress"], suppressed.detach(), rtol=1e-4, atol=1e-6
    )
    wanted = gradients(model, 0.5 * raised + 3.0 * suppressed)
    assert_same_gradients({k: found[k] for k in wanted}, wanted, share=2e-4)


def test_a_batch_without_concepts_has_no_loss(qwen):
    attach(qwen, logit_lens=LogitLens()).train()
    parts = qwen(**make_batch(qwen, SAMPLES["qwen"][2:3])).parts
    assert float(parts["lens_raise"]) == float(parts["lens_suppress"]) == 0.0
