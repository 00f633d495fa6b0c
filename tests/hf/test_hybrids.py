"""Decoders whose layers are not all full attention: recurrences, convolutions, chunks, sinks,
shared keys, sparse attention. What is read and trained there, and what is refused.

Everything is compared with the model's own eager attention weights and its own logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundkern.hf import DvSft, Klal, LogitLens, Smam, attach, detach, doctor, supported_objectives
from groundkern.hf.model.attribution import final_norm, through_norm
from groundkern.hf.model.body import run_body
from groundkern.hf.model.head import unembedding
from groundkern.hf.model.layers import text_attention, text_decoder
from groundkern.hf.model.request import Request
from groundkern.hf.objectives import Objectives
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.decoders import tiny_decoder
from tests.hf.rows import assert_side_is_main, moved_logits, plain_inputs, rows_of
from tests.hf.samples import SAMPLES, token_batch

SIDES = ("right", "left")
# With SMAM: a gated delta net, a short convolution, chunks, sinks, shared keys of two head sizes,
# attention beside Mamba. The others repeat one of these kinds in another family.
SIDE_TOKENS = (
    "qwen3_5",
    "lfm2",
    "llama4",
    "gpt_oss",
    "gemma4",
    "falcon_h1",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("qwen3_5_moe", "nemotron_h", "granite", "gemma3n")
    ),
)
MAPS_ONLY = ("minimax_m3", "jamba")


def batches() -> dict[str, dict[str, Tensor]]:
    """Uneven samples, padded on either side."""
    return {side: token_batch(None, SAMPLES["qwen"], side=side) for side in SIDES}


@pytest.fixture(scope="module", params=(*SIDE_TOKENS, *MAPS_ONLY))
def readable(request) -> Iterator[nn.Module]:
    """A decoder with layers of softmax attention."""
    model = tiny_decoder(request.param)
    yield model
    detach(model)


@pytest.fixture(scope="module", params=SIDE_TOKENS)
def hybrid(request) -> Iterator[nn.Module]:
    """A decoder that side tokens can pass."""
    model = tiny_decoder(request.param)
    yield model
    detach(model)


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """[B, H, S, S] of each layer of softmax attention, by its number."""
    kept: dict[int, Tensor] = {}

    def keep(number: int):
        return lambda _, __, output: kept.__setitem__(number, output[1])

    modules = text_attention(model)
    hooks = [module.register_forward_hook(keep(n)) for n, module in modules.items()]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def map_rows(batch: dict) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """Sequence, row, position, own columns' places among the columns, and the columns."""
    for b, positions in enumerate(batch["gk_map_position"].tolist()):
        for r, t in enumerate(positions):
            columns = batch["gk_map_columns"][b].long()
            own = batch["gk_image"][b, columns.clamp(min=0)] == batch["gk_map_image"][b, r]
            own = (own & (columns >= 0) & (columns <= t)).nonzero()[:, 0]
            if t >= 0:
                yield b, r, t, own, columns[own]


@torch.no_grad()
def test_maps_are_the_models_own_attention(readable):
    attach(readable, klal=Klal())
    for batch in batches().values():
        ours = readable(**batch, gk_record=("maps", "layers")).maps
        with weights_kept(readable) as weights:
            readable(**plain_inputs(batch))
        assert ours.shape[2] == len(weights) > 0
        for b, r, t, own, columns in map_rows(batch):
            for layer, attention in zip(ours[b, r], weights.values(), strict=True):
                heads = attention[b, :, t, columns]
                heads = heads / heads.sum(-1, keepdim=True).clamp(min=1e-30)
                torch.testing.assert_close(layer[own], heads.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", ["columns", "visible"])
def test_klal_and_its_gradient_are_those_of_eager_attention(readable, over):
    """Rows of uneven targets; every parameter, sinks and mixers below the layers included."""
    batch = {k: v for k, v in batches()["left"].items() if k != "gk_text_position"}
    attach(readable, klal=Klal(over=over)).train()
    ours = readable(**batch)
    found = gradients(readable, ours.loss)
    with weights_kept(readable) as weights:
        readable(**plain_inputs(batch))
    losses = []
    for b, r, t, own, columns in map_rows(batch):
        p = batch["gk_map_target"][b, r, own].float()
        of_layers = []
        for attention in weights.values():
            heads = attention[b, :, t, columns]
            seen = heads.sum(0) > 0  # a window or chunk hides the others
            if not bool((p[seen] > 0).any()):
                continue
            target = p[seen] / p[seen].sum()
            total = heads[:, seen].sum(-1, keepdim=True) if over == "columns" else 1.0
            q = (heads[:, seen] / total).mean(0)
            of_layers.append((torch.xlogy(target, target) - target * q.log()).sum())
        losses.append(torch.stack(of_layers).mean() if of_layers else torch.zeros(()))
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(ours.loss, wanted, rtol=1e-4, atol=0)
    expected = gradients(readable, wanted)
    readable.eval()
    assert_same_gradients({k: found[k] for k in expected}, expected, share=1e-3)


def test_side_tokens_do_not_change_main_logits_and_see_their_keys(hybrid):
    attach(hybrid, smam=Smam())
    for batch in batches().values():
        moved = moved_logits(hybrid, batch)
        assert moved.main < 1e-6
        assert moved.side > 1e-3  # a region blocks keys that were used
        free = {**batch, "gk_side_set": torch.full_like(batch["gk_side_set"], -1)}
        with torch.no_grad():
            assert_side_is_main(hybrid(**free, gk_record="logits"), free)


def test_with_every_key_allowed_a_side_token_has_the_gradient_of_its_row(hybrid):
    """Each row with a weight of its own: side and main are one function of the parameters."""
    attach(hybrid, smam=Smam())
    batch = batches()["left"]
    batch = {**batch, "gk_side_set": torch.full_like(batch["gk_side_set"], -1)}
    position = batch["gk_side_position"]
    weight = torch.arange(1.0, position.numel() + 1).view(position.shape) * (position >= 0)
    direction = torch.randn(512, generator=torch.Generator().manual_seed(2))

    def of(hidden: Tensor) -> Tensor:
        return (hybrid.get_output_embeddings()(hidden).log_softmax(-1) @ direction * weight).sum()

    found = []
    for side in (True, False):
        body = run_body(Request.of(hybrid, Objectives(smam=Smam()), dict(batch)))
        hidden = body.side_hidden if side else rows_of(body.hidden, position)
        found.append(gradients(hybrid, of(hidden)))
    assert found[0].keys() == found[1].keys()
    assert_same_gradients(*found, share=1e-4)


def test_a_region_changes_the_gradients_of_every_layer(hybrid):
    attach(hybrid, smam=Smam(weight=10.0)).train()
    batch, found = batches()["right"], []
    for shift in (0, 1):
        inside = batch["gk_side_inside"].roll(shift, -1) & (batch["gk_image"] >= 0)[:, None]
        shown = {**batch, "gk_side_inside": inside}
        loss = hybrid(**shown, gk_part="smam_grounding").loss
        found.append(gradients(hybrid, loss))
    hybrid.eval()
    ours, others = found
    layers = {name.split("layers.")[1].split(".")[0] for name in ours if "layers." in name}
    for layer in layers:
        names = [name for name in ours if f"layers.{layer}." in name]
        apart = max(float((ours[n] - others[n]).abs().max()) for n in names)
        assert apart > 1e-3 * max(float(ours[n].abs().max()) for n in names), layer


def test_checkpointing_changes_nothing(hybrid):
    attach(hybrid, smam=Smam(), dv_sft=DvSft(weight=0.5), klal=Klal()).train()
    batch, found = batches()["left"], []
    for on in (False, True):
        if on:
            hybrid.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(hybrid, hybrid(**batch).loss))
    hybrid.gradient_checkpointing_disable()
    hybrid.eval()
    assert_same_gradients(*found, share=1e-5)


@torch.no_grad()
def test_contributions_add_up_to_what_attention_adds_to_the_logit():
    """Behind a gate too: every key's part along the logit is the whole of the layer's output."""
    model = attach(tiny_decoder("qwen3_5"), smam=Smam())
    batch = batches()["left"]
    every = torch.arange(batch["input_ids"].shape[1], dtype=torch.int32)
    every = every.expand(len(batch["input_ids"]), -1)
    target = torch.zeros(*batch["gk_map_position"].shape, every.shape[1], dtype=torch.int32)
    outputs, normed = [], []
    hooks = [
        module.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        for module in text_attention(model).values()
    ]
    norm = final_norm(model)
    hooks.append(norm.register_forward_pre_hook(lambda _, args: normed.append(args[0])))
    ours = model(
        **{**batch, "gk_map_columns": every, "gk_map_target": target},
        gk_record=("contributions", "layers"),
    ).contributions
    for hook in hooks:
        hook.remove()
    position = batch["gk_side_position"]
    aligned = position >= 0
    token = batch["input_ids"].gather(1, (position.clamp(min=0) + 1).long())[aligned]
    x = rows_of(normed[0], position)[aligned]
    u = unembedding(model.get_output_embeddings(), norm(x), token)
    direction = through_norm(norm, x, u)
    for number, output in enumerate(outputs):
        wanted = (rows_of(output, position)[aligned] * direction).sum(-1)
        found = ours[:, :, number].sum(-1)[aligned]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    detach(model)


SENTENCES = {
    ("qwen3_5", "klal"): (
        {"klal": Klal(layers=(1, 2))},
        r"klal\.layers.*softmax attention \(1, 3\), got 2, a layer of linear_attention",
    ),
    ("lfm2", "margins"): ({"klal": Klal(layers=(4,))}, r"klal\.layers.*layers in \[0, 4\)"),
    ("minimax_m3", "smam"): ({"smam": Smam()}, r"smam.*1 layers of minimax_m3_sparse"),
    ("minimax_m3", "klal"): ({"klal": Klal(layers=(0, 1))}, r"\(0, 2\), got 1, a layer of minimax"),
    ("jamba", "smam"): ({"smam": Smam()}, r"does not hand its keywords to `mamba`"),
}


@pytest.mark.parametrize("case", SENTENCES, ids=str)
def test_what_a_layer_cannot_do_is_refused_alone(case):
    model = tiny_decoder(case[0])
    asked, sentence = SENTENCES[case]
    with pytest.raises(ValueError, match=sentence):
        attach(model, **asked)
    assert not any("_groundkern_layer" in vars(module) for module in model.modules())
    attach(model, dv_sft=DvSft(), logit_lens=LogitLens(), klal=Klal())
    loss = model.train()(**batches()["right"]).loss
    assert torch.isfinite(loss)
    assert model.get_input_embeddings().weight.requires_grad
    assert all(bool(torch.isfinite(g).all()) for g in gradients(model, loss).values())
    detach(model)


def test_what_is_supported_is_said_by_objective():
    found = supported_objectives(tiny_decoder("minimax_m3"))
    assert [name for name, reason in found.items() if reason] == ["smam"]
    assert "MiniMaxM3VLForCausalLM with 1 layers of minimax_m3_sparse" in found["smam"]
    assert set(supported_objectives(tiny_decoder("qwen3_5")).values()) == {None}


def test_evaluation_leaves_out_what_the_model_does_not_support():
    """All three are computed in evaluation, and these two of a model with sparse attention."""
    model = attach(tiny_decoder("minimax_m3"), dv_sft=DvSft())
    batch = batches()["right"]
    with torch.no_grad():
        output = model(**batch)
    assert set(output.parts) == {"text", "word", "map_kl"}
    assert all(bool(torch.isfinite(part)) for part in output.parts.values())
    assert output.side_log_prob is None
    assert set(model.train()(**batch).parts) == {"text", "word"}
    detach(model)


def test_doctor_compares_attention_where_there_are_no_side_tokens(monkeypatch):
    model = attach(tiny_decoder("minimax_m3"), klal=Klal())
    report = doctor(model, batches()["left"])
    assert (report.of, report.rows) == ("attention", 6)
    assert report.main == 0.0
    assert report.side < 1e-5 < 0.1 < report.control
    monkeypatch.setitem(text_attention(model)[0].__dict__, "_groundkern_chunk", 3)
    with pytest.raises(ValueError, match="attention of rows by the ops with every key allowed"):
        doctor(model, batches()["left"])
    detach(model)


def broken_side_tokens(monkeypatch, **objectives: Any) -> nn.Module:
    """A model whose mixers give side tokens the output of other rows."""
    monkeypatch.setattr("groundkern.hf.model.mixers.take_rows", lambda x, at: x[:, : at.shape[1]])
    return attach(tiny_decoder("lfm2"), **objectives)


def test_doctor_refuses_smam_alone_where_side_tokens_fail(monkeypatch):
    model = broken_side_tokens(monkeypatch, smam=Smam())
    with pytest.raises(ValueError, match="Lfm2ForCausalLM"):
        doctor(model, batches()["right"])
    model = broken_side_tokens(monkeypatch, klal=Klal())
    assert doctor(model, batches()["right"]).of == "attention"
    assert "Lfm2ForCausalLM" in supported_objectives(model)["smam"]
    assert "smam_grounding" not in model(**batches()["right"]).parts
    detach(model)


def test_a_mixer_that_is_passed_over_is_an_error():
    """Side tokens would see everything before them."""
    model = attach(tiny_decoder("lfm2"), smam=Smam())
    layer = text_decoder(model).layers[0]
    conv, layer.conv.forward = layer.conv, type(layer.conv).forward.__get__(layer.conv)
    with pytest.raises(ValueError, match=r"2 recurrences and convolutions.*got 1"):
        model(**batches()["right"])
    detach(model)
    assert "forward" in vars(conv)  # what was wrapped around ours stays


def test_detach_leaves_nothing_behind():
    model = tiny_decoder("lfm2")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    batch = plain_inputs(batches()["right"])
    wanted = model(**batch).logits
    attach(attach(model, smam=Smam()), klal=Klal())
    assert torch.equal(model(**batch).logits, wanted)
    detach(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
