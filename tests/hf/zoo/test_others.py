"""Families on padded squares, on codes and on raw patches: their geometry, and what works."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature

from benchmarks.families.examining import examined
from benchmarks.families.seeing import (
    fit_codes,
    process,
    visual_tokens,
    without_attention,
    without_neighbours,
)
from benchmarks.families.zoo import others
from benchmarks.families.zoo.making import Family, Unavailable
from groundkern.hf import GroundingCollator, Smam, attach, detach
from groundkern.hf.data.calling import REPORTS
from groundkern.hf.data.geometry import check_family, image_geometry
from groundkern.hf.data.processor import pil_image_processor
from groundkern.hf.examination import OBJECTIVES, OK
from groundkern.hf.model.logit_rule import BLOCKED
from tests.hf.painting import check, seeded
from tests.hf.test_families import EXAMPLES

SIZES = ((150, 97), (61, 170), (112, 112), (230, 60), (40, 40))
CHATS = [name for name in others.FAMILIES if name != "fuyu"]  # whose processors take chats


class Prepending:
    """Fuyu's processor around a text: its images and what replaces them.

    It puts the image before the text itself, and drops what its own tokenizer puts before that. And
    transformers 5.23 hands tensors to its Pil image processor, which patches in numpy.
    """

    def __init__(self, processor):
        self.processor, self.image_processor = processor, processor.image_processor
        self.image_token, self.tokenizer = processor.image_token, processor.tokenizer

    def apply_chat_template(self, _, *, tokenize):
        return self.image_token + "Where?"

    def __call__(self, *, text, images, text_kwargs, **_):
        own = self.processor.image_processor = self.image_processor
        own.patchify_image = lambda image, patch_size: torch.from_numpy(
            type(own).patchify_image(own, image.numpy(), patch_size)
        )
        images, replaced = self.processor._process_images(
            images, return_legacy_image_output=False, return_tensors="pt"
        )
        words = [text.replace(self.image_token, rows) for text, rows in zip(text, replaced)]
        batch = self.tokenizer(words, padding=text_kwargs["padding"])
        return BatchFeature({**batch, "pixel_values": images["pixel_values"]})


def built(name: str, **images):
    """A family's processor, or a skip where this transformers is too old for it."""
    try:
        check_family(name)
        processor = others.FAMILIES[name].processor(**images)
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))
    return Prepending(processor) if name == "fuyu" else processor


@cache
def local_model(name: str):
    """A family's model, in which a visual token shows the pixels of its own place only."""
    return without_neighbours(without_attention(others.FAMILIES[name].model()))


# Emu3's encoder works at full resolution and costs a second a size.
CASES = [(name, size) for name in others.FAMILIES for size in SIZES[: 2 if name == "emu3" else 5]]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_tokens_change_where_the_table_says(name, size):
    check(built(name), local_model(name), size, seeded())


@pytest.mark.parametrize("name", CHATS)
def test_of_two_images_the_second_changes(name):
    """Each image of a sample keeps its own places, of whatever size the other one is."""
    processor, model = built(name), local_model(name)
    first, blank = Image.new("RGB", (60, 40), "white"), Image.new("RGB", (112, 84), "white")
    spotted = blank.copy()
    ImageDraw.Draw(spotted).rectangle((30, 24, 53, 47), fill="black")
    text = [2 * processor.image_token] * 2
    nested = [[first, blank], [first, spotted]]
    batch = processor(text=text, images=nested, return_tensors="pt", padding=True)
    (table, same) = image_geometry(processor, model.config, nested, batch)
    assert torch.equal(table, same)
    if hasattr(model.base_model, "vocabulary_mapping"):
        fit_codes(model, batch)
    seen = visual_tokens(model, batch)
    change = (seen[1] - seen[0]).norm(dim=-1)
    changed = table[change > 1e-3 * change.amax()]
    assert len(changed) and (changed[:, 0] == 1).all()
    low, high = changed[:, 1:3] * torch.tensor([112, 84]), changed[:, 3:] * torch.tensor([112, 84])
    assert (low < 54 + 3).all() and (high[:, 0] > 30 - 3).all() and (high[:, 1] > 24 - 3).all()


@pytest.mark.parametrize("name", CHATS)
def test_rows_and_labels_are_the_words_they_should_be(name):
    """Also without an image, with two, and where the processor puts something before a chat."""
    model = others.FAMILIES[name].model()
    for side in ("right", "left"):
        processor = built(name, padding_side=side)
        batch = GroundingCollator(processor, model.config)(EXAMPLES)
        said = []
        for b, ids in enumerate(batch["input_ids"]):
            aligned, trained = batch["gk_side_position"][b], batch["gk_text_position"][b]
            decode = processor.tokenizer.decode
            said.append([decode(ids[p[p >= 0].long() + 1]) for p in (aligned, trained)])
        assert [words[0] for words in said] == ["The red patch", "Two patche", ""]
        answers = [example.messages[1]["content"] + "<|im_end|>" for example in EXAMPLES]
        assert [words[1] for words in said] == answers


def grid_of_real_pixels(name: str, processor, image: Image.Image) -> torch.Tensor:
    """[tokens, values]: the pixels of every visual token with a place, in real settings."""
    batch = process(processor, [image])
    if name == "fuyu":
        return batch["pixel_values"].reshape(-1, 30 * 30 * 3)
    pixels = batch.get("high_res_pixel_values", batch["pixel_values"])
    cell = {"janus": 16, "deepseek_vl": 16, "deepseek_vl_hybrid": None, "emu3": 8}.get(name, 16)
    if cell is None:  # 24 x 24 of 1024 px
        pixels, cell = torch.nn.functional.interpolate(pixels.float(), (1536, 1536)), 64
    cells = pixels[0].unfold(1, cell, cell).unfold(2, cell, cell)  # [3, rows, columns, cell, cell]
    return cells.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


REAL = {
    "janus": ("janus", "Janus", {"num_image_tokens": 576}),
    "deepseek_vl": ("deepseek_vl", "DeepseekVL", {"num_image_tokens": 576}),
    "deepseek_vl_hybrid": ("deepseek_vl_hybrid", "DeepseekVLHybrid", {"num_image_tokens": 576}),
    "emu3": ("emu3", "Emu3", {}),
    "chameleon": ("chameleon", "Chameleon", {"image_seq_length": 1024}),
    "fuyu": ("fuyu", "Fuyu", {}),
}


@pytest.mark.parametrize("size", [(950, 1256), (639, 31), (1, 1)], ids=str)
@pytest.mark.parametrize("name", REAL)
def test_real_settings_put_pixels_where_the_table_says(name, size):
    """The processors' own defaults, on a page, a line of text and a pixel."""
    if size == (1, 1) and (name == "emu3" or not REPORTS):
        pytest.skip("transformers takes 1 x 1 x 3 for a picture of one channel")
    processor, (folder, kind, settings) = built(name), REAL[name]
    real = processor.processor if name == "fuyu" else processor
    processor.image_processor = pil_image_processor(folder, kind)()
    for setting, value in settings.items():
        setattr(real, setting, value)
    blank = Image.new("RGB", size, "white")
    config, spotted = SimpleNamespace(model_type=name), blank.copy()
    batch = process(processor, [blank])
    (table,) = image_geometry(processor, config, [[blank]], batch)
    visual = (batch["input_ids"][0] == real.tokenizer.convert_tokens_to_ids(real.image_token)).sum()
    assert len(table) == int(visual)
    rects = table[table[:, 3] > table[:, 1], 1:]
    width, height = size
    spot = (width * 45 // 100, height * 45 // 100, width * 55 // 100, height * 55 // 100)
    ImageDraw.Draw(spotted).rectangle(spot, fill="black")
    before, after = (grid_of_real_pixels(name, processor, i) for i in (blank, spotted))
    changed = (after - before).abs().amax(1) > 1e-3
    assert len(rects) == len(changed)
    covered = torch.tensor([*spot[:2], spot[2] + 1, spot[3] + 1]) / torch.tensor([*size, *size])
    blur = 6.0 / torch.tensor(size)  # px; bicubic and Lanczos reach further in larger images
    wide = (rects[:, :2] - blur < covered[2:]) & (rects[:, 2:] + blur > covered[:2])
    tight = (rects[:, :2] < covered[2:] - 0.01) & (rects[:, 2:] > covered[:2] + 0.01)
    assert not (changed & ~wide.all(1)).any()
    assert (changed | ~tight.all(1)).all()


def test_rows_of_codes_end_in_a_token_without_a_place():
    processor = built("emu3")
    image = Image.new("RGB", (150, 97))
    batch = process(processor, [image])
    (table,) = image_geometry(processor, SimpleNamespace(model_type="emu3"), [[image]], batch)
    height, width = (length // 8 for length in batch["image_sizes"][0].tolist())
    ends = (table[:, 1:] < 0).all(1).view(height, width + 1)
    assert ends.sum(1).tolist() == [1] * height
    assert ends[:, -1].all()


def test_a_picture_read_sideways_is_refused():
    """transformers takes the 3 rows of a low picture for the channels of a narrow one."""
    processor, image = built("emu3"), Image.new("RGB", (60, 3))
    batch = process(processor, [image])
    with pytest.raises(ValueError, match=r"image_sizes.*60 x 3"):
        image_geometry(processor, SimpleNamespace(model_type="emu3"), [[image]], batch)


def test_squares_without_padding_and_views_without_a_crop_are_refused():
    image = Image.new("RGB", (60, 40))
    for name, setting in (("janus", "do_pad"), ("chameleon", "do_center_crop")):
        processor = built(name)
        setattr(processor.image_processor, setting, False)
        with pytest.raises(ValueError, match=setting):
            image_geometry(processor, SimpleNamespace(model_type=name), [[image]], {})


def test_a_system_prompt_that_the_processor_adds_moves_nothing_silently():
    processor = built("janus")
    processor.use_default_system_prompt = True
    with pytest.raises(ValueError, match="one that tokenises the chats it is given"):
        GroundingCollator(processor, others.FAMILIES["janus"].model().config)(EXAMPLES)


def test_chameleon_forbids_the_codes_of_images():
    """Its forward gives them the lowest logit, so the loss of text is not over the vocabulary."""
    model = others.FAMILIES["chameleon"].model()
    batch = GroundingCollator(built("chameleon"), model.config)(EXAMPLES)
    plain = {name: x for name, x in batch.items() if not name.startswith("gk_")}
    own = model(**plain).loss
    attach(model, smam=Smam())
    output = model(**batch, gk_record="logits", gk_part="text")
    codes = torch.tensor(model.model.vocabulary_mapping.image_tokens)
    assert (output.main_logits[..., codes] <= 0.5 * BLOCKED).all()
    torch.testing.assert_close(output.loss, own)
    detach(model)
    model.model.vocabulary_mapping.__dict__["image_tokens"] = []
    assert (model(**plain).loss - own).abs() > 1e-3  # over the whole vocabulary it is another


@pytest.mark.parametrize("name", CHATS)
def test_everything_works(name):
    built(name)
    build, _, found = examined(others.FAMILIES[name])
    assert (build, found.collator, found.attach, found.doctor) == (OK, OK, OK, OK)
    assert found.objectives == dict.fromkeys(OBJECTIVES, OK)


def test_fuyu_has_a_geometry_and_no_chats():
    processor = built("fuyu").processor
    build, _, found = examined(Family(others.fuyu_model, lambda: processor))
    assert (build, found.attach) == (OK, OK)
    assert found.collator.startswith("`processor.chat_template`: expected a chat template")
