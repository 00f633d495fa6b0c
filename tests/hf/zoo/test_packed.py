"""Packed batches in every family: images are in the order of the rows, as one call makes them, and
losses and gradients are those of the padded batch (`long`: for the former only configs of models
are made, not their weights)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundingCollator, MeasuredGeometry, attach, packing_refusal
from groundkern.hf.data import calling
from groundkern.hf.data.geometry import check_family
from groundkern.hf.data.packing import rows_of
from groundkern.hf.data.tokens import PER_TOKEN
from groundkern.hf.examination import OBJECTIVES, OPTIONS
from groundkern.hf.model.support import supported_objectives
from tests.hf.closeness import gradients
from tests.hf.test_packed_batches import (
    assert_same_but_for_noise,
    assert_same_in_fp64,
    check_documents,
    rich,
)
from tests.hf.zoo.test_turns import NAMES, collating_parts

SIZES = {
    "one": ((150, 97),),
    "two": ((61, 170), (230, 60)),
    "text": (),
    "small": ((40, 40),),
    "both": ((150, 97), (75, 52)),
}
# one for each way of laying features out; the others are long
QUICK = (
    "qwen2_5_vl",  # patches of all images
    "llava_next",  # [images, tiles padded to the most, ...]
    "mistral3",  # [images, 3, padded height, padded width]
    "idefics3",  # [samples, images padded to the most, ...]
    "minicpmv4_6",  # along the last dimension
    "paligemma",  # a prefix that is marked
)
# their processors take no text without an image
WITH_IMAGES = ("got_ocr2", "paligemma")
# rows of samples: for one without images a processor makes one of padding
ROWS_OF_SAMPLES = ("idefics3", "smolvlm", "granite_docling")


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """No pixel is black, and no two images are alike."""
    pixels = np.random.default_rng(seed).integers(1, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def examples(name: str):
    return [
        rich(key, *(noise(size, 10 * b + i) for i, size in enumerate(sizes)))
        for b, (key, sizes) in enumerate(SIZES.items())
        if sizes or name not in WITH_IMAGES
    ]


def reordering(alone) -> int:
    """A capacity that makes fewer rows than there are samples, and moves some."""
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    for capacity in range(max(lengths), sum(lengths)):
        rows = rows_of(lengths, capacity)
        order = [i for row in rows for i in row]
        if order != sorted(order) and len(rows) < len(lengths):
            return capacity
    raise AssertionError(lengths)


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES],
)
def test_images_are_those_of_one_call_in_the_order_of_the_rows(name, monkeypatch):
    processor, config = collating_parts(name, monkeypatch)
    padding, samples = GroundingCollator(processor, config), examples(name)
    alone = [padding([sample]) for sample in samples]
    packing = GroundingCollator(processor, config, pack_to=reordering(alone))
    if name == "molmo2":
        with pytest.raises(ValueError, match=r"Molmo2Processor, whose 'image_token_pooling' is"):
            packing(samples)
        return
    packed = packing(samples)
    order = check_documents(packed, alone)
    assert order != sorted(order)
    together = padding([samples[i] for i in order])
    names = [n for n in together if not n.startswith("gk_") and n not in (*PER_TOKEN, "labels")]
    assert {n for n in packed if not n.startswith("gk_")} == {
        *names, "labels", "position_ids", *(PER_TOKEN.keys() & together.keys() - {"attention_mask"})
    }  # fmt: skip
    for feature in names:
        wanted = together[feature]
        if name in ROWS_OF_SAMPLES:
            text = torch.tensor([not samples[i].images for i in order])
            assert not wanted[text].any()
            wanted = wanted[~text]
        assert same(packed[feature], wanted), feature


def same(one, other) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def trainable(name: str):
    """A tiny model, its processor, and a geometry if it has no table; what is not there skips."""
    family = families()[name]
    try:
        model, processor = family.model(), family.processor()
        try:
            check_family(name.partition(":")[0])
            return model, processor, None
        except ValueError:
            geometry = MeasuredGeometry(model, processor)
            geometry.measure([[(150, 97)]])
            return model, processor, geometry
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))


# In fp32 the gradient of a vision tower's key bias, 0 in truth, is more noise than
# `assert_same_but_for_noise` allows. In fp64 there is none, but of norms that compute in fp32.
IN_FP64 = {"aya_vision", "deepseek_vl", "llava_next_video", "llava_onevision"}
NORMS_IN_FP32 = {"aya_vision"}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_padded_batch(name):
    """Every objective that the family supports, and samples that change their order."""
    model, processor, geometry = trainable(name)
    dtype = torch.float64 if name in IN_FP64 else torch.float32
    model.to(dtype)
    if name == "llava:pixtral" and not calling.REPORTS:
        pytest.skip("transformers >= 5.20 tells where Pixtral's break tokens are")
    options, samples = {"geometry": geometry, **OPTIONS}, examples(name)
    padding = GroundingCollator(processor, model.config, **options)
    capacity = reordering([padding([sample]) for sample in samples])
    packing = GroundingCollator(processor, model.config, pack_to=capacity, **options)
    if name == "molmo2":
        with pytest.raises(ValueError, match="no packing"):
            packing(samples)
        return
    reasons = supported_objectives(model)
    reasons["basic"] = "rounds more in fp32: in fp64 by test_in_fp64_there_is_no_noise"
    terms = {term: how for term, how in OBJECTIVES.items() if reasons[term] is None}
    attach(model, **{term: objective for term, (objective, _) in terms.items()}).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # of single rows it would take statistics of their own
            module.eval()
    packed = in_dtype(packing(samples), dtype)
    if packing_refusal(model) is not None:
        with pytest.raises(ValueError, match="`packing`"):
            model(**packed)
        return
    padded, ours = model(**in_dtype(padding(samples), dtype)), model(**packed)
    assert padded.parts.keys() == ours.parts.keys()
    for part in [part for _, part in terms.values()]:
        assert float(padded.parts[part]) > 0, part
    exact = name in IN_FP64 - NORMS_IN_FP32
    close = {"rel": 1e-12} if exact else {"rel": 1e-5, "abs": 1e-7}
    for part, loss in padded.parts.items():
        assert float(ours.parts[part]) == pytest.approx(float(loss), **close), part
    wanted, own = gradients(model, padded.loss), gradients(model, ours.loss)
    (assert_same_in_fp64 if exact else assert_same_but_for_noise)(own, wanted)


def in_dtype(batch, dtype):
    """A batch whose floats have a dtype."""
    return batch | {name: x.to(dtype) for name, x in batch.items() if is_floating(x)}


def is_floating(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
