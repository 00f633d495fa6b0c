"""SMAM with sinks and registers kept (S6): which tokens they are, and what must not change."""

from __future__ import annotations

import pytest
import torch

from groundkern.hf import Smam, attach
from groundkern.hf.data.batch import FIELDS, GroundedBatch
from groundkern.hf.model.sinks import most_attended
from tests.hf.closeness import assert_differ_in_attention, gradients
from tests.hf.collating import make_collator, make_example, make_region
from tests.hf.conftest import MODELS
from tests.hf.packed import packed_batch
from tests.hf.rows import assert_side_is_main, plain_inputs
from tests.hf.samples import SAMPLES, make_batch


def batch_of(image, columns) -> GroundedBatch:
    given = {"image": torch.tensor(image), "map_columns": torch.tensor(columns)}
    sizes = {"B": len(image), "S": len(image[0]), "3": 3}
    for name, field in FIELDS.items():
        shape = [sizes.get(dim, 0) for dim in field.dims.split()]
        given.setdefault(name, torch.zeros(shape, dtype=field.dtype))
    return GroundedBatch(given)


def test_the_most_attended_of_each_image_by_hand():
    """Image 0 at 1-3 with .1 .4 .2, image 1 at 5, 6 with .3 .3; the second row has one of three."""
    batch = batch_of(
        [[-1, 0, 0, 0, -1, 1, 1, -1], [-1, -1, 0, 0, 0, -1, -1, -1]],
        [[1, 2, 3, 5, 6], [2, 3, 4, -1, -1]],
    )
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.3], [0.0, 0.5, 0.0, 9.0, 9.0]])
    one, two = (most_attended(batch, attention, count) for count in (1, 2))
    assert one.nonzero().tolist() == [[0, 2], [0, 5], [1, 3]]
    assert two.nonzero().tolist() == [[0, 2], [0, 3], [0, 5], [0, 6], [1, 3]]


@torch.no_grad()
def naive_sinks(model, batch, layer: int, count: int) -> torch.Tensor:
    """bool [B, S], from the model's own attention matrices."""
    attention = model(**plain_inputs(batch), output_attentions=True).attentions[layer].mean(1)
    found = torch.zeros_like(batch["gk_image"], dtype=torch.bool)
    for b, image in enumerate(batch["gk_image"]):
        rows = batch["gk_text_position"][b]
        total = attention[b, rows[rows >= 0].long()].sum(0)  # [S]
        for number in image[image >= 0].unique():
            own = (image == number).nonzero()[:, 0]
            found[b, own[total[own].topk(min(count, len(own))).indices]] = True
    return found


def with_sinks(batch, sinks):
    """The batch whose sets have the sinks of the images that they have a token of."""
    inside = batch["gk_side_inside"].clone()
    for b, g in inside.any(-1).nonzero().tolist():
        touched = batch["gk_image"][b][inside[b, g]].unique()
        inside[b, g] |= sinks[b] & torch.isin(batch["gk_image"][b], touched)
    return {**batch, "gk_side_inside": inside}


@pytest.mark.parametrize(("side", "count"), [("right", 1), ("left", 3)])
@torch.no_grad()
def test_sinks_are_those_of_naive_attention(family, samples, side, count):
    model = MODELS[family](attention="eager")
    batch = make_batch(model, samples, side=side)
    sinks = naive_sinks(model, batch, 0, count)
    plain = attach(model, smam=Smam())(**batch)
    wanted = attach(model, smam=Smam())(**with_sinks(batch, sinks))
    found = attach(model, smam=Smam(keep="sinks", keep_sinks=count, sink_layer=0))(**batch)
    torch.testing.assert_close(found.side_log_prob, wanted.side_log_prob, rtol=1e-5, atol=1e-6)
    assert float((found.side_log_prob - plain.side_log_prob).abs().max()) > 1e-3
    assert torch.equal(found.text_log_prob, plain.text_log_prob)
    later = attach(model, smam=Smam(keep="sinks", keep_sinks=count))(**batch)  # in layer 2 alone
    assert not torch.equal(later.side_log_prob, found.side_log_prob)
    assert not torch.equal(later.side_log_prob, plain.side_log_prob)


@pytest.mark.parametrize("sink_layer", [pytest.param(0, marks=pytest.mark.long), 2])
@torch.no_grad()
def test_all_keys_allowed_is_still_the_main_distribution(model, samples, sink_layer):
    batch = make_batch(model, samples)
    smam = Smam(keep="sinks", sink_layer=sink_layer)
    everything = (batch["gk_image"] >= 0)[:, None].expand(-1, 3, -1)
    for changed in ({"gk_side_inside": everything}, {"gk_side_set": batch["gk_side_set"] * 0 - 1}):
        free = {**batch, **changed}
        assert_side_is_main(attach(model, smam=smam)(**free, gk_record="logits"), free)


def test_as_many_sinks_as_tokens_are_everything(qwen):
    """The one image of a sample is then seen whole, so that side is main."""
    batch = make_batch(qwen, SAMPLES["qwen"][:1])
    smam = Smam(keep="sinks", keep_sinks=100, sink_layer=0)
    with torch.no_grad():
        assert_side_is_main(attach(qwen, smam=smam)(**batch, gk_record="logits"), batch)


def test_gradients_are_the_same_under_checkpointing_and_those_of_the_sets(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    found = []
    for smam, checkpointed in (
        (Smam(keep="sinks", sink_layer=1), False),
        (Smam(keep="sinks", sink_layer=1), True),
        (Smam(), False),
    ):
        attach(qwen, smam=smam).train()
        if checkpointed:
            qwen.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(qwen, qwen(**batch).loss))
        qwen.gradient_checkpointing_disable()
    sinks, checkpointed, plain = found
    for name, gradient in sinks.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)
    assert_differ_in_attention(sinks, plain)


@torch.no_grad()
def test_packed_rows_have_the_sinks_of_their_own_documents(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"])
    attach(qwen, smam=Smam(keep="sinks", keep_sinks=2, sink_layer=1))
    apart = qwen(**batch).parts["smam_grounding"]
    rows = [SAMPLES["qwen"][:2], SAMPLES["qwen"][2:]]
    packed = qwen(**packed_batch(qwen, rows)).parts["smam_grounding"]
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)


def test_refusals(qwen):
    with pytest.raises(ValueError, match=r"smam.sink_layer.*0, 1, 2"):
        attach(qwen, smam=Smam(keep="sinks", sink_layer=3))
    with pytest.raises(ValueError, match="keep_sinks"):
        Smam(keep="sinks", keep_sinks=0)
    with pytest.raises(ValueError, match="None or registers or sinks"):
        Smam(keep="all")
    batch = make_batch(qwen, SAMPLES["qwen"])
    without = {name: x for name, x in batch.items() if not name.startswith("gk_map")}
    with pytest.raises(ValueError, match="gk_map_columns"):
        attach(qwen, smam=Smam(keep="sinks"))(**without)


def test_registers_are_the_visual_tokens_without_a_place():
    """Two images; of each the first visual token is called one without a place."""
    answer = "The red patch and the cat"
    regions = [
        make_region(answer, "patch", boxes=((0.4, 0.5, 0.6, 0.75),)),
        make_region(answer, "cat", image=1, boxes=((0.4, 0.5, 0.6, 0.75),)),
    ]
    first = make_collator()
    plain_geometry = first.geometry

    def geometry(images, features):
        tables = plain_geometry(images, features)
        for table in tables:
            for number in (0, 1):
                table[(table[:, 0] == number).nonzero()[0, 0], 1:] = -1.0
        return tables

    image = make_example().images[0]
    sample = make_example(answer, regions, images=(image, image))
    plain = make_collator(geometry=geometry)([sample])
    kept = make_collator(geometry=geometry, keep_registers=True)([sample])
    more = kept["gk_side_inside"] & ~plain["gk_side_inside"]
    starts = [int((plain["gk_image"][0] == number).nonzero()[0, 0]) for number in (0, 1)]
    assert more[0].nonzero().tolist() == [[0, starts[0]], [1, starts[1]]]
    changed = {name for name in plain if not torch.equal(plain[name], kept[name])}
    assert changed == {"gk_side_inside"}
