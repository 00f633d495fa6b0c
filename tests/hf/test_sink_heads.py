"""GUI-AIMA: head weights of each row from the tokens before it, against stored attention in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from groundkern.hf import Klal, attach
from groundkern.hf.data.padding import pad_fields
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.naive import run_samples
from tests.hf.samples import SAMPLES, make_batch

SINK = {"over": "renormalised", "average_layers": True}


def with_queries(batch: dict, left: bool = False) -> dict:
    """The batch with the tokens between each map row's last image and the row: of every row another
    number, and none of the last."""
    position, image = batch["gk_map_position"], batch["gk_image"]
    found = []
    for b in range(len(position)):
        rows = []
        for row in position[b].tolist():
            visual = [p for p in range(max(row, 0)) if image[b, p] >= 0]
            rows.append(list(range(visual[-1] + 1, row)) if visual else [])
        found.append(rows)
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
        return torch.full(attention.shape[:2], 1 / attention[:, :, 0, 0].numel(), dtype=torch.float64)
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
