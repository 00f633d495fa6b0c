"""Weights of regions, words, phrases and samples, from an example to its batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from groundkern.hf import Phrase, Word, row_counts
from groundkern.hf.data.batch import COUNTS
from groundkern.hf.data.regions import spread
from groundkern.hf.data.weights import GROUPS
from groundkern.maps import dequantise, patch_grid, target_map, with_floor
from tests.hf.collating import live, make_collator, make_example, make_region, token_bytes

ANSWER = "The red patch is in row 2"
CORNER, OTHER = (0.0, 0.0, 0.2, 0.25), (0.8, 0.75, 1.0, 1.0)
SUPERVISION = {
    "regions": (
        make_region(ANSWER, "red patch", boxes=(CORNER,), weight=0.5),
        make_region(ANSWER, "patch is", boxes=(OTHER,), weight=2.0),
        make_region(ANSWER, "row", boxes=(OTHER,), weight=0.0),
    ),
    "words": (
        Word("red", (0.05, 0.05, 0.15, 0.2), 0, weight=3.0),
        Word("is", (0.05, 0.05, 0.16, 0.2), 0, weight=0.0),  # on the same visual token
        Word("row", (0.45, 0.05, 0.55, 0.2), 0),
        Word("in", (0.45, 0.05, 0.56, 0.2), 0, weight=1.5),
    ),
    "phrases": (
        Phrase(1, 0, 25, weight=4.0),
        Phrase(1, 0, 13, weight=0.25),
        Phrase(1, 20, 25),
    ),
}


def example(**changes):
    return make_example(ANSWER, **(SUPERVISION | changes))


def without_weightless(**changes):
    """The example without what has weight 0."""
    kept = {kind: tuple(x for x in parts if x.weight) for kind, parts in SUPERVISION.items()}
    return make_example(ANSWER, **(kept | changes))


def weights_by_word(collator, batch, group: str) -> dict[str, float]:
    at = batch[f"gk_{group}_position"][0]
    rows = at[at >= 0]
    pieces = token_bytes(collator, batch, 0, [row + 1 for row in rows])
    weights = batch[f"gk_{group}_weight"][0][at >= 0].tolist()
    return dict(zip((piece.strip().decode() for piece in pieces), weights, strict=True))


def test_a_row_has_the_largest_weight_of_what_meets_on_it():
    options = {"map_rows": "phrase_predictor", "on_shared_token": "several"}
    collator = make_collator(lens=True, **options)
    batch = collator([example()])
    assert weights_by_word(collator, batch, "side") == {"red": 0.5, "patch": 2.0, "is": 2.0}
    assert weights_by_word(collator, batch, "map") == {"red": 0.5, "patch": 2.0, "is": 2.0}
    assert batch["gk_word_weight"].tolist() == [[3.0, 1.5]]
    number = live(batch["gk_phrase_number"][0])
    found = zip(number, batch["gk_phrase_weight"][0].tolist())
    assert dict(found) == {0: 4.0, 1: 0.25, 2: 1.0}
    labels = zip(batch["gk_lens_label"][0].tolist(), batch["gk_lens_weight"][0].tolist())
    assert sorted(dict(labels).values()) == [0.5, 2.0]
    counts = collator.counts
    assert (counts["regions"], counts["regions_gated"], counts["regions_outside"]) == (3, 1, 0)
    assert (counts["words"], counts["words_gated"], counts["phrases_gated"]) == (4, 1, 0)


def test_what_has_weight_zero_is_as_if_it_were_not_there():
    """Also a composite's part, and regions of the same words and concepts."""
    collator = make_collator(lens=True, map_rows="answer")
    twin = make_region(ANSWER, "red patch", boxes=(OTHER,), weight=0.0)
    regions = (*SUPERVISION["regions"], twin)
    ours, wanted = collator([example(regions=regions)]), collator([without_weightless()])
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], x) for name, x in wanted.items())
    assert ours["gk_phrase_composite"].tolist() == [[[0, 1, 2]]]
    phrases = SUPERVISION["phrases"]
    cut = collator([example(phrases=(*phrases[:2], replace(phrases[2], weight=0.0)))])
    assert cut["gk_phrase_composite"].shape[1] == 0
    assert set(live(cut["gk_phrase_number"][0])) == {0, 1}


@pytest.mark.parametrize("pack_to", [None, 10_000])
def test_the_weight_of_a_sample_multiplies_all_its_rows(pack_to):
    collator = make_collator(lens=True, pack_to=pack_to)
    plain = collator([example(), example()])
    halved = collator([example(), example(grounding_weight=0.5)])
    for group in GROUPS:
        at = plain[f"gk_{group}_position"]
        weight = plain[f"gk_{group}_weight"]
        if pack_to is None:
            factor = torch.tensor([[1.0], [0.5]]).expand(weight.shape)
        else:
            factor = torch.ones_like(weight)
            factor[:, weight.shape[1] // 2 :] = 0.5
        assert torch.equal(halved[f"gk_{group}_weight"], weight * factor), group
        assert torch.equal(halved[f"gk_{group}_position"], at), group


def test_a_gated_sample_costs_no_row_and_keeps_its_text():
    collator = make_collator(lens=True)
    batch = collator([example(grounding_weight=0.0)])
    counts = dict(zip(COUNTS, row_counts(batch).tolist(), strict=True))
    plain = make_collator()([make_example(ANSWER)])  # without supervision
    assert counts == dict(zip(COUNTS, row_counts(plain).tolist(), strict=True))
    assert counts["text"] > 0
    assert all(batch[f"gk_{group}_position"].shape[1] == 0 for group in GROUPS)
    assert torch.equal(batch["gk_text_position"], plain["gk_text_position"])
    found = collator.counts
    assert (found["regions_gated"], found["words_gated"], found["phrases_gated"]) == (3, 4, 3)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 2e9])
@pytest.mark.parametrize("kind", ["regions", "words", "phrases", "grounding_weight"])
def test_bad_weights_are_refused_by_name(kind, weight):
    if kind == "grounding_weight":
        bad, where = example(grounding_weight=weight), "grounding_weight"
    else:
        first, *others = SUPERVISION[kind]
        bad = example(**{kind: (replace(first, weight=weight), *others)})
        where = rf"{kind}\[0\].weight"
    with pytest.raises(ValueError, match=rf"data.jsonl:7: {where}`: expected a number in \[0, 1e"):
        bad.check()


def test_evidence_is_a_mixture_of_bells_by_hand():
    """Four tokens in a row, the box over all of them: sigma is a token, edges at 2, 1 and 0 sigma.

    Phi(-1) - Phi(-2) = .135905 and Phi(0) - Phi(-1) = .341345, of .954500 within the image:
    .142384 and .357616; with a floor of .1: .9 * .142384 + .025 = .153146 and .346854. A second box
    lies in the first token with all of its mass: (.142384 + 1) / 2 = .571192.
    """
    rects = patch_grid(1, 4)
    whole = target_map(rects, kind="evidence", boxes=[(0, 0, 1, 1)])
    assert whole.tolist() == pytest.approx([0.142384, 0.357616, 0.357616, 0.142384], abs=1e-6)
    floored = with_floor(whole, rects, 0.1)
    assert floored.tolist() == pytest.approx([0.153146, 0.346854, 0.346854, 0.153146], abs=1e-6)
    boxes = [(0, 0, 1, 1), (0.0, 0.0, 0.1, 0.1)]
    two = target_map(rects, kind="evidence", boxes=boxes).tolist()
    assert two == pytest.approx([0.571192, 0.178808, 0.178808, 0.071192], abs=1e-6)


def test_evidence_of_points_lines_and_tokens_without_a_place():
    rects = torch.cat([patch_grid(1, 4), torch.full((1, 4), -1.0)])
    point = target_map(rects, kind="evidence", points=[(0.3, 0.5)])
    assert point.tolist() == pytest.approx([0, 1, 0, 0, 0], abs=1e-9)
    line = target_map(rects, kind="evidence", polylines=[[(0.0, 0.5), (0.375, 0.5)]])
    assert line.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=1e-6)
    both = target_map(
        rects, kind="evidence", points=[(0.8, 0.5)], polylines=[[(0.0, 0.5), (0.375, 0.5)]]
    )
    assert both.tolist() == pytest.approx([1 / 3, 1 / 6, 0, 0.5, 0], abs=1e-6)
    assert with_floor(point, rects, 1.0).tolist() == pytest.approx([0.25] * 4 + [0], abs=1e-6)
    nothing = torch.zeros(5)
    assert torch.equal(with_floor(nothing, rects, 0.5), nothing)  # no target stays none
    assert with_floor(point, rects, 0.0) is point
    with pytest.raises(ValueError, match="floor"):
        with_floor(point, rects, 1.5)


def test_rows_of_a_long_answer_are_capped_evenly():
    assert spread(list(range(10)), 3) == [1, 5, 8]  # middles of 0-3.3, 3.3-6.7 and 6.7-10
    assert spread([4, 5], 3) == [4, 5]
    assert spread(list(range(7)), 1) == [3]
    whole = make_collator(map_rows="answer")([example()])
    collator = make_collator(map_rows="answer", max_map_rows=4)
    few = collator([example()])
    rows = live(whole["gk_map_position"][0])
    assert live(few["gk_map_position"][0]) == spread(rows, 4)
    assert collator.counts["map_rows_left_out"] == len(rows) - 4
    assert collator.counts["map_rows"] == 4


def test_a_collator_makes_targets_of_ease():
    """The mixture over the tokens of the image, with a floor, of both regions that count."""
    collator = make_collator(map_kind="evidence", map_floor=0.1, map_rows="answer")
    batch = collator([example()])
    rects = collator.geometry([example().images], dict(batch))[0][:, 1:]
    wanted = target_map(rects, kind="evidence", boxes=[CORNER, OTHER])
    wanted = with_floor(wanted, rects, 0.1)
    found = dequantise(batch["gk_map_target"][0])
    assert len(found) > 4
    torch.testing.assert_close(found, wanted.expand(found.shape), rtol=1e-4, atol=1e-6)
    assert float(found.min()) >= 0.0999 / len(rects)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"map_floor": 1.5}, "map_floor"), ({"max_map_rows": 0}, "max_map_rows")],
)
def test_options_out_of_range_are_refused(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        make_collator(**options)
