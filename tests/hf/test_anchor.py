"""The anchor token: its rows, its targets, and how it comes into a model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken

from benchmarks.families.zoo.first import tiny_qwen_model
from groundkern.hf import add_tokens
from groundkern.hf.data.collator import GroundingCollator
from groundkern.maps import patch_grid, target_map
from tests.hf.collating import (
    PROCESSORS,
    SMALL,
    TOP_LEFT,
    live,
    make_config,
    make_example,
    make_region,
)

ANCHOR = "<ANCHOR>"
ANSWER = f"click({ANCHOR}) on the patch"


def anchored(*, special: bool = False, **options) -> GroundingCollator:
    processor = PROCESSORS["qwen"]()
    processor.tokenizer.add_tokens([AddedToken(ANCHOR, special=special, normalized=False)])
    options = {"map_rows": "anchor", "anchor_token": ANCHOR, **options}
    return GroundingCollator(processor, make_config("qwen"), **options)


def rows_of(batch: dict, b: int = 0) -> list[str]:
    """What is in the map rows: the ids of their own tokens."""
    return batch["input_ids"][b][batch["gk_map_position"][b].clamp(min=0).long()].tolist()


@pytest.mark.parametrize("special", [False, True])
def test_the_row_is_the_anchors_own(special):
    collator = anchored(special=special, query_tokens=True)
    region = make_region(ANSWER, "patch")
    batch = collator([make_example(ANSWER, [region])])
    anchor = collator.processor.tokenizer.convert_tokens_to_ids(ANCHOR)
    assert rows_of(batch) == [anchor]
    assert batch["gk_map_token_position"].tolist() == batch["gk_map_position"].tolist()
    row, last = int(batch["gk_map_position"][0, 0]), int(batch["gk_map_columns"][0, -1])
    assert live(batch["gk_query_position"][0, 0]) == list(range(last + 1, row))
    assert anchor in batch["labels"][0].tolist()  # the anchor has its own text loss


def test_a_region_whose_text_has_an_anchor_supervises_that_one():
    answer = f"first {ANCHOR} then {ANCHOR}"
    first = make_region(answer, ANCHOR, boxes=(TOP_LEFT,))
    second = make_region(answer, "then", boxes=((0.8, 0.75, 1, 1),))
    batch = anchored(map_kind="overlap")([make_example(answer, [first, second])])
    before, behind = batch["gk_map_target"][0]
    assert len(set(batch["gk_map_position"][0].tolist())) == 2
    assert before.nonzero().flatten().tolist() == [0]
    assert behind.nonzero().flatten().tolist() == [19]


def test_samples_have_as_many_query_tokens_as_they_have():
    near = make_example(ANCHOR, [make_region(ANCHOR, ANCHOR)], images=(SMALL,))
    far = make_example(ANSWER, [make_region(ANSWER, "patch")])
    collator = anchored(query_tokens=True)
    apart = [collator([each])["gk_query_position"] for each in (near, far)]
    both = collator([near, far])
    widths = [int((each >= 0).sum()) for each in apart]
    assert widths[0] < widths[1]
    assert (both["gk_query_position"] >= 0).sum(-1).flatten().tolist() == widths
    packed = anchored(query_tokens=True, pack_to=1000)([near, far])
    found = [live(row) for row in packed["gk_query_position"][0]]
    ids = [packed["input_ids"][0][each].tolist() for each in found]
    wanted = [
        collator([each])["input_ids"][0][live(q[0, 0])].tolist()
        for each, q in zip((near, far), apart, strict=True)
    ]
    assert sorted(ids) == sorted(wanted)


def test_an_anchor_is_asked_for_and_missed_by_name():
    plain = "The red patch."
    with pytest.raises(ValueError, match=r"data.jsonl:7: messages\[1\]`: expected the anchor"):
        anchored()([make_example(plain, [make_region(plain, "patch")])])
    with pytest.raises(ValueError, match=r"anchor_token.*'<OTHER>'"):
        anchored(anchor_token="<OTHER>")
    with pytest.raises(ValueError, match="anchor_token"):
        anchored(anchor_token=None)
    cut = anchored(max_length=30)
    cut([make_example("word " * 40 + ANCHOR, [make_region("word " * 40, "word")])])
    assert cut.counts["map_rows_truncated"] == 1


def test_the_target_is_overlap_times_a_bell_about_the_centre():
    # 4 x 2 tokens of 28 px. The box (14, 0, 84, 28): b_w = 70, b_h = 28, centre (49, 14).
    # overlap: 14/28, 1, 1, 0 in the upper row. Centres x: 14, 42, 70; all at y = 14.
    # sigma_x = .8 * 70 = 56: distances 35, 7, 21 give exp(-.1953125), exp(-.0078125),
    # exp(-.0703125); y has distance 0.
    rects = patch_grid(2, 4)
    box = (14 / 112, 0, 84 / 112, 0.5)
    found = target_map(rects, kind="centre", boxes=[box])
    values = [0.5 * math.exp(-0.1953125), math.exp(-0.0078125), math.exp(-0.0703125), 0.0]
    wanted = torch.tensor([v / sum(values) for v in values] + [0.0] * 4)
    torch.testing.assert_close(found, wanted)
    narrow = target_map(rects, kind="centre", boxes=[box], sigma=0.1)  # 7 px
    values = [0.5 * math.exp(-12.5), math.exp(-0.5), math.exp(-4.5)]
    torch.testing.assert_close(narrow[:3], torch.tensor([v / sum(values) for v in values]))
    assert not target_map(rects, kind="centre", boxes=[(2.0, 2.0, 3.0, 3.0)]).any()


def test_the_centre_of_shapes_other_than_one_box():
    rects = patch_grid(4, 4)
    point = target_map(rects, kind="centre", points=[(0.3, 0.3)])
    assert point.nonzero().flatten().tolist() == [5]
    square = [(0.1, 0.1), (0.6, 0.1), (0.6, 0.6), (0.1, 0.6)]
    box = target_map(rects, kind="centre", boxes=[(0.1, 0.1, 0.6, 0.6)])
    torch.testing.assert_close(target_map(rects, kind="centre", polygons=[square]), box)
    line = target_map(rects, kind="centre", polylines=[[(0.0, 0.125), (1.0, 0.125)]])
    assert line.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert line[1] == line[2] > line[0]
    # two boxes, one token each: the higher value of the two counts, and both are at their centres
    two = target_map(rects, kind="centre", boxes=[(0, 0, 0.25, 0.25), (0.75, 0.75, 1, 1)])
    torch.testing.assert_close(two[[0, 15]], torch.tensor([0.5, 0.5]))
    thin = target_map(rects, kind="centre", boxes=[(0.1, 0.24, 0.15, 0.24001)])
    assert thin.nonzero().flatten().tolist() == [0]  # its bell is not narrower than a token sees


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_is_the_mean_of_those_that_were_there(tied):
    model, tokenizer = tiny_qwen_model(tied=tied), PROCESSORS["qwen"]().tokenizer
    names = [model.get_input_embeddings, model.get_output_embeddings]
    before = [each().weight.clone() for each in names]
    known = len(tokenizer)
    (new,) = add_tokens(model, tokenizer, [ANCHOR])
    assert new == known == len(tokenizer) - 1
    for each, old in zip(names, before, strict=True):
        assert each().weight.requires_grad
        assert torch.equal(each().weight[:known], old[:known])
        torch.testing.assert_close(each().weight[new], old[:known].mean(0))
    assert tokenizer(f"a{ANCHOR}b", add_special_tokens=False)["input_ids"][1] == new
    assert ANCHOR in tokenizer.decode([new], skip_special_tokens=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[new] = 7.0  # as if trained
    assert add_tokens(model, tokenizer, [ANCHOR]) == [new]
    assert add_tokens(model, SimpleNamespace(tokenizer=tokenizer), [ANCHOR]) == [new]
    assert model.get_input_embeddings().weight[new].eq(7.0).all()
    with pytest.raises(ValueError, match="white space"):
        add_tokens(model, tokenizer, [" x"])


def test_rows_that_a_model_has_to_spare_are_used():
    tokenizer = PROCESSORS["qwen"]().tokenizer
    model = tiny_qwen_model()
    model.resize_token_embeddings(len(tokenizer) + 30)
    known = len(tokenizer)
    old = model.get_output_embeddings().weight.detach().clone()
    (new,) = add_tokens(model, tokenizer, [ANCHOR])
    assert len(model.get_output_embeddings().weight) == known + 30
    torch.testing.assert_close(model.get_output_embeddings().weight[new], old[:known].mean(0))
