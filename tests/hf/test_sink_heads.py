"""GUI-AIMA: head weights of each row from the tokens before it, against stored attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from benchmarks.families.zoo import rows
from groundkern.hf import Klal, Smam, attach
from groundkern.hf.data.batch import GroundedBatch
from groundkern.hf.model.prefix import refuse_seeing_rows
from groundkern.losses import map_kl
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.packed import packed_batch
from tests.hf.samples import SAMPLES, make_batch

SINK = {"over": "renormalised", "average_layers": True}


def with_queries(batch: dict, *, bare: bool = True) -> dict:
    """The batch with the tokens between each map row's last image and the row: of every row another
    number, and none of those of the last sample if it is to be `bare`."""
    position, image = batch["gk_map_position"], batch["gk_image"]
    found = []
    for b in range(len(position)):
        rows = []
        for row in position[b].tolist():
            visual = [p for p in range(max(row, 0)) if image[b, p] >= 0]
            rows.append(list(range(visual[-1] + 1, row)) if visual else [])
        found.append(rows)
    if bare:
        found[-1] = [[] for _ in found[-1]]
    most = max(len(each) for rows in found for each in rows)
    queries = torch.full((*position.shape, most), -1, dtype=torch.int32)
    for b, rows in enumerate(found):
        for r, each in enumerate(rows):
            queries[b, r, : len(each)] = torch.tensor(each, dtype=torch.int32)
    return batch | {"gk_query_position": queries}


def naive_weights(sample, queries, own, klal: Klal, layers) -> torch.Tensor:
    """[L, H] of one row: (G1) written out."""
    attention = torch.stack([sample.layers[n][0] for n in layers])  # [L, H, S, S]
    outputs = [sample.main if n == 2 else sample.hidden[n] for n in layers]
    if not queries:
        alike = torch.ones(attention.shape[:2], dtype=torch.float64)
        return alike / alike.numel()
    unit = [F.normalize(h.detach(), dim=-1) for h in outputs]
    cosines = sum((h[queries] @ h[own].T).sum(1) for h in unit)  # [Q]
    mass = torch.stack([attention[:, :, q][..., own].sum(-1) for q in queries])  # [Q, L, H]
    if klal.head_weight == "pattern":
        g = cosines.softmax(0).clamp_min(1e-12)
        f = mass.softmax(0).clamp_min(1e-12)
        distance = (g[:, None, None] * (g[:, None, None].log() - f.log())).sum(0)
        return (-distance).flatten().softmax(0).view_as(distance)
    best = sorted(range(len(queries)), key=lambda i: -float(cosines[i]))[: klal.sink_queries]
    total = mass[best].sum(0)
    return total.flatten().softmax(0).view_as(total)


def naive_loss(model, batch: dict, klal: Klal) -> torch.Tensor:
    """GUI-AIMA's loss (G1), (G2), (K3) on stored attention."""
    losses, layers = [], list(klal.layers or (0, 1, 2))
    for b, sample in enumerate(run_samples(model, batch)):
        for r, t in enumerate(sample.positions("map")):
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            target = batch["gk_map_target"][b, r, : len(at)][at].double()
            target = target / target.sum()
            queries = batch["gk_query_position"][b, r].tolist()
            queries = [q - sample.first for q in queries if q >= 0]
            weight = naive_weights(sample, queries, own, klal, layers)
            attention = torch.stack([sample.layers[n][0][:, t, own] for n in layers])
            m = (weight[..., None] * attention).sum((0, 1))
            losses.append((torch.xlogy(target, target) - target * (m / m.sum()).log()).sum())
    return torch.stack(losses).mean()


def text_free(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "gk_text_position"}


FORMS = (
    ("left", {"head_weight": "sink"}),
    ("right", {"head_weight": "sink", "sink_queries": 3, "layers": (0, 2)}),
    ("right", {"head_weight": "pattern"}),
)


@pytest.mark.parametrize(("side", "form"), FORMS, ids=str)
def test_weights_of_each_row_are_those_written_out(qwen, side, form):
    model = copy.deepcopy(qwen).double()
    klal = Klal(**SINK, **form)
    batch = with_queries(make_batch(model, SAMPLES["qwen"], side=side))
    batch["pixel_values"] = batch["pixel_values"].double()
    ours = attach(model, klal=klal).train()(**text_free(batch))
    found = gradients(model, ours.loss)
    wanted = naive_loss(model, batch, klal)
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-9, atol=0)
    expected = gradients(model, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=1e-8)


def batches(model, **how) -> dict:
    return text_free(with_queries(make_batch(model, SAMPLES["qwen"], **how)))


def test_a_packed_row_is_as_its_documents_are(qwen):
    rows = [tuple(SAMPLES["qwen"][i] for i in row) for row in ((0, 1), (3, 2))]
    padded = with_queries(make_batch(qwen, tuple(x for row in rows for x in row)), bare=False)
    packed = with_queries(packed_batch(qwen, rows), bare=False)
    attach(qwen, klal=Klal(**SINK, head_weight="sink")).train()
    wanted, ours = qwen(**padded), qwen(**packed)
    torch.testing.assert_close(ours.parts["map_kl"], wanted.parts["map_kl"], rtol=1e-5, atol=0)
    assert_same_gradients(gradients(qwen, ours.loss), gradients(qwen, wanted.loss), share=5e-5)


@pytest.mark.parametrize("head_weight", ["sink", "pattern"])
def test_checkpointing_adapters_and_side_tokens_change_nothing(qwen, head_weight):
    batch = with_queries(make_batch(qwen, SAMPLES["qwen"]))
    klal = Klal(**SINK, head_weight=head_weight)
    attach(qwen, klal=klal, smam=Smam()).train()
    plain = qwen(**batch)
    wanted = gradients(qwen, plain.loss)
    alone = attach(qwen, klal=klal).train()(**batch)
    torch.testing.assert_close(alone.parts["map_kl"], plain.parts["map_kl"], rtol=1e-6, atol=0)
    attach(qwen, klal=klal, smam=Smam())
    qwen.gradient_checkpointing_enable({"use_reentrant": False})
    again = qwen(**batch)
    torch.testing.assert_close(again.loss, plain.loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(qwen, again.loss), wanted)
    lora = get_peft_model(qwen, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    adapted = lora(**batch)  # whose adapters are zero
    torch.testing.assert_close(adapted.loss, plain.loss, rtol=1e-6, atol=0)
    assert any(g.any() for g in gradients(lora, adapted.loss).values())
    lora.gradient_checkpointing_disable()
    lora.unload()


def test_reentrant_checkpointing_is_refused(qwen):
    attach(qwen, klal=Klal(**SINK, head_weight="sink")).train()
    qwen.gradient_checkpointing_enable({"use_reentrant": True})
    qwen.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        qwen(**batches(qwen))


def test_the_map_that_is_trained_can_be_recorded(qwen):
    batch = batches(qwen)
    klal = Klal(**SINK, head_weight="sink")
    attach(qwen, klal=klal).eval()
    with torch.no_grad():
        output = qwen(**batch, gk_record="klal")
    found = output.klal_map / output.klal_map.sum(-1, keepdim=True).clamp_min(1e-30)
    target = batch["gk_map_target"].clamp(min=0).float()
    own = batch["gk_image"].gather(1, batch["gk_map_columns"].clamp(min=0).long())
    target = target * (own[:, None] == batch["gk_map_image"][..., None])
    rows = map_kl(target, found)[batch["gk_map_position"] >= 0]
    torch.testing.assert_close(rows.mean(), output.parts["map_kl"])
    attach(qwen, klal=Klal())
    with pytest.raises(ValueError, match="`gk_record`: expected klal with average_layers"):
        qwen(**batch, gk_record="klal")


def test_heads_that_look_at_the_image_weigh_more(qwen):
    """The weights of the trained map follow the sink's masses, and are not those of all alike."""
    batch = batches(qwen)
    found = {}
    for head_weight in ("uniform", "sink", "pattern"):
        attach(qwen, klal=Klal(**SINK, head_weight=head_weight)).train()
        found[head_weight] = float(qwen(**batch).parts["map_kl"])
    assert len({round(value, 6) for value in found.values()}) == 3


def test_a_batch_without_query_tokens_is_refused(qwen):
    attach(qwen, klal=Klal(**SINK, head_weight="sink")).train()
    with pytest.raises(ValueError, match="`gk_query_position`: expected the tokens between"):
        qwen(**make_batch(qwen, SAMPLES["qwen"]))
    no_maps = qwen(**make_batch(qwen, SAMPLES["qwen"][2:3]))  # none has a row
    assert float(no_maps.parts["map_kl"]) == 0.0
    short = with_queries(make_batch(qwen, SAMPLES["qwen"]))
    short["gk_query_position"] = short["gk_query_position"][:, :1]
    with pytest.raises(ValueError, match="gk_query_position"):
        qwen(**short)


def test_a_prompt_that_sees_later_tokens_is_refused():
    """Its tokens are the query tokens, and their attention is not over what is before them."""
    klal = Klal(**SINK, head_weight="sink")
    with pytest.raises(ValueError, match=r"klal.head_weight.*PaliGemma.*whose prompt does"):
        attach(rows.paligemma_model(), klal=klal)


def test_query_tokens_of_an_image_are_refused(qwen):
    """Where tokens of an image see one another (Qwen's types stand for such a decoder's)."""
    attach(qwen, klal=Klal(**SINK, head_weight="sink"))
    batch = with_queries(make_batch(qwen, SAMPLES["qwen"]))
    visual = batch["gk_map_columns"][0, 0]
    batch["gk_query_position"][0, 0, 0] = visual
    inputs = {"token_type_ids": (batch["gk_image"] >= 0).int(), "input_ids": batch["input_ids"]}
    own = GroundedBatch.pop(dict(batch), batch["input_ids"])
    ids = [qwen.config.image_token_id]
    with pytest.raises(ValueError, match=r"gk_query_position.*rows of text tokens"):
        refuse_seeing_rows(qwen, own, inputs, ids, None)


def test_chosen_heads_beside_weights_of_each_row_are_refused():
    with pytest.raises(ValueError, match="`chosen_heads`: expected None with head_weight sink"):
        Klal(**SINK, head_weight="sink", chosen_heads=((0, 1),))


def test_a_sequence_on_several_ranks_is_refused(qwen, monkeypatch):
    monkeypatch.setattr("groundkern.hf.model.request.split_of", lambda *_: object())
    attach(qwen, klal=Klal(**SINK, head_weight="sink"))
    with pytest.raises(ValueError, match=r"`klal.head_weight`: expected whole sequences"):
        qwen(**batches(qwen))


MASS = (
    {"divergence": "mass", "over": "visible", "layers": (0, 2)},
    {"divergence": "share", "over": "renormalised"},
    {"divergence": "mass", "over": "visible", "chosen_heads": ((0, 1), (2, 0), (2, 3))},
)


@pytest.mark.parametrize("options", MASS, ids=str)
def test_mass_losses_are_those_written_out(qwen, options):
    """GuidedVLA's and A3Tune's losses on stored attention (G4)."""
    klal, batch = Klal(**options), text_free(make_batch(qwen, SAMPLES["qwen"], side="left"))
    ours = attach(qwen, klal=klal).train()(**batch)
    found = gradients(qwen, ours.loss)
    losses = []
    for b, sample in enumerate(run_samples(qwen, batch)):
        for r, t in enumerate(sample.positions("map")):
            own = (sample.image == batch["gk_map_image"][b, r]).nonzero()[:, 0]
            at = sample.image[sample.image >= 0] == batch["gk_map_image"][b, r]
            weight = batch["gk_map_target"][b, r, : len(at)][at].float()
            weight = weight / weight.max()
            for n in klal.counted_layers or (0, 1, 2):
                heads = (klal.heads_by_layer or {}).get(n, (0, 1, 2, 3))
                q = sample.layers[n][0][list(heads), t][:, own].mean(0)
                if klal.divergence == "mass":
                    losses.append(-(weight * q).sum().log())
                else:
                    losses.append((1 - (weight * q).sum() / q.sum()) ** 2)
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(ours.loss.detach(), wanted.detach(), rtol=1e-4, atol=0)
    expected = gradients(qwen, wanted)
    assert_same_gradients({k: found[k] for k in expected}, expected, share=5e-4)
