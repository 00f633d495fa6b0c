"""PaliGemma: image and prompt attend both ways, and the answer causally."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.families.zoo.making import build_model, tower
from groundkern.hf import DvSft, Klal, Smam, attach, detach, doctor
from groundkern.hf.data.padding import pad_fields, pad_tokens
from groundkern.hf.model.layers import text_attention
from tests.hf.closeness import gradients
from tests.hf.decoders import FULL, SLIDING, TEXT
from tests.hf.rows import assert_side_is_main, moved_logits, plain_inputs

IMAGE, VISUAL = 5, 16  # the id of visual tokens, and their number
PROMPTS, ANSWERS = (6, 3), (8, 6)
# The second has layers whose window of 8 is shorter than the prefix, which no window binds.
WINDOWS = {
    "gemma": {"num_hidden_layers": 2},
    "gemma2": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, SLIDING],
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
    },
}


@pytest.fixture(scope="module", params=WINDOWS)
def model(request) -> Iterator[nn.Module]:
    text = {**TEXT, "model_type": request.param, **WINDOWS[request.param]}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=tower("siglip_vision_model"),
        image_token_id=IMAGE,
        projection_dim=64,
    )
    model_class = transformers.PaliGemmaForConditionalGeneration
    model = build_model(model_class, config, 0, "eager")
    yield model
    detach(model)


def make_batch(side: str = "right") -> dict[str, Tensor]:
    """Two images with prompts and answers; the first trained row is the last of the prefix."""
    generator = torch.Generator().manual_seed(0)
    ids, types, fields = [], [], []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        prefix = VISUAL + prompt
        text = torch.randint(20, 400, (prompt + answer,), generator=generator)
        ids.append(torch.cat((torch.full((VISUAL,), IMAGE), text)))
        types.append(torch.cat((torch.zeros(prefix), torch.ones(answer))).long())
        inside = torch.zeros(2, prefix + answer, dtype=torch.bool)
        inside[0, 2:6] = inside[1, 9:] = True
        inside[:, VISUAL:] = False
        first = prefix - 1
        sample = {
            "image": torch.where(ids[-1] == IMAGE, 0, -1),
            "text_position": torch.arange(first, first + answer),
            "side_position": [first, first + 2, first + 3],
            "side_set": [0, 1, 0],
            "side_inside": inside,
            "map_position": [first + 1, first + 4],
            "map_token_position": [first + 1, first + 4],
            "map_image": [0, 0],
            "map_target": torch.randint(1, 99, (2, VISUAL), generator=generator),
            "map_columns": torch.arange(VISUAL),
            "word_position": [3, 8],
            "word_label": [30, 31],
            "word_bag": [[30, 31]],
        }
        fields.append(sample)
    left = side == "left"
    ones = [torch.ones_like(x) for x in ids]
    return {
        "input_ids": pad_tokens(ids, 0, left=left),
        "attention_mask": pad_tokens(ones, 0, left=left),
        "token_type_ids": pad_tokens(types, 0, left=left),
        "pixel_values": torch.randn(2, 3, 56, 56, generator=generator),
        **pad_fields(fields, [len(x) for x in ids], left=left),
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_side_tokens_and_maps_of_the_answer_are_the_models_own(model, side):
    attach(model, smam=Smam(), klal=Klal())
    batch = make_batch(side)
    moved = moved_logits(model, batch)
    assert moved.main < 1e-6
    assert moved.side > 1e-3
    free = {**batch, "gk_side_set": torch.full_like(batch["gk_side_set"], -1)}
    kept: list[Tensor] = []
    with torch.no_grad():
        assert_side_is_main(model(**free, gk_record="logits"), free)
        maps = model(**batch, gk_record=("maps", "layers")).maps
        hooks = [
            module.register_forward_hook(lambda _, __, output: kept.append(output[1]))
            for module in text_attention(model).values()
        ]
        model(**plain_inputs(batch))
    for hook in hooks:
        hook.remove()
    for b, positions in enumerate(batch["gk_map_position"].tolist()):
        for r, t in enumerate(positions):
            columns = batch["gk_map_columns"][b].long()
            for ours, weights in zip(maps[b, r], kept, strict=True):
                heads = weights[b, :, t, columns]
                heads = heads / heads.sum(-1, keepdim=True).clamp(min=1e-30)
                torch.testing.assert_close(ours, heads.mean(0), rtol=1e-4, atol=1e-5)


def test_doctor_passes_and_every_term_learns(model):
    attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal())
    batch = make_batch()
    assert doctor(model, batch).control > 0.01
    found = []
    for part in ("smam_grounding", "word", "map_kl"):
        found.append(gradients(model, model(**batch, gk_part=part).loss))
        assert any(bool(g.any()) for k, g in found[-1].items() if "vision_tower" in k), part
        assert all(bool(torch.isfinite(g).all()) for g in found[-1].values())
    rolled = batch["gk_side_inside"].roll(3, -1) & (batch["gk_image"] >= 0)[:, None]
    other = model(**{**batch, "gk_side_inside": rolled}, gk_part="smam_grounding").loss
    others = gradients(model, other)
    names = [name for name in others if "self_attn" in name]
    assert names
    for name in names:
        apart = (found[0][name] - others[name]).abs().max()
        assert float(apart) > 1e-3 * float(others[name].abs().max()), name


@pytest.mark.parametrize("name", ["text", "side", "map"])
def test_rows_inside_the_prefix_are_refused(model, name):
    """They see later tokens, the one that they predict among them; word labels may lie there."""
    attach(model, smam=Smam(), klal=Klal(), dv_sft=DvSft())
    batch = make_batch("left")
    for own in (name, "map_token") if name == "map" else (name,):
        position = batch[f"gk_{own}_position"].clone()
        position[1, 0] = int((batch["token_type_ids"][1] == 0).nonzero().max()) - 1
        batch[f"gk_{own}_position"] = position
    with pytest.raises(ValueError, match=rf"gk_{name}_position.*inside the prefix"):
        model(**batch)


def test_token_types_are_needed(model):
    """Without them everything attends both ways, under sdpa without a word."""
    attach(model, dv_sft=DvSft())
    batch = make_batch()
    del batch["token_type_ids"]
    with pytest.raises(ValueError, match=r"token_type_ids.*1 for the answer"):
        model(**batch)
