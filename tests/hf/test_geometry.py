"""Token rectangles against what the processors do: paint one, see whose pixels change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from PIL import Image, ImageDraw
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.families.zoo.first import tiny_llava_processor, tiny_qwen_processor
from groundkern.hf.data import geometry
from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.processor import pil_image_processor

ROOT = Path(__file__).parents[2]
QWEN, LLAVA = SimpleNamespace(model_type="qwen2_5_vl"), SimpleNamespace(model_type="llava")


def _process(processor, images):
    text = [processor.image_token * len(sample) for sample in images]
    flat = [image for sample in images for image in sample]
    return processor(images=flat, text=text, return_tensors="pt", padding=True)


def _token_pixels(processor, config, image):
    """[n_tokens, values]: the pixels that each visual token is made of."""
    pixels = _process(processor, [[image]])["pixel_values"]
    if config is QWEN:
        return pixels.reshape(-1, processor.image_processor.merge_size**2 * pixels.shape[-1])
    patch = processor.patch_size
    _, channels, height, width = pixels.shape
    grid = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch * patch)


def _llava(**settings):
    processor = tiny_llava_processor()
    processor.image_processor = pil_image_processor("llava", "Llava")(**settings)
    return processor


CROP = {"height": 56, "width": 56}
CASES = {
    "qwen": (tiny_qwen_processor, QWEN),
    "llava": (tiny_llava_processor, LLAVA),
    "llava-squashed": (
        lambda: _llava(size={"height": 56, "width": 42}, do_center_crop=False),
        LLAVA,
    ),
    "llava-padded-square": (
        lambda: _llava(size={"shortest_edge": 56}, crop_size=CROP, do_pad=True),
        LLAVA,
    ),
    "llava-crop-beyond-image": (
        lambda: _llava(size={"shortest_edge": 41}, crop_size=CROP),
        LLAVA,
    ),
}


@pytest.mark.parametrize("size", [(150, 97), (61, 200), (84, 84)])
@pytest.mark.parametrize("case", CASES)
def test_rectangles_are_where_the_pixels_come_from(case, size):
    build, config = CASES[case]
    processor = build()
    blank = Image.new("RGB", size, "white")
    before = _token_pixels(processor, config, blank)
    (table,) = image_geometry(processor, config, [[blank]], _process(processor, [[blank]]))
    assert table.shape == (len(before), 5)
    assert (table[:, 0] == 0).all()
    painted = 0
    for token, rect in enumerate(table[:, 1:].tolist()):
        x0, y0, x1, y1 = (edge * size[axis % 2] for axis, edge in enumerate(rect))
        w, h = x1 - x0, y1 - y0
        box = [max(0, round(x0 + w / 4)), max(0, round(y0 + h / 4))]
        box += [min(size[0], round(x1 - w / 4)), min(size[1], round(y1 - h / 4))]
        if box[2] - box[0] < w / 4 or box[3] - box[1] < h / 4:
            continue  # a token on the padding
        image = blank.copy()
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="black")
        change = (_token_pixels(processor, config, image) - before).abs().sum(-1)
        assert change.argmax().item() == token
        assert change[token] > 0.9 * change.sum()
        painted += 1
    assert painted >= len(table) // 4


def test_what_a_center_crop_cuts_off_is_on_no_token():
    processor = tiny_llava_processor()
    image = Image.new("RGB", (200, 100))
    (table,) = image_geometry(processor, LLAVA, [[image]], {})
    assert table[:, 1:].amin(0).tolist() == pytest.approx([0.25, 0, 0.375, 0.25])
    assert table[:, 1:].amax(0).tolist() == pytest.approx([0.625, 0.75, 0.75, 1])


def test_a_class_token_comes_first_and_has_no_place():
    processor = tiny_llava_processor()
    processor.vision_feature_select_strategy = "full"
    image = Image.new("RGB", (60, 60))
    (table,) = image_geometry(processor, LLAVA, [[image]], {})
    assert len(table) == _process(processor, [[image]])["input_ids"].shape[1] == 17
    assert table[0].tolist() == [0, -1, -1, -1, -1]
    assert table[1].tolist() == pytest.approx([0, 0, 0, 0.25, 0.25])


@pytest.mark.parametrize("case", ["qwen", "llava"])
def test_several_images_and_none(case):
    build, config = CASES[case]
    processor = build()
    wide, tall = Image.new("RGB", (140, 56)), Image.new("RGB", (56, 84))
    images = [[wide], [], [tall, wide]]
    tables = image_geometry(processor, config, images, _process(processor, images))
    per_image = {"qwen": (10, 6), "llava": (16, 16)}[case]
    assert tables[0].shape == (per_image[0], 5)
    assert tables[1].shape == (0, 5)
    assert tables[2][:, 0].tolist() == [0] * per_image[1] + [1] * per_image[0]
    torch.testing.assert_close(tables[2][per_image[1] :, 1:], tables[0][:, 1:])


def test_families_of_later_transformers_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(geometry, "TRANSFORMERS", Version("5.9.0"))
    wanted = r"transformers >= 5\.20, .*, got 'idefics3' with transformers 5\.9\.0"
    with pytest.raises(ValueError, match=wanted):
        image_geometry(None, SimpleNamespace(model_type="idefics3"), [[]], {})
    monkeypatch.setattr(geometry, "TRANSFORMERS", Version("5.1.0"))
    served = {name for name in geometry.FAMILIES if not _refused(name)}
    llavas = {"llava", "llava_next", "llava_next_video", "llava_onevision"}
    assert {*llavas, "vipllava", "perception_lm", "qwen2_5_vl", "qwen3_vl"} <= served
    assert served.isdisjoint({"gemma3", "got_ocr2", "idefics3", "internvl", "molmo2", "ovis2"})
    newest = max(Version(family.since) for family in geometry.FAMILIES.values())
    monkeypatch.setattr(geometry, "TRANSFORMERS", newest)
    assert not any(map(_refused, geometry.FAMILIES))


def _refused(family: str) -> bool:
    try:
        geometry.check_family(family)
    except ValueError:
        return True
    return False


def test_every_type_of_transformers_has_a_table_or_a_reason():
    """Of the transformers that is installed; a newer one brings more types."""
    known = {*geometry.FAMILIES, *geometry.NO_PLACE}
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= known
    assert not geometry.FAMILIES.keys() & geometry.NO_PLACE.keys()
    page = (ROOT / "docs" / "models" / "families.md").read_text(encoding="utf-8")
    assert [name for name in geometry.FAMILIES if f"`{name}`" not in page] == []


def test_unknown_families_videos_and_missing_grids_are_refused():
    processor = tiny_qwen_processor()
    with pytest.raises(ValueError, match=r"`config.model_type`: expected .*got 'mllama'"):
        image_geometry(processor, SimpleNamespace(model_type="mllama"), [[]], {})
    image = Image.new("RGB", (56, 56))
    with pytest.raises(ValueError, match=r"still images \(t = 1\), got t = 2"):
        image_geometry(processor, QWEN, [[image]], {"image_grid_thw": [[2, 4, 4]]})
    with pytest.raises(ValueError, match="visual tokens of 1 images, got 0"):
        image_geometry(processor, QWEN, [[image]], {})
