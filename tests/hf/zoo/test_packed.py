"""Packed batches in every family: images are in the order of the rows, as one call makes them.

Only configs of models are made, not their weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.families.zoo import families
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundingCollator
from groundkern.hf.data import calling
from groundkern.hf.data.geometry import check_family
from groundkern.hf.data.packing import rows_of
from groundkern.hf.data.tokens import PER_TOKEN
from tests.hf.test_packed_batches import check_documents, rich
from tests.hf.zoo.test_turns import NAMES, config_of

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
    try:
        check_family(name.partition(":")[0])
        processor, config = families()[name].processor(), config_of(name, monkeypatch)
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))
    if name == "llava:pixtral" and not calling.REPORTS:
        pytest.skip("transformers >= 5.20 tells where Pixtral's break tokens are")
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
    return len(one) == len(other) and all(map(same, one, other))
