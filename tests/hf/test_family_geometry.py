"""Where visual tokens are, in every family: paint a spot, see which of the model's tokens change.

The real image processor runs on the painted image, and the model's own vision tower turns its
pixels into visual tokens. Attention is taken out of the tower, so a token changes exactly when its
own pixels do: tiles, global views, crops, pooling and newline tokens all show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from groundkern.hf.data.geometry import image_geometry
from tests.hf.families import FAMILIES

SIZES = ((150, 97), (61, 170), (112, 112), (230, 60))
SPOTS = 6  # painted per image
OUTPUTS = ("out_proj", "proj", "projection_layer")  # of the vision towers' attention


def without_attention(model: nn.Module) -> nn.Module:
    """The model with vision attention that adds nothing."""
    for name, module in model.named_modules():
        is_output = name.rpartition(".")[2] in OUTPUTS and "att" in name.lower()
        if is_output and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A family's processor, and its model without vision attention."""
    built = FAMILIES[request.param]
    return built.processor(), without_attention(built.model())


def process(processor, images: list[Image.Image]) -> dict:
    """One sequence to an image."""
    text = [processor.image_token] * len(images)
    nested = [[image] for image in images]
    return processor(text=text, images=nested, return_tensors="pt", padding=True)


@torch.no_grad()
def visual_tokens(model: nn.Module, batch: dict) -> torch.Tensor:
    """[B, n, D]: what the model puts in the place of the image tokens."""
    seen = []
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch)
    hook.remove()
    at = batch["input_ids"] == model.config.image_token_id
    return seen[0][at].unflatten(0, (len(at), -1))


def spots_on(rects: torch.Tensor, size, generator) -> tuple[list[int], list[list[int]]]:
    """Some tokens, and the middle of each in pixels."""
    tokens, spots = [], []
    placed = (rects[:, 2] > rects[:, 0]).nonzero()[:, 0]
    for token in placed[torch.randperm(len(placed), generator=generator)].tolist():
        x0, y0, x1, y1 = rects[token].tolist()
        w, h = x1 - x0, y1 - y0
        spot = [round(x0 + 0.3 * w), round(y0 + 0.3 * h), round(x1 - 0.3 * w), round(y1 - 0.3 * h)]
        outside = min(spot) < 0 or spot[2] > size[0] or spot[3] > size[1]  # on the padding
        if not outside and len(spots) < SPOTS:
            tokens.append(token)
            spots.append(spot)
    return tokens, spots


def check(processor, model, size, generator, *, blur: float = 3.0) -> torch.Tensor:
    """Compare the table of an image of `size` with what spots on it change; returns the table."""
    blank = Image.new("RGB", size, "white")
    (table,) = image_geometry(processor, model.config, [[blank]], process(processor, [blank]))
    rects = table[:, 1:] * torch.tensor([*size, *size])
    tokens, spots = spots_on(rects, size, generator)
    assert tokens
    images = [blank.copy() for _ in spots]
    for image, spot in zip(images, spots):
        ImageDraw.Draw(image).rectangle((*spot[:2], spot[2] - 1, spot[3] - 1), fill="black")
    seen = visual_tokens(model, process(processor, [blank, *images]))
    assert table.shape == (seen.shape[1], 5)
    for token, spot, change in zip(tokens, spots, (seen[1:] - seen[0]).norm(dim=-1)):
        low, high = torch.tensor(spot[:2]), torch.tensor(spot[2:])
        near = ((rects[:, :2] - blur < high) & (rects[:, 2:] + blur > low)).all(1)  # resampling
        assert change[~near].amax() <= 1e-4 * change.amax(), (size, spot)
        assert change[token] > 0.1 * change.amax() > 0, (size, spot, token)
    return table


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    with pytest.raises(ValueError, match="GOT-OCR"):
        image_geometry(processor, model.config, [[image]], {})
    processor, model = build("gemma3")
    processor.image_seq_length = 15
    with pytest.raises(ValueError, match="a square number"):
        image_geometry(processor, model.config, [[image]], {})
