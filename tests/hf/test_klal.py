"""Attention-map losses: every option written out, and which weights their gradient reaches."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import Klal, Margins, attach, detach
from groundkern.losses import margins
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch
from tests.hf.training import make_trainer


def map_gradients(model, batch: dict, **options) -> dict:
    """Gradients of the map term alone."""
    attach(model, klal=Klal(**options)).train()
    text_only = {k: v for k, v in batch.items() if k != "gk_text_position"}
    return gradients(model, model(**text_only).loss)


def test_gradient_reaches_queries_and_keys_only_in_the_last_layer(model, samples):
    found = map_gradients(model, make_batch(model, samples), layers=(2,))
    last = {k.split("layers.2.")[1]: g for k, g in found.items() if "language_model.layers.2." in k}
    for name, gradient in last.items():
        reached = name.startswith(("self_attn.q_proj", "self_attn.k_proj", "input_layernorm"))
        assert bool(gradient.any()) == reached, name
    below = [g for k, g in found.items() if "language_model.layers.1." in k and "weight" in k]
    assert below
    assert all(g.any() for g in below)
    assert not found["lm_head.weight"].any()


def test_layers_below_the_selected_ones_learn_and_those_above_do_not(model, samples):
    found = map_gradients(model, make_batch(model, samples), layers=(1,))
    assert not any(g.any() for k, g in found.items() if "language_model.layers.2." in k)
    assert next(g for k, g in found.items() if "layers.0.self_attn.q_proj.weight" in k).any()


def test_the_other_image_is_ignored_over_columns(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"][1:2])
    batch["gk_map_target"] = batch["gk_map_target"].clone()
    both = map_gradients(qwen, batch)
    own = batch["gk_image"].gather(1, batch["gk_map_columns"].long())  # [1, C]
    other = own[:, None] != batch["gk_map_image"][..., None]
    batch["gk_map_target"][other] = 2**20  # mass that is not the row's own is dropped
    again = map_gradients(qwen, batch)
    assert all(torch.equal(both[k], again[k]) for k in both)


def naive_klal(model, batch: dict, klal: Klal, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Every option written out on stored attention."""
    losses = []
    layers = klal.layers or (0, 1, 2)
    for b, sample in enumerate(run_samples(model, batch)):
        for r, t in enumerate(sample.positions("map")):
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            p = batch["gk_map_target"][b, r, : len(at)][at].float()
            p = p / p.sum()
            maps = []
            for n in layers:
                heads = sample.layers[n][0][:, t, own]
                if klal.over == "columns":
                    heads = heads / heads.sum(-1, keepdim=True)
                share = heads.new_full((len(heads), 1), 1 / len(heads))
                if weight is not None:
                    share = weight[n, :, None]
                maps.append((share * heads).sum(0))
            if klal.average_layers:
                total = torch.stack(maps).sum(0)
                maps = [total if weight is not None else total / len(maps)]
            losses.append(torch.stack([divergence(p, q, klal) for q in maps]).mean())
    return torch.stack(losses).mean()


def divergence(p: torch.Tensor, q: torch.Tensor, klal: Klal) -> torch.Tensor:
    if klal.over == "renormalised":
        q = q / q.sum()
    if klal.divergence == "kl":
        return (torch.xlogy(p, p) - p * q.log()).sum()
    if klal.divergence == "reverse_kl":
        p = p.clamp_min(1e-6)
        return (q * (q / (p / p.sum())).log()).sum()
    m = (p + q) / 2
    off = (1 - q.sum()) * torch.tensor(2.0).log()
    return 0.5 * ((torch.xlogy(p, p) - p * m.log()).sum() + (q * (q / m).log()).sum() + off)


OPTIONS = (
    {"over": "renormalised"},
    {"divergence": "reverse_kl"},
    {"divergence": "js", "over": "visible", "layers": (0, 2)},
    {"average_layers": True, "over": "visible"},
    {"average_layers": True, "divergence": "js"},
    {"head_weight": "learned"},
    {"head_weight": "learned", "average_layers": True, "layers": (1, 2)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_those_written_out(qwen, options):
    batch = make_batch(qwen, SAMPLES["qwen"], side="left")
    klal, weight = Klal(**options), None
    attach(qwen, klal=klal).train()
    if klal.head_weight == "learned":
        with torch.no_grad():
            qwen.groundkern_head_weight.copy_(torch.arange(12.0).view(3, 4).sin())
    text_only = {k: v for k, v in batch.items() if k != "gk_text_position"}
    ours = qwen(**text_only)
    found = gradients(qwen, ours.loss)
    if klal.head_weight == "learned":
        logits = qwen.groundkern_head_weight
        counted = list(klal.layers or (0, 1, 2))
        weight = logits.softmax(-1)
        if klal.average_layers:
            chosen = logits[counted].flatten().softmax(0).view(len(counted), 4)
            weight = torch.zeros(3, 4).index_copy(0, torch.tensor(counted), chosen)
    wanted = naive_klal(qwen, batch, klal, weight)
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-4, atol=0)
    expected = gradients(qwen, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=5e-4)


def test_learned_head_weights_come_and_go(qwen):
    names = dict(qwen.named_parameters()).keys()
    attach(qwen, klal=Klal(head_weight="learned"))
    assert dict(qwen.named_parameters()).keys() - names == {"groundkern_head_weight"}
    uniform = attach(qwen, klal=Klal(head_weight="learned"))(**make_batch(qwen, SAMPLES["qwen"]))
    plain = attach(qwen, klal=Klal())(**make_batch(qwen, SAMPLES["qwen"]))
    torch.testing.assert_close(uniform.parts["map_kl"], plain.parts["map_kl"])
    assert dict(qwen.named_parameters()).keys() == names
    attach(qwen, klal=Klal(head_weight="learned")).train()
    no_maps = qwen(**make_batch(qwen, SAMPLES["qwen"][2:3]))
    assert "groundkern_head_weight" in gradients(qwen, no_maps.loss)  # DDP waits for it
    assert dict(detach(qwen).named_parameters()).keys() == names


def test_learned_head_weights_are_in_a_checkpoint(qwen, tmp_path):
    attach(qwen, klal=Klal(head_weight="learned"))
    wanted = torch.arange(12.0).view(3, 4)
    with torch.no_grad():
        qwen.groundkern_head_weight.copy_(wanted)
    qwen.save_pretrained(tmp_path)
    with torch.no_grad():
        qwen.groundkern_head_weight.zero_()
    make_trainer(qwen, tmp_path)._load_from_checkpoint(str(tmp_path))
    assert torch.equal(qwen.groundkern_head_weight, wanted)


def test_margins_are_those_written_out(model, samples):
    batch = make_batch(model, samples[:2])
    text_only = {k: v for k, v in batch.items() if k != "gk_text_position"}
    how = Margins(weight=0.5, layers=(0, 2), mean_margin=0.3)
    ours = attach(model, margins=how).train()(**text_only)
    found = gradients(model, ours.loss)
    mean, most = [], []
    for b, sample in enumerate(run_samples(model, batch)):
        for r, t in enumerate(sample.positions("map")):
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            heads = torch.stack([sample.layers[n][0][:, t, own] for n in (0, 2)])
            q = (heads / heads.sum(-1, keepdim=True)).mean((0, 1))
            target = batch["gk_map_target"][b, r, : len(at)][at]
            inside = target >= 0.75 * target.max()
            rows = margins(q / q.max(), inside, mean_margin=0.3)
            mean.append(rows.mean)
            most.append(rows.max)
    wanted = 0.5 * (torch.stack(mean).mean() + torch.stack(most).mean())
    assert float(wanted.detach()) > 0.1
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-5, atol=0)
    expected = gradients(model, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=2e-4)
