"""The maps that KLAL reads are the models' own attention, in every family with images."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families.examining import images
from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundingCollator, Klal, attach, detach, supported_objectives
from groundkern.hf.data.geometry import FAMILIES, check_family
from groundkern.hf.examination import examples_of
from groundkern.hf.model.layers import text_attention

ZOO = families()
QUICK = ("gemma4", "glm4v", "mistral3", "paligemma", "qwen3_5")
NAMES = sorted(name for name in ZOO if name.partition(":")[0] in FAMILIES and name != "fuyu")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in NAMES]
)
def test_maps_are_the_models_own_attention(name):
    """Of each layer of softmax attention, the mean of heads, within each row's own image."""
    try:
        check_family(name.partition(":")[0])
        model, processor = ZOO[name].model(attention="eager"), ZOO[name].processor()
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))
    if (reason := supported_objectives(model)["klal"]) is not None:
        pytest.skip(reason)
    batch = GroundingCollator(processor, model.config)(examples_of(images()))
    assert_maps_are_own(model, batch)


def assert_maps_are_own(model, batch) -> None:
    """Of a model with eager attention, which reports it."""
    attach(model, klal=Klal())
    with torch.no_grad():
        maps = model(**batch, gk_record=("maps", "layers")).maps  # [B, R, L, C]
    numbers = list(text_attention(model))
    detach(model)
    plain = {n: x for n, x in batch.items() if not n.startswith("gk_") and n != "labels"}
    with torch.no_grad():
        own = model(**plain, output_attentions=True).attentions
    if len(own) > len(numbers):  # some report None for the layers that mix otherwise
        own = [own[number] for number in numbers]
    assert maps.shape[2] == len(own) == len(numbers) > 0
    rows, columns = batch["gk_map_position"], batch["gk_map_columns"]
    compared = 0
    for b, r in (rows >= 0).nonzero().tolist():
        image = batch["gk_image"][b] == batch["gk_map_image"][b, r]
        there = columns[b] >= 0
        at = columns[b][there].long()
        for layer, attention in enumerate(own):
            wanted = attention[b, :, rows[b, r], at].float() * image[at]  # [H, C]
            mass = wanted.sum(1, keepdim=True)
            if 0 in mass and bool(mass.any()):  # an exponential that is too small for fp32
                continue
            wanted = (wanted / mass).nan_to_num(0.0).mean(0)  # 0: beyond a sliding window
            torch.testing.assert_close(maps[b, r, layer][there], wanted, rtol=1e-4, atol=2e-6)
            compared += 1
    assert compared >= len(own)
