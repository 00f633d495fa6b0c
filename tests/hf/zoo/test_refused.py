"""Families that are refused: one sentence each, of what and why."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.families.examining import examined
from benchmarks.families.zoo import families, refused
from groundkern.hf import DvSft, attach
from groundkern.hf.data.geometry import FAMILIES, NO_PLACE, check_family
from groundkern.hf.examination import OK
from groundkern.hf.model.body import run_body
from groundkern.hf.model.request import Request

RESAMPLERS = ("idefics2", "aria")
WIRED_OTHERWISE = r"a model whose forward is a body \(`base_model`\) and an output head"
CROSSING = "a decoder without cross-attention"
REASONS = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), WIRED_OTHERWISE),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), WIRED_OTHERWISE),
    **dict.fromkeys(("idefics", "mllama", "evolla", "florence2", "pix2struct"), CROSSING),
    **dict.fromkeys(("pp_formulanet", "udop", "vision-encoder-decoder"), CROSSING),
    "blip": "a model with an output head",
    "git": "a decoder whose attention goes through transformers' attention functions",
}


def test_every_one_has_its_reason():
    assert {*REASONS, *RESAMPLERS} == set(refused.FAMILIES) <= set(NO_PLACE)
    assert not NO_PLACE.keys() & FAMILIES.keys()
    for name, reason in NO_PLACE.items():
        with pytest.raises(ValueError, match=f"{name}': {reason}"):
            check_family(name)


@pytest.mark.parametrize("name", REASONS)
def test_attach_refuses_with_the_reason(name):
    build, _, found = examined(refused.FAMILIES[name])
    if build.startswith("Unavailable"):
        pytest.skip(build)
    assert build == OK
    assert re.match(f"`model`: expected {REASONS[name]}", found.attach)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_resamplers_are_attached_and_not_collated(name):
    build, _, found = examined(refused.FAMILIES[name])
    assert (build, found.attach, found.doctor) == (OK, OK, OK)
    assert "resampler" in found.collator


def test_a_body_with_other_positions_is_refused():
    """A model that puts its image before the text would have every row elsewhere."""
    model = attach(refused.FAMILIES["idefics2"].model(), dv_sft=DvSft())
    ids = torch.arange(20, 32)[None]
    request = Request.of(model, model._groundkern.objectives, {"input_ids": ids})
    run_body(request)
    layer = model.get_decoder().norm
    layer.register_forward_hook(lambda _, __, out: torch.cat((out[:, :3], out), 1))
    with pytest.raises(ValueError, match="a hidden state for each of 12 tokens"):
        run_body(request)


def test_block_diffusion_is_refused():
    """Its config says neither that it is an encoder and a decoder nor what it predicts."""
    build, _, found = examined(families()["diffusion_gemma"])
    if build.startswith("Unavailable"):
        pytest.skip(build)
    assert found.attach.startswith("`model`: expected a decoder that reads `input_ids`")
