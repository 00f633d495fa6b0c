"""HIST in a decoder: phrase and subject losses, composition on attention maps."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import Hist, Margins, attach
from groundkern.losses import composition
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch


def naive_hist(model, batch: dict, *, over: str, layers: tuple, distance: str) -> dict:
    """(H1)-(H3) from stored attention, sample by sample and phrase by phrase."""
    phrase, subject, composed = [], [], []
    for b, sample in enumerate(run_samples(model, batch)):
        log_probs = sample.log_probs(sample.main)
        maps: dict[int, list] = {}
        visual = sample.image >= 0
        rows = zip(
            sample.positions("phrase"),
            batch["gk_phrase_number"][b].tolist(),
            batch["gk_phrase_subject"][b].tolist(),
            strict=False,
        )
        for t, number, own in rows:
            loss = -log_probs[t, sample.ids[t + 1]]
            phrase.append(loss)
            subject += [loss] if own else []
            heads = torch.stack([sample.layers[n][0][:, t + 1][:, visual] for n in layers])
            if over == "columns":
                heads = heads / heads.sum(-1, keepdim=True)
            maps.setdefault(number, []).append(heads.mean((0, 1)))
        mean = {number: torch.stack(found).mean(0) for number, found in maps.items()}
        for three in batch["gk_phrase_composite"][b].tolist():
            if min(three) >= 0:
                composed.append(composition(*(mean[n] for n in three), distance=distance))
    parts = {"phrase": phrase, "subject": subject, "composition": composed}
    return {name: torch.stack(rows).mean() for name, rows in parts.items()}


@pytest.mark.parametrize(
    ("over", "layers", "distance", "side"),
    [("columns", (0, 1, 2), "l2", "right"), ("visible", (1,), "kl", "left")],
)
def test_losses_and_gradients_are_those_written_out(model, samples, over, layers, distance, side):
    batch = make_batch(model, samples, side=side)
    how = Hist(
        phrase=0.7, subject=1.3, composition=2.0, over=over, layers=layers, distance=distance
    )
    ours = attach(model, hist=how).train()(**batch)
    found = gradients(model, ours.loss - ours.parts["text"].detach())
    parts = naive_hist(model, batch, over=over, layers=layers, distance=distance)
    for name, part in parts.items():
        torch.testing.assert_close(ours.parts[name], part.detach(), rtol=2e-5, atol=1e-6)
    text = {k: v for k, v in batch.items() if not k.startswith("gk_phrase_")}
    text_loss = model(**text).loss
    total = text_loss + 0.7 * parts["phrase"] + 1.3 * parts["subject"] + 2 * parts["composition"]
    assert_same_gradients(found, gradients(model, total), share=2e-4)


def test_detached_parts_leave_only_the_composite(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"][:1])
    batch = {k: v for k, v in batch.items() if k != "gk_text_position"}
    losses = {"phrase": 0.0, "subject": 0.0}
    found = []
    for detach_parts in (False, True):
        attach(qwen, hist=Hist(**losses, detach_parts=detach_parts)).train()
        found.append(gradients(qwen, qwen(**batch).loss))
    name = next(k for k in found[0] if "layers.1.self_attn.q_proj.weight" in k)
    assert found[0][name].any()
    assert found[1][name].any()
    assert not torch.allclose(found[0][name], found[1][name])


def test_phrases_without_an_image_train_their_words_only(qwen):
    attach(qwen, hist=Hist()).train()
    parts = qwen(**make_batch(qwen, SAMPLES["qwen"][2:3])).parts
    assert float(parts["phrase"]) > 0
    assert float(parts["composition"]) == 0.0  # there all the same: ranks log the same names
    attach(qwen, margins=Margins())
    parts = qwen(**make_batch(qwen, SAMPLES["qwen"][2:3])).parts
    assert float(parts["margin_mean"]) == float(parts["margin_max"]) == 0.0
