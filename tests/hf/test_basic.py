"""BASIC against stored hidden states and eager attention in fp64, and what its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from groundkern.hf import Basic, Klal, attach, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.model.visual_terms import _weighted_kl
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.conftest import MODELS
from tests.hf.rows import plain_inputs
from tests.hf.samples import SAMPLES, make_batch

OPTIONS = {
    "qwen": Basic(direction=0.7, logits=0.5),
    "llava": Basic(depth=2, patches="uniform", logits=0.5, head="output", detach_head=False),
}


def basic_only(batch: dict) -> dict:
    return {name: x for name, x in batch.items() if name != "gk_text_position"}


def written_out(model, batch: dict, how: Basic) -> dict[str, torch.Tensor]:
    """(B1) to (B3), patch by patch."""
    output = model(**plain_inputs(batch), output_hidden_states=True, output_attentions=True)
    depth = how.depth or 1  # of three layers
    squares = [(n + 1) ** 2 for n in range(depth)]
    table = model.get_input_embeddings().weight
    table = model.lm_head.weight if how.head == "output" else table
    table = table.detach() if how.detach_head else table
    direction, logits, images = 0.0, 0.0, 0
    for b, image in enumerate(batch["gk_image"]):
        texts = ((image < 0) & batch["attention_mask"][b].bool()).nonzero()[:, 0].tolist()
        images += len({int(x) for x in image if x >= 0})
        for i in (image >= 0).nonzero()[:, 0].tolist():
            states = [output.hidden_states[n + 1][b, i].detach() for n in range(depth)]
            t = sum(s * x for s, x in zip(squares, states, strict=True)) / sum(squares)
            v = output.hidden_states[0][b, i]
            a = torch.stack([output.attentions[n][b, :, texts, i] for n in range(depth)])
            a = a.mean().detach() if how.patches == "attention" else 1 / (image == image[i]).sum()
            direction = direction + a * (v / v.norm() - t / t.norm()).square().sum()
            p, q = (table.detach() @ t).log_softmax(0), (table @ v).log_softmax(0)
            logits = logits + a * (p.exp() * (p - q)).sum()
    return {"basic_direction": direction / images, "basic_logits": logits / images}


def test_loss_and_gradients_are_those_written_out(model, family, samples):
    how, batch = OPTIONS[family], make_batch(model, samples)
    batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    attach(model.double(), basic=how).train()
    ours = model(**basic_only(batch))
    found = gradients(model, ours.loss)
    oracle = MODELS[family](attention="eager").double().train()
    wanted = written_out(oracle, batch, how)
    for name, part in wanted.items():
        torch.testing.assert_close(ours.parts[name], part.detach(), rtol=1e-6, atol=0)
    loss = how.direction * wanted["basic_direction"] + how.logits * wanted["basic_logits"]
    naive = gradients(oracle, loss)
    taught = {k for k, g in naive.items() if g.any()}
    assert any("visual" in k or "vision" in k for k in taught)
    assert ("lm_head.weight" in taught) == (how.head == "output")
    assert not any("language_model.layers" in k for k in taught)  # the teacher is a constant
    assert not any(g.any() for k, g in found.items() if k not in taught)
    assert_same_gradients(
        {k: found[k] for k in taught}, {k: naive[k] for k in taught}, share=2e-5
    )  # eager softmax is fp32


def test_two_patches_and_three_words_by_hand():
    """E = log 2 ((1, 0), (0, 1), (0, 0)), so that every weight of a softmax is a power of 2.

    v = (1, 0), t = (1, 1): q = (2, 1, 1) / 4, p = (2, 2, 1) / 5, and
    KL = .4 log .8 + .4 log 1.6 + .2 log .8; v = (0, 2), t = (0, 1): q = (1, 4, 1) / 6,
    p = (1, 2, 1) / 4, and KL = .25 log 1.5 + .5 log .75 + .25 log 1.5. They count for .5 and .1.
    """
    table = nn.Embedding.from_pretrained(
        math.log(2) * torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    )
    student = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])
    weight, counted = torch.tensor([[0.5, 0.1, 9.0]]), torch.tensor([[True, True, False]])
    total = _weighted_kl(table, student, teacher, weight, counted, "auto", True)
    first = 0.6 * math.log(0.8) + 0.4 * math.log(1.6)
    second = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    torch.testing.assert_close(total, torch.tensor(0.5 * first + 0.1 * second))
    total.backward()
    # d KL / d v = E^T (q - p): of the first .5 log 2 (.5 - .4, .25 - .4)
    wanted = 0.5 * math.log(2) * torch.tensor([0.1, -0.15])
    torch.testing.assert_close(student.grad[0, 0], wanted)
    assert not student.grad[0, 2].any()


def test_a_batch_without_images_has_no_loss_and_a_gradient(qwen):
    attach(qwen, basic=Basic()).train()
    output = qwen(**basic_only(make_batch(qwen, SAMPLES["qwen"][2:3])))
    assert float(output.parts["basic_direction"]) == float(output.parts["basic_logits"]) == 0.0
    found = gradients(qwen, output.loss)
    assert not any(g.any() for g in found.values())


def test_divided_by_the_images_of_the_step_and_reentrant_too(qwen):
    """4 = 2 + 2 checkpointed, either way: what is learned from is outside of all layers."""
    attach(qwen, basic=Basic(logits=1.0)).train()
    samples = SAMPLES["qwen"]
    batch = make_batch(qwen, samples)
    assert row_counts(batch)[COUNTS.index("image")] == 4
    whole = qwen(**batch)
    wanted = gradients(qwen, whole.loss)
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    for start in (0, 2):
        micro = make_batch(qwen, samples[start : start + 2], side="left")
        qwen(**micro, gk_totals=row_counts(batch)).loss.backward()
    found = {k: p.grad.clone() for k, p in qwen.named_parameters() if p.grad is not None}
    qwen.zero_grad(set_to_none=True)
    assert_same_gradients(found, wanted, share=1e-5)


def test_text_rows_are_made_in_blocks(qwen, monkeypatch):
    batch = basic_only(make_batch(qwen, SAMPLES["qwen"]))
    attach(qwen, basic=Basic()).train()
    parts = qwen(**batch).parts
    monkeypatch.setattr("groundkern.hf.model.patch_weight.BLOCK_ELEMENTS", 100)
    again = qwen(**batch).parts
    torch.testing.assert_close(again, parts)


def test_evaluation_and_frozen_parts(qwen):
    """A frozen tower and projector leave nothing to learn but the text's own embeddings, which no
    visual token has."""
    attach(qwen, basic=Basic(), klal=Klal()).eval()
    qwen.model.visual.requires_grad_(False)
    batch = make_batch(qwen, SAMPLES["qwen"])
    with torch.no_grad():
        parts = qwen(**batch).parts
    assert float(parts["basic_direction"]) > 0
    assert "map_kl" in parts
    loss = qwen.train()(**batch, gk_part="basic_direction").loss
    assert float(loss.detach()) == pytest.approx(float(parts["basic_direction"]))
    assert not any(g.any() for g in gradients(qwen, loss).values())


def test_refusals(qwen):
    with pytest.raises(ValueError, match=r"`basic\.depth`: expected a number in \[1, 3\)"):
        attach(qwen, basic=Basic(depth=3))
    qwen.lm_head = nn.Sequential(qwen.lm_head)
    with pytest.raises(ValueError, match=r"`basic\.head`: expected a plain Linear"):
        attach(qwen, basic=Basic(head="output"))
