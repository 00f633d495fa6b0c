"""BASIC against stored hidden states and eager attention in fp64, and what its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.families.zoo.qwens import FAMILIES
from groundkern.hf import (
    Basic,
    GroundedExample,
    GroundingCollator,
    Klal,
    Objectives,
    attach,
    row_counts,
)
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.model.body import run_body
from groundkern.hf.model.request import Request
from groundkern.hf.model.visual_terms import _weighted_kl
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.collating import make_example
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


def test_text_rows_are_made_in_blocks(qwen, monkeypatch):
    batch = basic_only(make_batch(qwen, SAMPLES["qwen"]))
    assert row_counts(batch)[COUNTS.index("image")] == 4
    attach(qwen, basic=Basic()).train()
    parts = qwen(**batch).parts
    monkeypatch.setattr("groundkern.hf.model.patch_weight.BLOCK_ELEMENTS", 100)
    again = qwen(**batch).parts
    torch.testing.assert_close(again, parts)


def test_frozen_parts_are_refused_where_nothing_is_left_to_learn(qwen):
    attach(qwen, basic=Basic(), klal=Klal()).eval()
    qwen.model.visual.requires_grad_(False)
    batch = basic_only(make_batch(qwen, SAMPLES["qwen"]))
    with torch.no_grad():
        parts = qwen(**batch).parts
    assert float(parts["basic_direction"]) > 0
    assert "map_kl" in parts
    with pytest.raises(ValueError, match="`basic`: expected a projector or a vision tower that"):
        qwen.train()(**batch)
    qwen.model.visual.merger.requires_grad_(True)  # the projector alone
    found = gradients(qwen, qwen(**batch, gk_part="basic_direction").loss)
    learning = {name for name, g in found.items() if g.any()}
    assert learning
    assert all("merger" in name for name in learning)
    attach(qwen, basic=Basic(detach_head=False))
    qwen.model.visual.requires_grad_(False)
    found = gradients(qwen, qwen(**batch, gk_part="basic_logits").loss)
    assert {name for name, g in found.items() if g.any()} == {_table_name(qwen)}


def _table_name(model) -> str:
    table = model.get_input_embeddings().weight
    return next(name for name, p in model.named_parameters() if p is table)


def test_the_teacher_has_what_a_decoder_adds_between_its_layers():
    """Qwen3-VL's deepstack: features are added to visual tokens behind the first layers."""
    model = FAMILIES["qwen3_vl_moe"].model()
    image = Image.new("RGB", (64, 64), "white")
    example = GroundedExample((image,), make_example("A red patch.").messages)
    batch = GroundingCollator(FAMILIES["qwen3_vl_moe"].processor(), model.config)([example])
    attach(model, basic=Basic(depth=2))
    outputs, given = [], {}
    decoder = model.get_decoder()
    for layer in decoder.layers[:2]:
        layer.register_forward_hook(lambda _, args, out: outputs.append(out))
    decoder.register_forward_pre_hook(lambda _, args, kw: given.update(kw), with_kwargs=True)
    request = Request.of(model, Objectives(basic=Basic(depth=2)), dict(batch))
    states = run_body(request).visual
    rows = [x[0, request.batch.map_columns[0].long()] for x in outputs]
    deep = given["deepstack_visual_embeds"]
    wanted = ((rows[0] + deep[0]) + 4 * (rows[1] + deep[1])) / 5
    torch.testing.assert_close(states.teacher[0], wanted.detach(), rtol=1e-5, atol=1e-5)
    assert not states.teacher.requires_grad


def test_refusals(qwen):
    with pytest.raises(ValueError, match=r"`basic\.depth`: expected a number in \[1, 3\)"):
        attach(qwen, basic=Basic(depth=3))
    qwen.lm_head = nn.Sequential(qwen.lm_head)
    with pytest.raises(ValueError, match=r"`basic\.head`: expected a plain Linear"):
        attach(qwen, basic=Basic(head="output"))
