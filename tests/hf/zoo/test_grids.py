"""Families that lay a grid over an image: places of tokens, batches, and what training does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.families.examining import examined
from benchmarks.families.seeing import process, visual_tokens, without_attention
from benchmarks.families.zoo import grids, qwens
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundedExample, GroundingCollator, Region
from groundkern.hf.data.calling import REPORTS
from groundkern.hf.data.geometry import check_family, image_geometry
from groundkern.hf.model.logit_rule import logit_rule
from tests.hf.painting import check, seeded

ZOO = qwens.FAMILIES | grids.FAMILIES
SIZES = ((150, 97), (61, 170), (75, 52))
# one for each image processor, kind of grid and need of the collator; the others are long
QUICK = (
    "qwen2_vl",
    "qwen2_5_omni_thinker",
    "dots3_note",
    "glm4v",
    "glm5_next",
    "ernie4_5_vl_moe",
    "video_llama_3",
    "paddleocr_vl",
    "hunyuan_vl",
    "kimi_k25",
    "cosmos3_edge",
    "minimax_m3_vl",
)
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in ZOO]
# refused for a layer that is not softmax attention over all keys
MIXED = ("qwen3_5", "qwen3_5_moe", "qwen4_exp", "glm5_next", "dots3_note", "minimax_m3_vl")
# doctor asks for rows of logits that the first three forwards do not leave out; HunYuan's RoPE is
# called dynamic, and is not
REFUSED_BY_DOCTOR = (
    "qwen2_5_omni_thinker",
    "qwen3_omni_moe_thinker",
    "video_llama_3",
    "hunyuan_vl",
)


def made(name: str, **settings):
    """A family's processor and model."""
    try:
        check_family(name)
        return ZOO[name].processor(**settings), ZOO[name].model()
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    """A family's processor, and its model without vision attention."""
    processor, model = made(request.param)
    return processor, without_attention(model)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_change_where_the_table_says(family, size):
    check(*family, size, seeded())


@pytest.mark.parametrize("size", [(31, 22), (420, 260), (23, 300)], ids=str)
def test_glm5_enlarges_small_images_and_shrinks_large_ones(size):
    """In the upper left corner of a grid: the rest of it is black, and beyond the image."""
    processor, model = made("glm5_next")
    table = check(processor, without_attention(model), size, seeded())
    assert table[:, 3:].amax() >= 1.0


# (950, 1256), (31, 639), (1, 1): visual tokens with every setting of the processor at its default
COUNTS = {
    "qwen2_vl": (1271, 23, 4),
    "glm4v": (1530, 23, 9),
    "glm5_next": (1530, 46, 16),
    "ernie4_5_vl_moe": (1530, 23, 4),
    "video_llama_3": (5084, 92, 16),
    "paddleocr_vl": (1530, 252, 196),
    "hunyuan_vl": (1211, 367, 274),
    "cosmos3_edge": (1170, 74, 64),
}


@pytest.mark.parametrize("name", COUNTS)
def test_default_settings(name):
    """The places cover all of an image once, whatever its shape."""
    processor, model = made(name)
    kind = type(processor.image_processor)
    processor.image_processor = kind()
    for size, count in zip([(950, 1256), (31, 639), (1, 1)], COUNTS[name]):
        if size != (1, 1) or REPORTS:  # transformers 5.1 takes 1 x 1 x 3 for a single channel
            assert _covered(processor, model.config, size) == count
    # PaddleOCR-VL's of transformers 5.1 has other names for its limits
    if name in ("qwen2_vl", "ernie4_5_vl_moe") or (name == "paddleocr_vl" and REPORTS):
        processor.image_processor = kind(size={"shortest_edge": 784, "longest_edge": 20 * 784})
        assert _covered(processor, model.config, (950, 1256)) == 15


def _covered(processor, config, size) -> int:
    """Visual tokens of an image, whose places add up to it."""
    image = Image.new("RGB", size)
    batch = process(processor, [image])
    (table,) = image_geometry(processor, config, [[image]], batch)
    assert len(table) == int((batch["input_ids"] == config.image_token_id).sum())
    x0, y0, x1, y1 = table[table[:, 1] >= 0, 1:].clamp(0, 1).T
    assert float(((x1 - x0) * (y1 - y0)).sum()) == pytest.approx(1.0)
    return len(table)


def test_too_narrow_an_image_is_named():
    processor, model = made("qwen2_vl")
    example = replace(_example((2, 500)), name="data.jsonl:7")
    with pytest.raises(ValueError, match=r"data\.jsonl:7.*aspect ratio must be smaller than 200"):
        GroundingCollator(processor, model.config)([_example((75, 52)), example])


def test_several_images_with_text_between(family):
    """A spot on the second image changes its tokens alone, and where the table says."""
    processor, model = family
    first = Image.new("RGB", (150, 97), "white")
    blank = Image.new("RGB", (100, 120), "white")
    spotted = blank.copy()
    ImageDraw.Draw(spotted).rectangle((60, 70, 79, 89), fill="black")
    batch = process(processor, [first, blank, first, spotted], each=2)
    tables = image_geometry(processor, model.config, [[first, blank], [first, spotted]], batch)
    seen = visual_tokens(model, batch)
    assert torch.equal(tables[0], tables[1])
    assert len(tables[0]) == seen.shape[1]
    (changed,) = ((seen[1] - seen[0]).norm(dim=-1) > 1e-3).nonzero(as_tuple=True)
    image, x0, y0, x1, y1 = tables[0][changed].T
    assert image.unique().tolist() == [1.0]
    reach = 3.0  # pixels that resampling mixes
    assert ((x0 * 100 < 80 + reach) & (x1 * 100 > 60 - reach)).all()
    assert ((y0 * 120 < 90 + reach) & (y1 * 120 > 70 - reach)).all()
    covered = (x1.clamp(max=0.8) - x0.clamp(min=0.6)) * (y1.clamp(max=0.75) - y0.clamp(min=0.5833))
    assert covered.clamp(min=0).sum() > 0.9 * 0.2 * 0.1667


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_samples_are_those_of_each_alone(family, side):
    """A batch of sequences of several lengths, with one, two and no images and text around them."""
    processor, model = family
    processor.tokenizer.padding_side = side
    collator = GroundingCollator(processor, model.config)
    examples = [_example(), _example((61, 170), (150, 97)), _example((75, 52))]
    together = collator(examples)
    grown = together["attention_mask"].sum(1).tolist()
    assert len(set(grown)) == 3
    for row, example in enumerate(examples):
        alone = collator([example])
        real = together["attention_mask"][row].bool()
        for name in collator_fields(alone):
            assert torch.equal(together[name][row][real], alone[name][0]), name
        image = together["gk_image"][row]
        ids = together["input_ids"][row]
        assert torch.equal(image >= 0, ids == model.config.image_token_id)
        assert image[image >= 0].unique().tolist() == list(range(len(example.images)))
    processor.tokenizer.padding_side = "right"


def collator_fields(batch) -> list[str]:
    """Names of the tensors with one entry per token."""
    shape = batch["input_ids"].shape
    return [name for name, x in batch.items() if x.shape == shape]


def _example(*sizes) -> GroundedExample:
    answer = "The red patch is in row 2."
    images = tuple(Image.new("RGB", size, "white") for size in sizes)
    parts = [{"type": "text", "text": "Read the word."}]
    for _ in images:
        parts += [{"type": "image"}, {"type": "text", "text": "Where is it?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    start = answer.index("red patch")
    regions = [
        Region(1, start, start + 9, image, boxes=((0.0, 0.0, 0.5, 0.5),))
        for image in range(len(images))
    ]
    return GroundedExample(images, chat, tuple(regions[-1:]))


@pytest.mark.parametrize("name", NAMES)
def test_what_works_with_the_family(name):
    made(name)
    build, _, found = examined(ZOO[name])
    assert build == "ok"
    assert found.collator == "ok"
    sentences = [found.attach, found.doctor, *found.objectives.values()]
    crashes = [sentence for sentence in sentences if re.match(r"\w+Error", sentence)]
    assert not crashes, crashes
    if name not in MIXED:
        assert found.attach == "ok"
        refused = [kind for kind, sentence in found.objectives.items() if sentence != "ok"]
        assert not set(refused) - ({"smam"} if name == "hunyuan_vl" else set())
        if name not in REFUSED_BY_DOCTOR:
            assert found.doctor == "ok"


def test_hyperclovax_multiplies_its_logits():
    """By the setting by which Granite divides them."""
    _, model = made("hyperclovax_vision_v2")
    with torch.no_grad():
        out = model(torch.tensor([[7, 8, 9]]), output_hidden_states=True)
        scores = model.lm_head(out.hidden_states[-1]) * logit_rule(model).scale
    torch.testing.assert_close(scores, out.logits)
