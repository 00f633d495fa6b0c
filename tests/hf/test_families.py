"""Every family end to end: its processor, the collator, side tokens, maps, gradients, padding.

One tiny model and one set of examples per family: images of two shapes (with tiles and global
views, if the family has them), a sample with two images and one with none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from groundkern.hf import GroundedExample, GroundingCollator, Klal, Smam, attach, detach, doctor
from groundkern.hf.data.example import Region, Word
from tests.hf.closeness import assert_differ_in_attention, gradients
from tests.hf.families import FAMILIES
from tests.hf.residual import ResidualParts
from tests.hf.rows import assert_side_is_main, moved_logits, plain_inputs

WIDE, TALL = Image.new("RGB", (150, 97)), Image.new("RGB", (61, 130))
for image in (WIDE, TALL):
    noise = torch.randint(
        0, 256, (*image.size[::-1], 3), generator=torch.Generator().manual_seed(3)
    )
    image.paste(Image.fromarray(noise.byte().numpy()))
# The visual tokens of the first example's image that belong to its global view.
TILED = {
    "llava_next": slice(0, 16),
    "llava_onevision": slice(0, 16),
    **dict.fromkeys(("idefics3", "smolvlm", "internvl", "aya_vision"), slice(-4, None)),
}
CORNER, MIDDLE = (0.0, 0.0, 0.3, 0.4), (0.4, 0.3, 0.9, 0.8)


def example(answer: str, images: tuple, places: tuple, name: str) -> GroundedExample:
    """A question about images, and an answer whose first words are at `places`."""
    regions = [Region(1, 0, 9, i, boxes=(box,)) for i, box in places]
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": answer}]
    words = [Word("the", box, i) for i, box in places]
    return GroundedExample(images, messages, tuple(regions), tuple(words), name=name)


EXAMPLES = (
    example("The red patch is in row 2.", (WIDE,), ((0, CORNER),), "one"),
    example("Two patches", (TALL, WIDE), ((0, MIDDLE), (1, CORNER)), "two"),
    example("No image at all, and a longer answer.", (), (), "none"),
)


@dataclass
class Built:
    """A family's model and the batches of its own processor."""

    name: str
    model: Any
    right: dict
    left: dict
    alone: list[dict]
    tokenizer: Any


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Built:
    made = FAMILIES[request.param]
    model = made.model()
    collate = {
        side: GroundingCollator(made.processor(padding_side=side), model.config)
        for side in ("right", "left")
    }
    batches = {side: collator(EXAMPLES) for side, collator in collate.items()}
    alone = [collate["right"]([one]) for one in EXAMPLES]
    assert collate["right"].counts["side_rows"] >= 4  # together and alone
    attach(model, smam=Smam(), klal=Klal())
    yield Built(request.param, model, **batches, alone=alone, tokenizer=made.processor().tokenizer)
    detach(model)


def test_rows_and_regions_are_where_the_words_and_places_are(family):
    """Through placeholders that become rows of tiles, and views that show a place twice."""
    for batch in (family.right, family.left):
        for b, said in ((0, "The red p"), (1, "Two patch")):
            rows = batch["gk_side_position"][b]
            text = family.tokenizer.decode(batch["input_ids"][b, rows[rows >= 0].long() + 1])
            assert text.strip().startswith(said)
    batch = family.alone[0]
    columns = batch["gk_map_columns"][0].long()
    inside = batch["gk_side_inside"][0, 0, columns]
    assert 0 < int(inside.sum()) < len(columns) / 2
    if family.name in TILED:  # the corner is in a tile and in the global view
        last = TILED[family.name]
        view = inside[last]
        assert view.any()
        assert (int(inside.sum()) - int(view.sum())) > 0


def test_side_tokens_do_not_change_main_logits(family):
    for batch in (family.right, family.left):
        moved = moved_logits(family.model, batch)
        assert moved.main < 1e-6
        assert moved.side > 1e-3  # a region blocks keys that were used


@torch.no_grad()
def test_all_keys_allowed_gives_the_main_distribution(family):
    batch = {**family.left, "gk_side_set": torch.full_like(family.left["gk_side_set"], -1)}
    assert_side_is_main(family.model(**batch, gk_record="logits"), batch)


def test_doctor_passes(family):
    report = doctor(family.model, family.right)
    assert report.rows >= 4
    assert report.control > 0.01


def test_a_region_mask_changes_the_gradients(family):
    attach(family.model, smam=Smam(weight=10.0))
    batch, found = family.right, []
    shown = {k: v for k, v in batch.items() if not k.startswith(("gk_word", "gk_map"))}
    visual = (batch["gk_image"] >= 0)[:, None]
    for inside in (batch["gk_side_inside"], ~batch["gk_side_inside"] & visual):
        output = family.model(**{**shown, "gk_side_inside": inside})
        found.append(gradients(family.model, output.loss))
    assert_differ_in_attention(*found)


def test_map_gradient_reaches_queries_and_keys_of_the_last_layer(family):
    attach(family.model, klal=Klal(layers=(2,)))
    shown = {k: v for k, v in family.right.items() if not k.startswith("gk_text")}
    family.model.train()
    found = gradients(family.model, family.model(**shown).loss)
    family.model.eval()
    last = {k.split("layers.2.")[1]: g for k, g in found.items() if "layers.2.self_attn" in k}
    assert bool(last["self_attn.q_proj.weight"].any() and last["self_attn.k_proj.weight"].any())
    assert not any(last[f"self_attn.{name}.weight"].any() for name in ("v_proj", "o_proj"))
    assert next(g for k, g in found.items() if "layers.1.self_attn.v_proj.weight" in k).any()


@torch.no_grad()
def test_padding_and_batch_composition_change_nothing(family):
    attach(family.model, smam=Smam(), klal=Klal())
    batches = (family.right, family.left)
    together = [family.model(**batch, gk_record="maps") for batch in batches]
    torch.testing.assert_close(together[0].loss, together[1].loss, rtol=1e-5, atol=1e-6)
    for b, batch in enumerate(family.alone):
        alone = family.model(**batch, gk_record="maps")
        for name in ("text_log_prob", "side_log_prob", "word_log_prob", "maps"):
            row = alone[name][0]
            if row.numel() == 0:
                continue
            for output in together:
                found = output[name][b]
                found = found[tuple(slice(n) for n in row.shape)]
                torch.testing.assert_close(found, row, rtol=1e-4, atol=2e-5, msg=name)


@torch.no_grad()
def test_contributions_residual_and_ffn_add_up_to_the_logit(family):
    """The sum rule of (C1), with every key as a column, in the family's own residual structure."""
    batch, model = family.left, family.model
    every = torch.arange(batch["input_ids"].shape[1], dtype=torch.int32)
    every = every.expand(len(batch["input_ids"]), -1)
    target = torch.zeros(*batch["gk_map_position"].shape, every.shape[1], dtype=torch.int32)
    parts = ResidualParts(model)
    with parts.recorded():
        ours = model(
            **{**batch, "gk_map_columns": every, "gk_map_target": target},
            gk_record=("contributions", "logits", "layers"),
        )
    aligned = batch["gk_side_position"] >= 0
    token = batch["input_ids"].gather(1, (batch["gk_side_position"].clamp(min=0) + 1).long())
    logit = ours.main_logits.gather(2, token[..., None])[..., 0]
    assert ours.contributions.shape == (*aligned.shape, 3, every.shape[1])
    attention = ours.contributions.sum((2, 3))
    rest = parts.along_the_logit(batch["gk_side_position"], token)
    off = (attention + rest - logit)[aligned].abs().max() / ours.main_logits.abs().max()
    assert float(off) < 1e-4
    assert float((attention.abs() / logit.abs())[aligned].max()) > 0.01  # attention matters


def test_gradcam_is_the_gradient_of_the_attention(family):
    """A * relu(dy / dA) from the weights and gradients of the model's own eager attention."""
    batch = family.alone[0]
    with torch.no_grad():
        ours = family.model(**batch, gk_record=("gradcam", "layers")).gradcam[0]
    eager = FAMILIES[family.name].model(attention="eager")
    z, v = [], []
    for layer in eager.get_decoder().layers:
        projections = layer.self_attn
        projections.o_proj.register_forward_pre_hook(lambda _, args: z.append(args[0]))
        projections.v_proj.register_forward_hook(lambda _, __, output: v.append(output[0]))
    output = eager(**plain_inputs(batch), output_attentions=True)
    columns = batch["gk_map_columns"][0].long()
    for r, t in enumerate(batch["gk_side_position"][0].tolist()):
        y = output.logits[0, t, batch["input_ids"][0, t + 1]]
        slopes = torch.autograd.grad(y, z, retain_graph=True)
        for layer, (a, slope) in enumerate(zip(output.attentions, slopes, strict=True)):
            g = slope[0, t].view(4, -1)  # dy/dz of each head
            values = v[layer].view(len(v[layer]), 2, -1).repeat_interleave(2, 1)  # [S, H, D]
            slope_of_a = torch.einsum("shd,hd->hs", values, g)
            wanted = (a[0, :, t] * slope_of_a.relu())[:, columns].sum(0).detach()
            close = {"rtol": 1e-3, "atol": 1e-4 * float(wanted.abs().max())}
            torch.testing.assert_close(ours[r, layer], wanted, **close)
