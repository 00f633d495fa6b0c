"""An image for batches without one: a real forward's modules in order, and no other number."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.families.zoo import families
from benchmarks.families.zoo.first import (
    tiny_llava_model,
    tiny_llava_processor,
    tiny_qwen_processor,
)
from benchmarks.families.zoo.making import Unavailable
from groundkern.hf import GroundedExample, GroundingCollator, IdleImage, attach, has_images
from groundkern.hf.data.calling import sample
from groundkern.hf.data.idle_image import BY_IMAGE, UNFIT
from groundkern.hf.data.processor import marks_prefix
from tests.hf.closeness import assert_same_gradients, gradients
from tests.hf.methods import METHODS
from tests.hf.samples import SAMPLES, make_batch

ZOO = families()
# DeepStack, tiles of which black ones are left out, a prefix that sees itself, images as codes
QUICK = ("qwen3_vl", "idefics3", "paligemma", "chameleon")
# refused by attach: another kind of forward, resamplers, crossing attention; or no chat template
OTHERS = ("aria", "fuyu", "got_ocr2", "pp_chart2table", "qwen4_exp")
NAMES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.long)
    for name, family in ZOO.items()
    if family.processor is not None and name not in {*OTHERS, *UNFIT}
]
TEXT = SAMPLES["qwen"][2]


def made(name: str):
    try:
        return ZOO[name].processor(), ZOO[name].model().train()
    except (ValueError, Unavailable) as error:
        pytest.skip(str(error))


def text_batch(processor) -> dict[str, Tensor]:
    """Two texts of unlike lengths that are trained, for whose tokens no router of the zoo has two
    experts within rounding of each other: it would choose another beside an image."""
    texts = ["Read the word.", "How much coal was mined in 1862? The chart shows 65 million tons."]
    batch = dict(processor.tokenizer(texts, padding=True, return_tensors="pt"))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if marks_prefix(processor):
        types = (torch.arange(labels.shape[1]) >= 3).long()
        batch["token_type_ids"] = types.expand_as(labels).clone()
        labels[:, :3] = -100
    return {**batch, "labels": labels}


def calls(model: nn.Module, batch: dict) -> tuple[list[str], Tensor]:
    """The modules with weights of their own in the order of their calls, and the loss."""
    seen: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        return seen, model(**batch).loss
    finally:
        for hook in hooks:
            hook.remove()


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    return {**batch, "labels": batch["input_ids"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_calls_what_it_calls_for_images_and_nothing_else_changes(name):
    processor, model = made(name)
    alone = text_batch(processor)
    idle = IdleImage(processor, model.config, sharded=name not in BY_IMAGE)(alone)
    loss = calls(model, alone)[1]
    wanted = gradients(model, loss)
    found, loss_beside = calls(model, idle)
    torch.testing.assert_close(loss_beside, loss, rtol=1e-6, atol=0)
    beside = gradients(model, loss_beside)
    assert_same_gradients({k: beside[k] for k in wanted}, wanted, share=1e-5)
    for parameter in beside.keys() - wanted.keys():
        assert not beside[parameter].any(), parameter
    if name in BY_IMAGE:
        return
    picture = Image.effect_noise((120, 90), 80).convert("RGB")
    real, loss = calls(model, with_labels(sample(processor, [picture])))
    assert found == real
    assert gradients(model, loss).keys() <= beside.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", BY_IMAGE)
def test_families_that_call_other_modules_for_other_images(name):
    processor, model = made(name)
    with pytest.raises(ValueError, match=f"{name.partition(':')[0]}, which calls other modules"):
        IdleImage(processor, model.config)
    if name == "unlimited_ocr":
        pytest.skip("the tiny processor cannot make tiles")
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((200, 60), (64, 64))]
    found = [calls(model, with_labels(sample(processor, [p])))[0] for p in pictures]
    found.append(calls(model, with_labels(sample(processor, pictures)))[0])
    assert any(each != found[0] for each in found[1:])


def test_a_family_that_looks_at_attended_tokens_alone_is_refused(qwen):
    qwen.config.model_type = "hunyuan_vl"
    with pytest.raises(ValueError, match="hunyuan_vl, which looks for images among attended"):
        IdleImage(tiny_qwen_processor(), qwen.config, sharded=False)


@pytest.mark.parametrize("side", ["right", "left"])
def test_grounded_rows_stay_what_they_were(qwen, side):
    """Text rows, phrases and their maps; longer sequences where padding has no room."""
    model = attach(qwen, **METHODS["attention"]).train()
    longer = SAMPLES["qwen"][2].__class__(seed=3, pieces=(30,), answer=9)
    batch = make_batch(model, (TEXT, longer), side=side)
    idle = IdleImage(tiny_qwen_processor(), model.config)(batch)
    same = idle["input_ids"].shape == batch["input_ids"].shape
    assert same == (side == "right")
    assert has_images(idle)
    assert not has_images(batch)
    image = idle["input_ids"] == model.config.image_token_id
    assert image.any()
    assert not idle["attention_mask"][image].any()
    assert "mm_token_type_ids" not in batch
    ours, alone = model(**idle), model(**batch)
    torch.testing.assert_close(ours.loss, alone.loss, rtol=1e-6, atol=0)
    wanted = gradients(model, alone.loss)
    found = gradients(model, ours.loss)
    assert_same_gradients({k: found[k] for k in wanted}, wanted, share=1e-5)
    tower = found.keys() - wanted.keys()
    assert len(tower) == len(list(model.model.visual.parameters()))
    assert not any(found[name].any() for name in tower)


def test_packed_rows_get_a_document_more():
    llava = tiny_llava_model()
    processor = tiny_llava_processor()
    ids = torch.arange(20, 46).view(2, 13)
    positions = torch.cat((torch.arange(5), torch.arange(8))).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    idle = IdleImage(processor, llava.config)(batch)
    assert "attention_mask" not in idle
    more = idle["input_ids"].shape[1] - 13
    assert torch.equal(idle["position_ids"][:, 13:], torch.arange(more).expand(2, -1))
    assert (idle["labels"][:, 13:] == -100).all()
    alone = llava.train()(**batch).loss
    torch.testing.assert_close(llava(**idle).loss, alone, rtol=1e-5, atol=0)


def test_packed_rows_whose_router_would_count_the_image_are_refused(qwen):
    qwen.config.text_config.output_router_logits = True
    idle = IdleImage(tiny_qwen_processor(), qwen.config)
    ids, positions = torch.arange(20, 33)[None], torch.arange(13)[None]
    assert has_images(idle({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    with pytest.raises(ValueError, match="`output_router_logits`: expected False for packed rows"):
        idle({"input_ids": ids, "position_ids": positions})


def test_an_input_that_is_none_is_no_image():
    assert not has_images({"pixel_values": None, "input_ids": torch.ones(1, 4)})


def test_positions_of_three_axes_and_a_batch_without_a_mask(qwen):
    idle = IdleImage(tiny_qwen_processor(), qwen.config)
    ids = torch.arange(20, 33)[None]
    alone = qwen.train()(input_ids=ids, labels=ids).loss
    made = idle({"input_ids": ids, "labels": ids})
    assert made["attention_mask"].sum() == 13
    torch.testing.assert_close(qwen(**made).loss, alone, rtol=1e-6, atol=0)
    mask, axes = torch.ones_like(ids), torch.arange(13).expand(3, 1, 13)
    given = {"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": axes}
    torch.testing.assert_close(qwen(**idle(given)).loss, alone, rtol=1e-6, atol=0)


def test_collated_text_equals_itself_beside_an_image(qwen):
    processor = tiny_qwen_processor()
    messages = ({"role": "user", "content": "What?"}, {"role": "assistant", "content": "The grid."})
    batch = GroundingCollator(processor, qwen.config)([GroundedExample((), messages)])
    model = attach(qwen, **METHODS["attention"])
    found = model(**IdleImage(processor, qwen.config)(batch)).loss
    torch.testing.assert_close(found, model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.zeros(1)}, "`batch`: expected one without images"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "`cu_seq_lens_q`: expected no lengths"),
        ({"seq_idx": torch.zeros(1, 4)}, "`seq_idx`: expected only input_ids, attention_mask"),
    ],
)
def test_other_batches_are_refused(qwen, inputs, message):
    idle = IdleImage(tiny_qwen_processor(), qwen.config)
    with pytest.raises(ValueError, match=message):
        idle({"input_ids": torch.ones(1, 4, dtype=torch.int64), **inputs})
