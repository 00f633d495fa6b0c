"""Where visual tokens are, in every family: painted spots, and settings of the processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.families.seeing import visual_tokens, without_attention
from groundkern.hf.data.geometry import image_geometry
from groundkern.hf.data.processor import with_image_options
from tests.hf.families import FAMILIES
from tests.hf.painting import check, seeded

SIZES = ((150, 97), (61, 170), (112, 112), (230, 60))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A family's processor, and its model without vision attention."""
    built = FAMILIES[request.param]
    return built.processor(), without_attention(built.model())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_change_where_the_table_says(family, size):
    check(*family, size, seeded())


@pytest.fixture
def build(monkeypatch) -> Callable[..., tuple]:
    """A processor with settings of its own, and the family's model."""

    def build(name: str, **images):
        built = FAMILIES[name]
        processor = built.processor()
        if hasattr(processor, "images_kwargs"):
            processor.images_kwargs = {**processor.images_kwargs, **images}
        else:  # transformers before 5.21: beside the class
            defaults = processor.valid_processor_kwargs._defaults
            images = {**defaults.get("images_kwargs", {}), **images}
            monkeypatch.setitem(defaults, "images_kwargs", images)
        return processor, without_attention(built.model())

    return build


@pytest.mark.parametrize("size", [(150, 97), (61, 200)], ids=str)
def test_pan_and_scan_crops_come_after_the_whole_image(build, monkeypatch, size):
    """Gemma3's crops are off by default, and the processor's own setting decides."""
    crops = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 32,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    processor, model = build("gemma3", **crops)
    table = check(processor, model, size, seeded())
    assert len(table) == 16 * {150: 3, 61: 4}[size[0]]
    monkeypatch.undo()
    processor, model = build("gemma3")
    assert len(check(processor, model, size, seeded())) == 16


@pytest.mark.parametrize(
    ("name", "off"),
    [("idefics3", "do_image_splitting"), ("internvl", "crop_to_patches")],
    ids=str,
)
def test_without_tiles_there_is_one_view(build, name, off):
    processor, model = build(name, **{off: False})
    assert len(check(processor, model, (150, 97), seeded())) == 4


def test_a_small_image_has_one_view(build):
    assert len(check(*build("internvl"), (40, 40), seeded())) == 4


@pytest.mark.parametrize("size", [(112, 112), (61, 170)], ids=str)
def test_onevision_interpolates_what_is_too_many_tokens(build, size):
    """Bilinear: a token mixes its neighbours, so a spot may reach one token further."""
    processor, model = build("llava_onevision")
    plain = check(processor, model, size, seeded())
    processor.vision_aspect_ratio = model.config.vision_aspect_ratio = "anyres_max_1"
    fewer = check(processor, model, size, seeded(), blur=40.0)
    assert len(fewer) < len(plain)
    torch.testing.assert_close(fewer[16:, 3:].amax(0), plain[16:, 3:].amax(0))  # the same area


def test_onevision_gives_one_of_several_images_a_padded_square(build):
    processor, model = build("llava_onevision")
    wide, spotted = Image.new("RGB", (112, 56), "white"), Image.new("RGB", (112, 56), "white")
    ImageDraw.Draw(spotted).rectangle((30, 16, 53, 24), fill="black")
    text = [2 * processor.image_token]
    batches = [
        processor(text=text, images=[[wide, other]], return_tensors="pt")
        for other in (wide, spotted)
    ]
    before, after = (visual_tokens(model, batch)[0] for batch in batches)
    (table,) = image_geometry(processor, model.config, [[wide, wide]], batches[0])
    assert len(table) == len(before) == 34
    assert table[:, 0].tolist() == [0.0] * 17 + [1.0] * 17
    (changed,) = (after - before).norm(dim=-1).nonzero(as_tuple=True)
    assert changed.tolist() == [17 + 5]  # row 1, column 1 of 4 x 4 on a square of 112 px
    assert table[22, 1:].tolist() == pytest.approx([0.25, 0.0, 0.5, 0.5])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(150, 97), (61, 170), (200, 190)], ids=str)
def test_tiles_need_not_be_whole_patches(name, size):
    """LLaVA-OneVision's 384 pixels are 27 patches of 14 and 6 pixels that no token shows."""
    built = FAMILIES[name]
    vision = {**built.model.vision, "image_size": 64}
    pinned = [[64 * rows, 64 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    more = {**built.model.more, "image_grid_pinpoints": pinned}
    model = without_attention(replace(built.model, vision=vision, more=more)())
    square = {"height": 64, "width": 64}
    edges = {"llava_next": {"shortest_edge": 64}, "llava_onevision": square}
    options = {"size": edges[name], "image_grid_pinpoints": pinned}
    if name == "llava_next":
        options["crop_size"] = square
    processor = with_image_options(built.processor(), options)
    table = check(processor, model, size, seeded())
    assert table[15, 3:].tolist() == pytest.approx([56 / 64, 56 / 64])  # of the whole image


def test_newlines_have_no_place(build):
    processor, model = build("llava_next")
    table = check(processor, model, (112, 112), seeded())
    assert len(table) == 16 + 8 * (8 + 1)
    newline = table[:, 1] < 0
    assert newline[16:].view(8, 9).sum(1).tolist() == [1] * 8
    assert newline[16:].view(8, 9)[:, -1].all()


def test_class_tokens_in_tiles_and_other_tilings_are_refused(build):
    processor, model = build("llava_next")
    processor.vision_feature_select_strategy = "full"
    image = Image.new("RGB", (60, 60))
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        image_geometry(processor, model.config, [[image]], {})
    processor, model = build("internvl")
    processor.image_processor = build("gemma3")[0].image_processor
    with pytest.raises(ValueError, match="get_optimal_tiled_canvas"):
        image_geometry(processor, model.config, [[image]], {})
    processor, model = build("gemma3")
    processor.image_seq_length = 15
    with pytest.raises(ValueError, match="a square number"):
        image_geometry(processor, model.config, [[image]], {})
