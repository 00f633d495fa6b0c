"""Families with a grid of the image's own shape, break tokens and slices: every token's place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.families.examining import examined
from benchmarks.families.seeing import visual_tokens, without_attention
from benchmarks.families.zoo import rows, slices
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundedExample, GroundingCollator, Region
from groundkern.hf.data import calling
from groundkern.hf.data.geometry import check_family, image_geometry
from groundkern.hf.data.geometry.resized import inkling, inkling2
from groundkern.hf.data.processor import pil_image_processor
from groundkern.hf.examination import OK
from tests.hf.painting import check, seeded

ZOO = {name: f for name, f in (rows.FAMILIES | slices.FAMILIES).items() if f.processor is not None}
SIZES = ((150, 97), (61, 170), (31, 40))  # ragged, tall, small


def built(make):
    """What a maker of the zoo makes; it skips the test if a package is missing."""
    try:
        return make()
    except Unavailable as error:
        pytest.skip(str(error))


def served(name):
    """Skips the test if this transformers is too old for a family."""
    try:
        check_family(name.partition(":")[0])
    except ValueError as error:
        pytest.skip(str(error))
    if name == "llava:pixtral" and not calling.REPORTS:
        pytest.skip("transformers >= 5.20 tells where Pixtral's break tokens are")


@pytest.fixture(scope="module", params=ZOO)
def family(request):
    """A family's processor, and its model without vision attention."""
    served(request.param)
    processor = built(ZOO[request.param].processor)
    return processor, without_attention(built(ZOO[request.param].model))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_change_where_the_table_says(family, size):
    check(*family, size, seeded())


def test_tokens_of_several_images_come_in_their_order(family):
    """A spot on the second image changes tokens of its own, in the row that the table names."""
    processor, model = family
    first, plain = Image.new("RGB", (150, 97), "white"), Image.new("RGB", (61, 170), "white")
    spotted = plain.copy()
    ImageDraw.Draw(spotted).rectangle((0, 150, 60, 168), fill="black")  # at the bottom
    text = [processor.image_token + " " + processor.image_token]
    batches = [
        processor(text=text, images=[[first, image]], return_tensors="pt", padding=True)
        for image in (plain, spotted)
    ]
    before, after = (visual_tokens(model, batch)[0] for batch in batches)
    (table,) = image_geometry(processor, model.config, [[first, plain]], batches[0])
    assert len(table) == len(before)
    change = (after - before).norm(dim=-1)
    changed = table[change > 1e-3 * change.amax()]
    assert (changed[:, 0] == 1).all()
    assert (changed[:, 4] > 145 / 170).all()
    own = table[(table[:, 0] == 1) & (table[:, 1] < 1)]
    assert changed[:, 1].amin() == own[:, 1].amin()
    assert changed[:, 3].amax() == own[:, 3].amax()


def test_regions_lie_on_the_tokens_of_their_text(family):
    """Answers of several lengths, one sample with two images: spans, labels and places."""
    processor, model = family
    samples = [answered(1, "The red patch is in row 2."), answered(2, "No red patch, but coal.")]
    batch = GroundingCollator(processor, model.config)(samples)
    for row in range(2):
        ids = batch["input_ids"][row]
        positions = [int(p) for p in batch["gk_side_position"][row] if p >= 0]
        read = processor.tokenizer.decode([int(ids[p + 1]) for p in positions])
        assert read.strip() == "red patch"
        learned = [int(i) for i in batch["labels"][row] if i >= 0]
        assert processor.tokenizer.decode(learned).startswith(samples[row].messages[1]["content"])
    assert batch["gk_image"].amax(1).tolist() == [0, 1]


def answered(pictures: int, answer: str) -> GroundedExample:
    """A sample with pictures of growing size, and a region of "red patch"."""
    start = answer.index("red patch")
    region = Region(1, start, start + len("red patch"), 0, boxes=((0.0, 0.0, 1.0, 1.0),))
    shown = tuple(Image.new("RGB", (150 + 20 * i, 97 + 30 * i), "white") for i in range(pictures))
    question = {"role": "user", "content": "Where is it?"}
    return GroundedExample(shown, [question, {"role": "assistant", "content": answer}], (region,))


@pytest.mark.parametrize("name", rows.FAMILIES | slices.FAMILIES)
def test_what_works(name):
    """Whether hybrids and prefixes are attached is for the tests of refusals to say."""
    family = (rows.FAMILIES | slices.FAMILIES)[name]
    if family.processor is not None:
        served(name)
        built(family.processor)
    built(family.model)
    build, _, found = examined(family)
    assert build == OK
    assert found.collator == (OK if family.processor is not None else "")
    if name in WHOLE:
        assert (found.attach, found.doctor) == (OK, OK)
        said = {name: text for name, text in found.objectives.items() if text != OK}
        assert not said or (name == "gemma3n" and "several" in said.pop("basic") and not said)


WHOLE = {
    *("gemma3n", "gemma4", "gemma4_unified", "lighton_ocr", "llava:pixtral", "mistral3"),
    *("muse_glimmer", "muse_spark", "shieldgemma2"),
}


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_marks_the_answer_as_what_follows_its_prefix(side):
    """Its processor puts in a first token and a line break, and makes labels of its own."""
    served("paligemma")
    processor, model = rows.paligemma_processor(padding_side=side), rows.paligemma_model()
    samples = [answered(1, "The red patch."), answered(2, "It is the red patch in row 2, coal.")]
    batch = GroundingCollator(processor, model.config)(samples)
    first = processor.tokenizer.bos_token_id
    for row, sample in enumerate(samples):
        real = batch["attention_mask"][row].bool()
        ids, kinds = batch["input_ids"][row][real], batch["token_type_ids"][row][real].bool()
        prefix, suffix = (
            processor.tokenizer.decode(ids[~kinds]),
            processor.tokenizer.decode(ids[kinds]),
        )
        assert prefix == "<image>" * 16 * (row + 1) + "<bos>Where is it?\n"
        assert suffix == sample.messages[1]["content"] + "<|im_end|>\n"
        learned = batch["labels"][row][real]
        assert torch.equal(learned[kinds][:-1], ids[kinds][:-1])
        assert (learned[~kinds] == -100).all()
        assert learned[-1] == -100  # the line break at the end
        assert int((ids == first).sum()) == 1


def test_a_sample_beside_ones_with_images_may_have_none():
    """PaliGemma's processor then puts the first token into the middle of its text."""
    served("paligemma")
    processor, model = rows.paligemma_processor(), rows.paligemma_model()
    plain = GroundedExample(
        (), [{"role": "user", "content": "How much coal?"}, {"role": "assistant", "content": "65."}]
    )
    batch = GroundingCollator(processor, model.config)([plain, answered(1, "The red patch.")])
    learned = batch["labels"][0]
    assert processor.tokenizer.decode(learned[learned >= 0]) == "65.<|im_end|>"


def test_pixtrals_break_tokens_are_between_its_visual_tokens():
    served("mistral3")
    processor = rows.FAMILIES["mistral3"].processor()
    config = rows.mistral3_model().config
    batch = GroundingCollator(processor, config)([answered(1, "The red patch.")])
    ids = batch["input_ids"][0]
    tokens = {
        name: ids == processor.tokenizer.convert_tokens_to_ids(f"[{name}]")
        for name in ("IMG", "IMG_BREAK", "IMG_END")
    }
    assert {name: int(found.sum()) for name, found in tokens.items()} == {
        "IMG": 24,
        "IMG_BREAK": 3,
        "IMG_END": 1,
    }  # 4 rows of 6
    assert torch.equal(batch["gk_image"][0] >= 0, tokens["IMG"])


class Wrapped:
    """A processor whose results are changed."""

    def __init__(self, processor, change) -> None:
        self._processor, self._change = processor, change

    def __getattr__(self, name):
        return getattr(self._processor, name)

    def __call__(self, **inputs):
        features = self._processor(**inputs)
        self._change(features.data)
        return features


def test_a_placeholder_that_became_more_than_its_tokens_must_be_reported(monkeypatch):
    """Without a report it counts as repeated, which break tokens would shift."""
    served("mistral3")
    monkeypatch.setattr(calling, "_replaced", lambda *_: None)
    plain = rows.FAMILIES["mistral3"].processor()
    processor = Wrapped(plain, lambda data: data.pop("text_replacement_offsets"))
    collator = GroundingCollator(processor, rows.mistral3_model().config)
    with pytest.raises(ValueError, match=r"images\[0\]`: expected 24 visual tokens, got 18"):
        collator([answered(1, "The red patch.")])


def test_a_processor_that_writes_texts_of_its_own_is_refused():
    """ShieldGemma2's makes a prompt for each policy, and drops what it is given."""
    served("shieldgemma2")
    plain = rows.gemma3_processor()
    for policies in ({"a": "None of it.", "b": "No."}, {"a": "None of it."}):
        processor = rows.known("ShieldGemma2Processor")(
            plain.image_processor,
            plain.tokenizer,
            chat_template=plain.chat_template,
            image_seq_length=16,
            policy_definitions=policies,
        )
        collator = GroundingCollator(processor, rows.shieldgemma2_model().config)
        with pytest.raises(
            ValueError, match=r"expected one that (makes 1 seq|tokenises the chats)"
        ):
            collator([answered(1, "The red patch, which is in row 2 of the whole chart.")])


def test_what_does_not_fit_is_refused():
    served("gemma4")
    image, config = Image.new("RGB", (150, 97)), SimpleNamespace(model_type="gemma4")
    gemma = SimpleNamespace(images_kwargs={"pooling_kernel_size": 3}, image_processor=None)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    with pytest.raises(ValueError, match="pools of 3 x 3, got 6 x 4"):
        image_geometry(gemma, config, [[image]], {"image_position_ids": [grid.numpy()]})
    minicpm = built(slices.minicpmv4_6_processor)
    config = SimpleNamespace(model_type="minicpmv4_6")
    for sizes, message in (
        ([[8, 8]], "3 views or more, got 1"),
        ([[8, 8]] * 4, "the 3 views of the images, got 4"),
        ([[8, 6]] * 3, "multiples of 4 patches, got 8 x 6"),
    ):
        with pytest.raises(ValueError, match=message):
            image_geometry(minicpm, config, [[image]], {"target_sizes": sizes})
    siglip = rows.paligemma_processor()
    siglip.image_processor.do_center_crop = True
    with pytest.raises(ValueError, match="do_center_crop"):
        image_geometry(siglip, SimpleNamespace(model_type="paligemma"), [[image]], {})


def test_cells_of_padding_lie_beside_the_image():
    """By hand, because the processors need torchvision: 100 x 50 pixels in cells of 20."""
    settings = SimpleNamespace(size={"height": 20}, rescale_image_frac=None)
    processor = SimpleNamespace(images_kwargs={}, image_processor=settings)
    table = inkling2(processor, (100, 50))
    assert table.shape == (5 * 3, 4)
    assert table[-1].tolist() == pytest.approx([0.8, 0.8, 1.0, 1.2])
    table = inkling(processor, (100, 50))
    assert table.shape == (6 * 3, 4)
    assert table[5].tolist() == pytest.approx([1.0, 0.0, 1.2, 0.4])
    settings.rescale_image_frac, settings.rescale_image_max_upscaled_long_edge = 3.0, 190
    table = inkling(processor, (100, 50))  # 190 x 95
    assert table.shape == (10 * 5, 4)
    assert table[0].tolist() == pytest.approx([0.0, 0.0, 20 / 190, 20 / 95])


# image processors with the settings of released checkpoints, and the tokens of SIZES_REAL
SIZES_REAL = ((950, 1256), (31, 639), (1, 1))
REAL = {
    "gemma3n": (("siglip", "Siglip"), {"size": {"height": 768, "width": 768}}, (256, 256, 256)),
    "gemma4": (("gemma4", "Gemma4"), {}, (266, 225, 256)),
    "mistral3": (
        ("pixtral", "Pixtral"),
        {"size": {"longest_edge": 1540}, "patch_size": 14},
        (1530, 46, 1),
    ),
    "llava:pixtral": (("pixtral", "Pixtral"), {}, (3136, 80, 1)),
    "lfm3_vl": (("qwen2_vl", "Qwen2VL"), {"patch_size": 16}, (945, 20, 4)),
    "minicpmv4_6": (("minicpmv4_6", "MiniCPMV4_6"), {}, (447, 72, 64)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_settings_give_as_many_places_as_visual_tokens(name):
    kind, settings, wanted = REAL[name]
    served(name)
    processor = built(ZOO[name].processor)
    images = processor.image_processor = pil_image_processor(*kind)(**settings)
    if name == "gemma3n":
        processor.image_seq_length = 256
        processor.full_image_sequence = processor.image_token * 256
    if name == "llava:pixtral":
        processor.patch_size = images.patch_size["height"]
    shown = [Image.new("RGB", size, "white") for size in SIZES_REAL]
    batch = processor(
        text=[processor.image_token] * 3, images=[[x] for x in shown], padding=True
    ).data
    config = SimpleNamespace(model_type=name.partition(":")[0])
    tables = image_geometry(processor, config, [[image] for image in shown], batch)
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    found = [sum(int(i) == token for i in ids) for ids in batch["input_ids"]]
    assert [len(table) for table in tables] == found == list(wanted)
