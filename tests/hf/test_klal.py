"""Attention-map losses: where their gradient goes."""

from __future__ import annotations

import torch

from groundkern.hf import Klal, attach
from tests.hf.closeness import gradients
from tests.hf.samples import SAMPLES, make_batch


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


def test_the_other_image_takes_no_part_over_columns(qwen):
    batch = make_batch(qwen, SAMPLES["qwen"][1:2])
    batch["gk_map_target"] = batch["gk_map_target"].clone()
    both = map_gradients(qwen, batch)
    own = batch["gk_image"].gather(1, batch["gk_map_columns"].long())  # [1, C]
    other = own[:, None] != batch["gk_map_image"][..., None]
    batch["gk_map_target"][other] = 2**20  # mass that is not the row's own is dropped
    again = map_gradients(qwen, batch)
    assert all(torch.equal(both[k], again[k]) for k in both)
