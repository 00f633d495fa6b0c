"""GradCAM losses against double autograd through stored attention, in fp64, and their refusals."""

from __future__ import annotations

import pytest
import torch

from groundkern import QueryRows, attention_contribution
from groundkern.hf import Hist, Klal, Margins, Smam, attach, detach
from groundkern.losses import composition, margins
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.conftest import MODELS
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch

# The models' norms and rotary embeddings compute in fp32 whatever their dtype.
ROUNDING = 2e-6


@pytest.fixture(autouse=True)
def _softmax_in_its_own_dtype(monkeypatch):
    """transformers' eager attention asks for an fp32 softmax, which fp64 comparisons cannot use."""
    softmax = torch.nn.functional.softmax

    def exact(x, dim=None, dtype=None, **options):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact)


@pytest.fixture
def eager(family):
    model = MODELS[family](attention="eager").double()
    yield model
    detach(model)


def double(batch: dict) -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def naive_maps(sample, log_probs, rows: list[int], layers: tuple) -> torch.Tensor:
    """[rows, visual]: A * relu(dy/dA), y the log probability of all the rows' tokens."""
    y = sum(log_probs[t, sample.ids[t + 1]] for t in rows)
    stored = [sample.layers[n][0] for n in layers]  # [H, S, S]
    slopes = torch.autograd.grad(y, stored, create_graph=True)
    products = [a * da.relu() for a, da in zip(stored, slopes, strict=True)]
    visual = sample.image >= 0
    return torch.stack([p[:, rows][..., visual].mean(0) for p in products]).mean(0)


def naive_composition(model, batch: dict, layers: tuple) -> torch.Tensor:
    losses = []
    for b, sample in enumerate(run_samples(model, batch)):
        log_probs = sample.log_probs(sample.main)
        positions, numbers = sample.positions("phrase"), batch["gk_phrase_number"][b].tolist()
        for three in batch["gk_phrase_composite"][b].tolist():
            if min(three) < 0:
                continue
            rows = [[t for t, n in zip(positions, numbers) if n == number] for number in three]
            losses.append(
                composition(*(naive_maps(sample, log_probs, r, layers).mean(0) for r in rows))
            )
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("layers", "side"), [(None, "left"), ((0, 2), "right")])
def test_composition_equals_double_autograd(eager, samples, layers, side):
    batch = double(make_batch(eager, samples, side=side))
    del batch["gk_text_position"]
    how = Hist(phrase=0.0, subject=0.0, maps="gradcam", layers=layers)
    ours = attach(eager, hist=how).train()(**batch)
    found = gradients(eager, ours.loss)
    wanted = naive_composition(eager, batch, layers or (0, 1, 2))
    torch.testing.assert_close(ours.parts["composition"], wanted.detach(), rtol=1e-9, atol=0)
    assert float(wanted.detach()) > 1e-3
    expected = gradients(eager, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=ROUNDING)


def test_margins_equal_double_autograd(eager, samples):
    """Each map row explains the token of its target, at the row before that."""
    batch = double(make_batch(eager, samples[:2]))
    assert (batch["gk_map_token_position"] != batch["gk_map_position"]).any()
    del batch["gk_text_position"]
    ours = attach(eager, margins=Margins(maps="gradcam", scale="sum")).train()(**batch)
    found = gradients(eager, ours.loss)
    mean, most = [], []
    for b, sample in enumerate(run_samples(eager, batch)):
        log_probs = sample.log_probs(sample.main)
        for r, t in enumerate(sample.positions("map_token")):
            own = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            attention = naive_maps(sample, log_probs, [t - 1], (0, 1, 2))[0][own]
            target = batch["gk_map_target"][b, r, : len(own)][own]
            rows = margins(attention / attention.sum(), target >= 0.75 * target.max())
            mean.append(rows.mean)
            most.append(rows.max)
    wanted = torch.stack(mean).mean() + torch.stack(most).mean()
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-9, atol=0)
    expected = gradients(eager, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=ROUNDING)


def test_side_tokens_and_maps_of_other_terms_change_nothing():
    """SMAM's ops differentiate once: GradCAM then runs the body again, to the same map."""
    model = MODELS["qwen"](attention="eager").double()
    batch = double(make_batch(model, SAMPLES["qwen"]))
    how = Hist(maps="gradcam")
    alone = attach(model, hist=how).train()(**batch).parts["composition"]
    output = attach(model, hist=how, smam=Smam(), klal=Klal())(**batch)
    torch.testing.assert_close(output.parts["composition"], alone, rtol=1e-9, atol=0)
    assert gradients(model, output.loss)


def test_evaluation_without_gradients_leaves_the_term_out():
    model = attach(MODELS["qwen"](attention="eager"), hist=Hist(maps="gradcam"))
    batch = make_batch(model, SAMPLES["qwen"][:1])
    with torch.no_grad():
        parts = model(**batch).parts
    assert "composition" not in parts
    assert "phrase" in parts
    assert "composition" in model(**batch).parts


def test_attention_that_differentiates_once_is_refused(qwen):
    for term in ({"hist": Hist(maps="gradcam")}, {"margins": Margins(maps="gradcam")}):
        with pytest.raises(ValueError, match="flash and sdpa attention cannot"):
            attach(qwen, **term)


def test_sharded_weights_are_refused():
    model = attach(MODELS["qwen"](attention="eager"), margins=Margins(maps="gradcam")).train()
    model.lm_head.weight.ds_id = 0  # what ZeRO-3 leaves on its parameters
    with pytest.raises(ValueError, match="FSDP or ZeRO-3 shards"):
        model(**make_batch(model, SAMPLES["qwen"][:1]))


def test_reentrant_checkpointing_is_refused_and_non_reentrant_is_exact():
    model = MODELS["qwen"](attention="eager").double()
    batch = double(make_batch(model, SAMPLES["qwen"][:2]))
    attach(model, hist=Hist(maps="gradcam")).train()
    plain = model(**batch)
    wanted = gradients(model, plain.loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = model(**batch)
    torch.testing.assert_close(again.loss, plain.loss, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, again.loss), wanted, share=ROUNDING)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**batch)


def test_second_derivative_is_exact_in_fp64():
    """Two layers of causal attention in plain fp64: every gradient to 1e-12 of double autograd."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7, 8, generator=generator, dtype=torch.float64)
    shape = (2, 4, 8, 8)  # layers; q, k, v, o
    weights = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    rows = QueryRows.causal(torch.tensor([0, 0], dtype=torch.int32), torch.tensor([4, 6]).int())
    columns = torch.tensor([[0, 1, 3]], dtype=torch.int32)
    found = []
    for fused in (True, False):
        hidden, layers = x, []
        for layer in weights:
            q, k, v = ((hidden @ w).view(1, 7, 2, 4).transpose(1, 2) for w in layer[:3])
            scores = (q @ k.transpose(-1, -2) / 2).masked_fill(
                ~torch.ones(7, 7).tril().bool(), -1e9
            )
            a = scores.softmax(-1)
            out = (a @ v).transpose(1, 2)
            layers.append((q, k, v, a, out))
            hidden = hidden + out.flatten(2) @ layer[3]
        y = hidden[0, [4, 6]].tanh().sum()
        slope = torch.autograd.grad(y, [n[4] if fused else n[3] for n in layers], create_graph=True)
        maps = []
        for (q, k, v, a, _), d in zip(layers, slope, strict=True):
            if fused:
                g = rows.take(d.transpose(1, 2))
                maps.append(
                    attention_contribution(
                        rows.take(q), k, v, g, rows, columns, over="visible", rectify=True
                    )
                )
            else:
                maps.append((a * d.relu())[0, :, [4, 6]].sum(0)[:, [0, 1, 3]])
        loss = torch.stack(maps).square().sum()
        found.append((loss.detach(), torch.autograd.grad(loss, weights)[0]))
    (loss, ours), (wanted, truth) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    assert float((ours - truth).abs().max()) < 1e-12 * float(truth.abs().max())
