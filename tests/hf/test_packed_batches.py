"""`GroundingCollator(pack_to=N)`: what each sample is in its row is what it is alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.families.zoo import first
from groundkern.hf import (
    Basic,
    DvSft,
    GroundingCollator,
    Hist,
    Klal,
    LogitLens,
    Margins,
    Phrase,
    Smam,
    Word,
    attach,
)
from groundkern.hf.data.batch import without_rows
from groundkern.hf.data.tokens import PER_TOKEN
from tests.hf.closeness import gradients
from tests.hf.collating import IMAGE, SMALL, make_collator, make_example, make_region
from tests.hf.meanings import meaning, meant_rows, same_tensors, supervised_rows

ANSWER = "The red patch is in row 2, column 5."
PIXELS = {"qwen": ["pixel_values", "image_grid_thw"], "llava": ["pixel_values"]}


def rich(name, *images, answer=ANSWER, **more):
    """Regions, words and phrases on the last image; other text than its neighbours have."""
    answer = f"{name}. {answer}"
    last = len(images) - 1
    regions = (
        make_region(answer, "red patch", image=last),
        make_region(answer, "column 5", image=last, boxes=((0.5, 0.5, 1, 1),)),
    )
    start = answer.index("red patch is in row 2")
    spans = ((start, start + 21), (start, start + 9), (start + 16, start + 21))
    return make_example(
        answer,
        regions if images else (),
        images=images,
        words=(Word("grid", (0.3, 0.3, 0.5, 0.5), last),) if images else (),
        phrases=tuple(Phrase(1, low, high, (low, low + 3)) for low, high in spans),
        name=name,
        **more,
    )


def mixed():
    """One, two, no and one image; the longest is not the first."""
    return [
        rich("one", IMAGE),
        rich("two", SMALL, IMAGE),
        rich("text"),
        rich("long", SMALL, answer=ANSWER + " How much coal was mined in 1854?" * 3),
    ]


def places(batch):
    """(row, start, stop) of each document; the last of a row may be its padding."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        starts = [i for i, position in enumerate(positions) if position == 0]
        found += [(row, *ends) for ends in zip(starts, [*starts[1:], len(positions)])]
    return found


def check_documents(packed, alone):
    """Each document is the batch of one sample; they come in any order.

    Returns:
        The samples in the order of the rows.
    """
    order, rows = [], 0
    tokens = {"labels", *PER_TOKEN} & packed.keys()
    for b, start, stop in places(packed):
        there = packed["input_ids"][b, start:stop]
        same = [i for i, one in enumerate(alone) if torch.equal(one["input_ids"][0], there)]
        if not same:  # padding
            assert (packed["labels"][b, start:stop] == -100).all()
            assert len(there.unique()) == 1
            continue
        (sample,) = same
        one = alone[sample]
        for name in tokens:
            assert torch.equal(packed[name][b, start:stop], one[name][0]), name
        found = meaning(packed, b, start, stop)
        assert found == meaning(one, 0, 0, stop - start)
        order.append(sample)
        rows += meant_rows(found)
    assert sorted(order) == list(range(len(alone)))
    assert rows == supervised_rows(packed)
    return order


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["qwen", "llava"])
@pytest.mark.parametrize("capacity", [140, 10**9])
def test_documents_of_rows_are_the_samples_alone(family, side, capacity):
    packing = make_collator(family, side=side, pack_to=capacity, lens=True, contrast=True)
    padding = make_collator(family, side=side, lens=True, contrast=True)
    examples = mixed()
    packed = packing(examples)
    order = check_documents(packed, [padding([example]) for example in examples])
    assert "attention_mask" not in packed
    assert packed["position_ids"].dtype == torch.int64
    together = padding([examples[i] for i in order])
    same_tensors(packed, together, PIXELS[family])
    assert packed.keys() - together.keys() == {"position_ids"}
    assert together.keys() - packed.keys() == {"attention_mask"}
    lengths = together["attention_mask"].sum(1).tolist()
    rows, width = packed["input_ids"].shape
    assert (rows == 1 and width == sum(lengths)) if capacity > 1000 else 1 < rows < 4
    assert width <= capacity
    names = ("tokens", "tokens_padded", "tokens_laid")
    counted = [packing.counts[name] for name in names]
    assert counted == [sum(lengths), 4 * max(lengths), rows * width]
    assert {n: c for n, c in packing.counts.items() if n not in names} == {
        n: c // 2 for n, c in padding.counts.items() if n not in names
    }


def test_a_batch_of_one_and_rows_of_one():
    padding = make_collator()
    examples = mixed()
    for capacity, several in ((200, examples[:1]), (135, [rich("two", IMAGE), rich("one", IMAGE)])):
        packed = make_collator(pack_to=capacity)(several)
        together = padding(several)
        check_documents(packed, [padding([each]) for each in several])
        names = [name for name in together if name != "attention_mask"]
        if len(several) == 1:
            same_tensors(packed, together, names)


def test_the_same_batch_twice_has_the_same_bits():
    collator = make_collator(pack_to=150)
    one, other = collator(mixed()), collator(mixed())
    assert one.keys() == other.keys()
    same_tensors(one, other, list(one))


def test_texts_are_cut_to_max_length_before_they_are_packed():
    padding, packing = make_collator(max_length=60), make_collator(max_length=60, pack_to=120)
    examples = [mixed()[i] for i in (0, 2, 3)]
    packed = packing(examples)
    check_documents(packed, [padding([example]) for example in examples])
    assert packing.counts["samples_truncated"] >= 1
    assert packed["input_ids"].shape[1] <= 120


def test_a_sample_that_is_longer_than_a_row_is_named():
    one, long = mixed()[0], mixed()[3]
    length = make_collator()([long])["input_ids"].shape[1]
    make_collator(pack_to=length)([one, long])
    sentence = f"`long: pack_to`: expected at least its {length} tokens, got {length - 1}"
    with pytest.raises(ValueError, match=sentence):
        make_collator(pack_to=length - 1)([one, long])
    with pytest.raises(ValueError, match="`pack_to`: expected a positive number or None, got 0"):
        make_collator(pack_to=0)
    with pytest.raises(ValueError, match="`max_length`: expected at most pack_to, which is 50"):
        make_collator(max_length=51, pack_to=50)


def test_tools_are_packed_with_their_samples():
    tool = {"type": "function", "function": {"name": "zoom", "parameters": {}}}
    examples = [replace(mixed()[0], tools=(tool,)), rich("other", SMALL)]
    packing, padding = make_collator(pack_to=10**6), make_collator()
    for processor in (packing.processor, padding.processor):
        named = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
        processor.chat_template = named + processor.chat_template
    check_documents(packing(examples), [padding([example]) for example in examples])


def test_nothing_to_learn_keeps_the_rows():
    batch = make_collator(pack_to=150)(mixed())
    blank = without_rows(batch)
    assert (blank["labels"] == -100).all()
    assert supervised_rows(blank) == 0
    same_tensors(batch, blank, ["input_ids", "position_ids", "gk_image"])
    assert (blank["gk_map_columns"] == -1).all()  # BASIC learns at every visual token


def test_a_processor_that_counts_over_the_batch_is_refused():
    """As Molmo2's, whose features point at patches of the whole batch."""
    collator = make_collator("llava", pack_to=500)
    own = collator.processor
    kind = type(own)

    class Counting(kind):
        def __call__(self, images=None, text=None, **kwargs):
            found = super().__call__(images=images, text=text, **kwargs)
            if images:
                found["patches"] = torch.arange(len(found["pixel_values"]))[:, None]
            return found

    own.__class__ = Counting
    collator([rich("one", IMAGE), rich("text")])  # one sample with images: nothing to merge
    with pytest.raises(ValueError, match=r"`processor`: expected .* got Counting, whose 'patches'"):
        collator([rich("one", IMAGE), rich("two", IMAGE)])


def test_a_feature_of_each_token_is_refused():
    collator = make_collator("llava", pack_to=500)
    own = collator.processor

    class Indexing(type(own)):
        def __call__(self, images=None, text=None, **kwargs):
            found = super().__call__(images=images, text=text, **kwargs)
            found["indices"] = [[0] * len(ids) for ids in found["input_ids"]]
            return found

    own.__class__ = Indexing
    with pytest.raises(ValueError, match=r"`processor`: .* got 'indices' of each token"):
        collator([rich("one", IMAGE)])


def assert_same_but_for_noise(own, wanted):
    """Each gradient within 1e-5 of its own largest entry and 1e-7 of the model's largest.

    The latter is rounding: in fp64 nothing is left of it (`test_in_fp64_there_is_no_noise`).
    """
    assert own.keys() == wanted.keys()
    noise = 1e-7 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        off, scale = float((own[name] - gradient).abs().max()), float(gradient.abs().max())
        assert off <= 1e-5 * scale + noise, f"{name}: {off} of {scale}"


def assert_same_in_fp64(own, wanted):
    """Each gradient within 1e-12 of the model's largest."""
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((own[name] - gradient).abs().max()) < 1e-12 * largest, name


def padded_and_packed(family, dtype, basic=None):
    """Parts of the loss and gradients of the same samples, padded and in rows."""
    model, processor = first.FAMILIES[family].model().to(dtype), first.FAMILIES[family].processor()
    attach(
        model,
        smam=Smam(),
        dv_sft=DvSft(),
        klal=Klal(),
        hist=Hist(),
        margins=Margins(mean_margin=10.0),
        logit_lens=LogitLens(),
        basic=basic,
    )
    found = []
    for pack_to in (None, 150):
        batch = GroundingCollator(processor, model.config, lens=True, pack_to=pack_to)(mixed())
        floats = {name: x.to(dtype) for name, x in batch.items() if x.is_floating_point()}
        output = model(**(batch | floats))
        found.append((output.parts, gradients(model, output.loss), len(batch["input_ids"])))
    (parts, wanted, rows), (own_parts, own, own_rows) = found
    assert own_rows < rows
    assert parts.keys() == own_parts.keys()
    assert all(float(part) > 0 for part in parts.values()), parts
    return parts, own_parts, wanted, own


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.long)])
def test_losses_and_gradients_are_those_of_the_padded_batch(family):
    parts, own_parts, wanted, own = padded_and_packed(family, torch.float32)
    for name, part in parts.items():
        assert float(own_parts[name]) == pytest.approx(float(part), rel=1e-5), name
    assert_same_but_for_noise(own, wanted)


def test_in_fp64_there_is_no_noise():
    """What is beyond 1e-5 of a gradient's largest entry in fp32 (with BASIC 3e-5 of the vision
    tower's first q_proj.weight) is rounding: in fp64 it is not there."""
    parts, own_parts, wanted, own = padded_and_packed("llava", torch.float64, Basic())
    for name, part in parts.items():
        assert float(own_parts[name]) == pytest.approx(float(part), rel=1e-12), name
    assert_same_in_fp64(own, wanted)
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert float((own[name] - wanted[name]).abs().max() / wanted[name].abs().max()) < 1e-12
