"""Where visual tokens are in the families of tiles, crops and windows: spots painted on images.

Families on torchvision or timm are skipped where these are not installed (`make families-test`).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from benchmarks.families.examining import examined, images
from benchmarks.families.seeing import process, visual_tokens, without_attention
from benchmarks.families.zoo import llavas, lookups, more_tiles, pages
from benchmarks.families.zoo.making import Unavailable, tiny_tokenizer
from groundkern.hf import GroundingCollator
from groundkern.hf.data.calling import call, placeholder
from groundkern.hf.data.geometry import FAMILIES, check_family, image_geometry
from groundkern.hf.data.geometry.cells import pooled, strided
from groundkern.hf.examination import examples_of
from tests.hf.painting import check, seeded

ZOO = llavas.FAMILIES | more_tiles.FAMILIES | pages.FAMILIES
# convolutions behind the tower: a token sees its neighbours' places too
REACH = {"got_ocr2": 1.0, "step3p7": 1.0, "unlimited_ocr": 1.0}
# FastVLM's tokens see the whole of a tiny image
PAINTED = [name for name in ZOO if name in FAMILIES and name != "fast_vlm"]
SIZES = [
    (150, 97),
    (61, 170),
    pytest.param((40, 40), marks=pytest.mark.long),
    pytest.param((230, 60), marks=pytest.mark.long),
]


def built(name: str, **images):
    """A family's processor, and its model without vision attention."""
    try:
        check_family(name)
        return ZOO[name].processor(**images), without_attention(ZOO[name].model())
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=PAINTED)
def family(request):
    return request.param, *built(request.param)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_change_where_the_table_says(family, size):
    name, processor, model = family
    check(processor, model, size, seeded(), reach=REACH.get(name, 0.0))


def test_each_image_of_a_sample_has_its_own_tokens(family):
    _, processor, model = family
    wide, tall = Image.new("RGB", (150, 60), "white"), Image.new("RGB", (50, 120), "white")
    painted = tall.copy()
    ImageDraw.Draw(painted).rectangle((20, 40, 39, 69), fill="black")
    batches = [process(processor, [wide, other], each=2) for other in (tall, painted)]
    before, after = (visual_tokens(model, batch)[0] for batch in batches)
    (table,) = image_geometry(processor, model.config, [[wide, tall]], batches[0])
    assert len(table) == len(before)
    change = (after - before).norm(dim=-1)
    assert change.amax() > 0
    assert (change[table[:, 0] == 0] <= 1e-4 * change.amax()).all()
    alone = image_geometry(processor, model.config, [[tall]], process(processor, [tall]))[0]
    torch.testing.assert_close(table[table[:, 0] == 1, 1:], alone[:, 1:])


@pytest.mark.parametrize(
    ("name", "setting", "tokens"),
    [
        ("got_ocr2", {"crop_to_patches": True}, 7 * 16),
        ("qianfan_ocr", {"crop_to_patches": False}, 7 * 4),  # the processor's own True wins
        ("granite_docling", {"fine_route": True}, 7 * 16),
        ("granite_docling", {"crop_to_patches": False}, 4),
        ("ovis2", {"use_covering_area_grid": False}, 7 * 4),
        ("ovis2", {"crop_to_patches": False}, 4),
        ("llama4", {"resize_to_max_canvas": True}, 7 * 4),
        ("molmo2", {"overlap_margins": [0, 1]}, 3 * 3 + 5 * 7),
        ("molmo2", {"pooling_size": [1, 2]}, 5 * 3 + 8 * 6),
        ("unlimited_ocr", {"crop_to_patches": False}, 4 * 5 + 1),
        ("perception_lm", {"vision_input_type": "vanilla"}, 4),
    ],
    ids=str,
)
def test_settings_of_the_processor_count(name, setting, tokens):
    processor, model = built(name, **setting)
    table = check(processor, model, (150, 97), seeded(), reach=REACH.get(name, 0.0))
    assert len(table) == tokens


def _defaults(name: str):
    """A family's processor with the settings of its classes or of its checkpoint."""
    docling, ovis, granite = "granite_docling", "ovis2", "granite4_vision"
    if name == docling:
        return lookups.processor_class(docling, "GraniteDocling")(
            lookups.pil_images(docling, "GraniteDocling"), more_tiles.docling_tokenizer()
        )
    if name == ovis:
        square = {"height": 448, "width": 448}
        images = lookups.pil_images(ovis, "Ovis2", size=square, crop_to_patches=True)
        return lookups.processor_class(ovis, "Ovis2")(images, more_tiles.ovis_tokenizer())
    side = 384
    pins = [[side * a, side * b] for a in range(1, 11) for b in range(1, 11) if a * b <= 10]
    square = {"height": side, "width": side}
    images = lookups.pil_images(
        "llava_next", "LlavaNext", size=square, crop_size=square, image_grid_pinpoints=pins
    )
    return lookups.processor_class(granite, "Granite4Vision")(
        images, tiny_tokenizer(), 16, "full", downsample_rate="4/8"
    )


@pytest.mark.parametrize("size", [(950, 1256), (31, 639), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "token"),
    [("granite_docling", "<image>"), ("ovis2", "<IMG_ATOM>"), ("granite4_vision", "<image>")],
)
def test_a_table_has_as_many_tokens_as_the_processor_makes(name, token, size):
    try:
        check_family(name)
        processor = _defaults(name)
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))
    image = Image.new("RGB", size, "white")
    features = call(processor, [[image]], [f"see {placeholder(processor)}"])
    vision = SimpleNamespace(patch_size=16, image_size=384)
    pins = getattr(processor.image_processor, "image_grid_pinpoints", None)
    config = SimpleNamespace(model_type=name, vision_config=vision, image_grid_pinpoints=pins)
    (table,) = image_geometry(processor, config, [[image]], features)
    visual = processor.tokenizer.convert_tokens_to_ids(token)
    assert len(table) == features["input_ids"][0].count(visual)


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_a_place_is_nearest_to_the_middle_of_what_its_token_sees(tokens):
    """Two convolutions of stride 2: counted by the paths from inputs to an output."""
    pixels = torch.zeros(1, 1, 4 * tokens, requires_grad=True)
    seen = pixels
    for _ in range(2):
        seen = nn.functional.conv1d(seen, torch.ones(1, 1, 3), stride=2, padding=1)
    assert seen.shape[-1] == tokens
    cells = strided(tokens, 4, 4 * tokens) * 4 * tokens
    assert cells[0, 0] == 0
    assert cells[-1, 1] == 4 * tokens
    torch.testing.assert_close(cells[1:, 0], cells[:-1, 1])
    at = torch.arange(4.0 * tokens) + 0.5
    middles = []
    for token in range(tokens):
        (paths,) = torch.autograd.grad(seen[0, 0, token], pixels, retain_graph=True)
        middles.append((paths[0, 0] * at).sum() / paths.sum())
    for token in range(1, tokens - 1):
        if token == 1 or token == tokens - 2:
            continue  # the neighbours at the ends see less than the others
        between = [(middles[token + i] + middles[token + i + 1]) / 2 for i in (-1, 0)]
        torch.testing.assert_close(cells[token], torch.stack(between).double())


def test_pooled_windows_stand_in_the_middle():
    """27 patches in windows of 2 become 14, the last of one patch; 4 in windows of 3 are 1 + 3."""
    cells = pooled(27, 2) * 27
    assert cells[0].tolist() == pytest.approx([0, 2])
    assert cells[-1].tolist() == pytest.approx([26, 27])
    assert (pooled(4, 3) * 4).flatten().tolist() == pytest.approx([0, 2, 2, 4])


def test_a_batch_is_made(family):
    """Of two samples whose images differ in size: every image has a word and a region on it."""
    _, processor, model = family
    batch = GroundingCollator(processor, model.config, max_word_patches=1e6)(examples_of(images()))
    for rows in ("gk_side_position", "gk_word_position", "gk_map_position"):
        assert (batch[rows] >= 0).any(1).all()
    assert len(batch["input_ids"]) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", PAINTED)
def test_everything_works_with_a_family(name):
    """All but two: a decoder that hides its head, and one without softmax attention."""
    built(name)
    build, _, found = examined(ZOO[name])
    assert (build, found.collator) == ("ok", "ok")
    if name == "nemotron_h_omni":
        assert found.attach != "ok"
        return
    assert (found.attach, found.doctor) == ("ok", "ok")
    refused = {kind for kind, sentence in found.objectives.items() if sentence != "ok"}
    wanted = {"smam", "klal", "hist", "margins"} if name == "unlimited_ocr" else set()
    assert refused == wanted


@pytest.mark.parametrize("name", ["video_llava", "llava_next_video"])
def test_a_processor_without_a_video_part_in_its_middle_is_loaded_again(name, tmp_path):
    processor, _ = built(name, padding_side="left")
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert loaded.tokenizer.padding_side == "left"
    image = Image.new("RGB", (150, 97), "red")
    batches = [process(p, [image]) for p in (processor, loaded)]
    assert batches[0].keys() == batches[1].keys()
    for key, x in batches[0].items():  # with torchvision the loaded one resizes by it
        assert x.shape == batches[1][key].shape
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_why_two_families_have_no_batch():
    """Learned queries have no place; a template that writes every visual token has no image."""
    with pytest.raises(ValueError, match="learned queries read its whole view"):
        check_family("deepseek_ocr2")
    try:
        processor = more_tiles.pp_chart2table_processor()
    except Unavailable as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=r"`processor\.image_token`: expected an image token"):
        GroundingCollator(processor, SimpleNamespace())


def test_got_ocrs_tokens_are_those_that_its_convolutions_make_of_a_tile():
    """16 x 16 is the default of a processor whose own setting was not saved."""
    processor, model = built("got_ocr2")
    processor.num_image_tokens = 256
    with pytest.raises(ValueError, match="expected 4 along a tile of 16 patches, got 16"):
        image_geometry(processor, model.config, [[Image.new("RGB", (150, 97))]], {})
