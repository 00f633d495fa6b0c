"""Side tokens: they do not change the main pass, and see exactly the keys they may see."""

from __future__ import annotations

import inspect

import pytest
import torch

from groundkern.hf import Klal, Smam, attach
from tests.hf.closeness import assert_differ_in_attention, gradients
from tests.hf.conftest import MODELS
from tests.hf.rows import assert_side_is_main, moved_logits
from tests.hf.samples import SAMPLES, make_batch


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_side_tokens_do_not_change_main_logits(family, samples, side, attention):
    model = attach(MODELS[family](attention=attention), smam=Smam())
    moved = moved_logits(model, make_batch(model, samples, side=side))
    assert moved.main < 1e-6
    assert moved.side > 1e-2  # every region blocks keys that were used


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("unrestricted", ["set -1", "every visual token inside"])
@torch.no_grad()
def test_all_keys_allowed_gives_the_main_distribution(model, samples, side, unrestricted):
    batch = make_batch(model, samples, side=side)
    if unrestricted == "set -1":
        batch["gk_side_set"] = torch.full_like(batch["gk_side_set"], -1)
    else:
        batch["gk_side_inside"] = (batch["gk_image"] >= 0)[:, None].expand(-1, 3, -1)
    ours = attach(model, smam=Smam())(**batch, gk_record="logits")
    assert_side_is_main(ours, batch)
    texts, aligned = ((batch[f"gk_{kind}_position"] >= 0).sum() for kind in ("text", "side"))
    grounding = ours.parts["smam_grounding"] * texts / aligned
    torch.testing.assert_close(grounding, torch.tensor(2.0).log())


def test_the_region_changes_the_gradients(model, samples):
    attach(model, smam=Smam()).train()
    batch = make_batch(model, samples)
    found = []
    for shift in (0, 1):
        inside = batch["gk_side_inside"].roll(shift, -1) & (batch["gk_image"] >= 0)[:, None]
        found.append(gradients(model, model(**{**batch, "gk_side_inside": inside}).loss))
    assert_differ_in_attention(*found)


def test_aligned_rows_may_share_a_token(qwen):
    """Two rows at one position have the same value with the same set, and else another."""
    batch = make_batch(qwen, SAMPLES["qwen"][3:])
    for name in ("gk_side_position", "gk_side_set"):
        batch[name] = batch[name][:, [0, 0, 2]]
    ours = attach(qwen, smam=Smam())(**batch)
    assert torch.equal(ours.side_log_prob[:, 0], ours.side_log_prob[:, 1])
    assert not torch.equal(ours.side_log_prob[:, 0], ours.side_log_prob[:, 2])


def test_given_positions_are_copied_from_the_row(qwen):
    """Positions in the batch (some samplers add them) change nothing, with and without a mask."""
    batch = make_batch(qwen, SAMPLES["qwen"][:1])
    attach(qwen, smam=Smam())
    wanted = qwen(**batch)
    named = inspect.signature(qwen.model.get_rope_index).parameters
    names = {"mm_token_type_ids", "image_grid_thw", "attention_mask"} & named.keys()
    some = {name: batch[name] for name in names}  # transformers 5.1 wants no token types
    positions, _ = qwen.model.get_rope_index(batch["input_ids"], **some)
    given = qwen(**batch, position_ids=positions)
    torch.testing.assert_close(given.side_log_prob, wanted.side_log_prob, rtol=1e-5, atol=1e-5)
    del batch["attention_mask"]
    given = qwen(**batch, position_ids=positions)
    torch.testing.assert_close(given.side_log_prob, wanted.side_log_prob, rtol=1e-5, atol=1e-5)
    without = qwen(**batch)
    torch.testing.assert_close(without.side_log_prob, wanted.side_log_prob, rtol=1e-5, atol=1e-5)


def test_sliding_window_limits_side_tokens_and_maps():
    """With a window on some layers, all keys allowed still gives the main distribution."""
    layers = ["full_attention", "sliding_attention", "sliding_attention"]
    model = MODELS["qwen"](
        layer_types=layers, use_sliding_window=True, sliding_window=6, max_window_layers=1
    )
    batch = make_batch(model, SAMPLES["qwen"], side="left")
    attach(model, smam=Smam(), klal=Klal())
    free = {**batch, "gk_side_set": torch.full_like(batch["gk_side_set"], -1)}
    ours = model(**free, gk_record="logits")
    aligned = batch["gk_side_position"] >= 0
    difference = (ours.main_logits - ours.side_logits)[aligned].abs().max()
    assert float(difference / ours.main_logits.abs().max()) < 1e-5
    wide = MODELS["qwen"]()
    elsewhere = attach(wide, smam=Smam())(**free, gk_record="logits")
    assert float((elsewhere.main_logits - ours.main_logits)[aligned].abs().max()) > 1e-2
    maps = model(**batch, gk_record="maps").maps.sum(-1)[batch["gk_map_position"] >= 0]
    # The window hides the image of some rows in two of three layers: these do not count.
    assert float(maps.min()) == pytest.approx(1 / 3, abs=1e-5)
    assert torch.isfinite(ours.parts["map_kl"])
    assert float(ours.parts["map_kl"]) > 0.1
