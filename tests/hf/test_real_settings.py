"""The processors with the settings of released checkpoints: as many places as visual tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks.families.seeing import process
from groundkern.hf import image_geometry
from groundkern.hf.data.processor import pil_image_processor, with_image_options
from tests.hf.families import FAMILIES

SIZES = ((950, 1256), (31, 639), (1, 1), (500, 2))
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
# the image processor (folder and name) with settings beside its own defaults, the processor's
# settings, and those of the vision tower that the geometry reads
REAL = {
    "qwen2_5_vl": (("qwen2_vl", "Qwen2VL"), {}, {}, {}),
    "qwen3_vl": (("qwen2_vl", "Qwen2VL"), {"patch_size": 16}, {}, {}),
    "llava": (("llava", "Llava"), SQUARE, {}, {}),
    "llava_next": (
        ("llava_next", "LlavaNext"),
        SQUARE | {"image_grid_pinpoints": PINPOINTS},
        {},
        {"patch_size": 14, "image_size": 336},
    ),
    "llava_onevision": (
        ("llava_onevision", "LlavaOnevision"),
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": ONEVISION},
        {"num_image_tokens": 729},
        {"patch_size": 14, "image_size": 384},
    ),
    "gemma3": (
        ("gemma3", "Gemma3"),
        {"size": {"height": 896, "width": 896}},
        {"image_seq_length": 256, "full_image_sequence": None},
        {},
    ),
    "idefics3": (("idefics3", "Idefics3"), {}, {"image_seq_len": 169}, {}),
    "smolvlm": (("smolvlm", "SmolVLM"), {}, {"image_seq_len": 64}, {}),
    "internvl": (
        ("got_ocr2", "GotOcr2"),
        {"size": {"height": 448, "width": 448}, "max_patches": 12},
        {"image_seq_length": 256},
        {},
    ),
    "aya_vision": (
        ("got_ocr2", "GotOcr2"),
        {"size": {"height": 364, "width": 364}, "max_patches": 12},
        {"img_size": 364},
        {},
    ),
}


def real(name: str, options: dict | None = None) -> tuple:
    """A processor with a checkpoint's settings, and what of the config the geometry reads."""
    kind, images, settings, vision = REAL[name]
    processor = FAMILIES[name].processor()
    processor.image_processor = pil_image_processor(*kind)(**images)
    if options:
        processor = with_image_options(processor, options)
    for setting, value in settings.items():
        if setting == "full_image_sequence":  # Gemma3 writes it once
            value = "\n\n<start_of_image>" + "<image_soft_token>" * 256 + "<end_of_image>\n\n"
        setattr(processor, setting, value)
    config = SimpleNamespace(
        model_type=name,
        vision_config=SimpleNamespace(**vision),
        image_grid_pinpoints=images.get("image_grid_pinpoints"),
    )
    return processor, config


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", REAL)
def test_there_are_as_many_places_as_visual_tokens(name, size):
    processor, config = real(name)
    image = Image.new("RGB", size, "white")
    if name.startswith("qwen") and size == (500, 2):
        with pytest.raises(ValueError, match="absolute aspect ratio must be smaller than 200"):
            process(processor, [image])
        return
    batch = process(processor, [image])
    token = FAMILIES[name].model().config.image_token_id
    (table,) = image_geometry(processor, config, [[image]], batch)
    assert len(table) == int((batch["input_ids"] == token).sum()) > 0


def test_a_bound_on_pixels_bounds_the_tokens():
    processor, config = real("qwen2_5_vl", {"max_pixels": 20 * 28 * 28})
    image = Image.new("RGB", (950, 1256))
    (table,) = image_geometry(processor, config, [[image]], process(processor, [image]))
    assert 12 <= len(table) <= 20
