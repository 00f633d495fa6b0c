"""Regions with shares and bells in a batch: map targets of images and of videos, sets of tokens."""

from __future__ import annotations

import pytest
import torch

from groundkern import maps, maps_in_time
from groundkern.hf.data.example import Raster, Region
from groundkern.hf.data.moments import moments_of
from groundkern.maps import dequantise, patch_grid, target_map
from tests.hf.collating import make_collator, make_example, make_region
from tests.hf.test_video_regions import CLIP, CORNER, collator, region
from tests.hf.videos import asked

ANSWER = "The red patch is in row 2"
GRID = patch_grid(4, 5)  # of the image of `make_example`
LEFT, RIGHT = (0.0, 0.0, 0.2, 0.25), (0.8, 0.75, 1.0, 1.0)  # the first and the last token


def target_of(*regions: Region, **options) -> torch.Tensor:
    """The one map target of a batch, as a distribution."""
    options = {"map_kind": "overlap", **options}
    batch = make_collator(**options)([make_example(ANSWER, list(regions))])
    assert int((batch["gk_map_position"] >= 0).sum()) == 1
    return dequantise(batch["gk_map_target"][0, 0])


def test_shares_are_parts_of_the_target():
    """Shares 3 and none, which is 1: three quarters and one; two tokens of a region halve its."""
    two = make_region(ANSWER, "row", boxes=((0.6, 0.75, 1.0, 1.0),))
    one = make_region(ANSWER, "red", boxes=(LEFT,), share=3.0)
    found = target_of(one, two)
    assert found[0].item() == pytest.approx(0.75, abs=1e-6)
    assert found[-2:].tolist() == pytest.approx([0.125] * 2, abs=1e-6)
    assert float(found.sum()) == pytest.approx(1)
    mixed = target_of(one, two, map_kind="neighbours")
    each = [target_map(GRID, boxes=r.boxes) for r in (one, two)]
    torch.testing.assert_close(mixed, maps.mixed(torch.stack(each), [3, 1]), rtol=0, atol=1e-6)


def test_without_shares_the_union_is_one_target_and_a_share_alone_changes_nothing():
    boxes = {"row": (LEFT,), "red": (RIGHT, (0.4, 0.25, 0.6, 0.5))}
    plain = [make_region(ANSWER, word, boxes=b) for word, b in boxes.items()]
    wanted = target_map(GRID, boxes=[box for b in boxes.values() for box in b])
    batch = make_collator()([make_example(ANSWER, plain)])
    assert torch.equal(batch["gk_map_target"][0, 0], maps.quantise(wanted))
    alone = target_of(make_region(ANSWER, "row", boxes=(LEFT, RIGHT), share=9.0))
    assert torch.equal(alone, target_of(make_region(ANSWER, "row", boxes=(LEFT, RIGHT))))


def test_shares_concern_the_regions_of_a_phrase_alone_and_no_sets():
    both = [make_region(ANSWER, "row", boxes=(box,), share=share)
            for box, share in ((LEFT, 1.0), (RIGHT, 4.0))]  # fmt: skip
    other = make_region(ANSWER, "red", boxes=((0.4, 0.25, 0.6, 0.5),), share=100.0)
    example = make_example(ANSWER, [*both, other])
    batch = make_collator(map_rows="phrase", map_kind="overlap")([example])
    targets = dequantise(batch["gk_map_target"][0])
    ends = [targets[i, [0, -1]].tolist() for i in range(len(targets))]
    assert ends[0] == [0, 0]
    assert ends[-1] == pytest.approx([0.2, 0.8], abs=1e-6)
    plain = [Region(**{**vars(r), "share": None}) for r in example.regions]
    again = make_collator()([make_example(ANSWER, plain)])
    shared = make_collator()([example])
    for name in ("gk_side_inside", "gk_side_set", "gk_side_position"):
        assert torch.equal(shared[name], again[name])


def test_bells_are_the_target_and_their_half_height_the_set():
    bells = ((0.5, 0.5, 0.1, 0.1), (0.1, 0.1, 0.05, 0.2))
    heat = make_region(ANSWER, "row", boxes=(), bells=bells)
    for kind in ("neighbours", "overlap"):
        found = target_of(heat, map_kind=kind)
        torch.testing.assert_close(found, target_map(GRID, bells=bells), rtol=0, atol=1e-6)
    batch = make_collator()([make_example(ANSWER, [heat])])
    inside = batch["gk_side_inside"][0, 0, batch["gk_map_columns"][0].long()]
    assert torch.equal(inside, maps.inside(GRID, bells=bells))
    assert 0 < int(inside.sum()) < 20


@pytest.mark.parametrize("kind", ["neighbours", "uniform", "overlap", "gaussian", "evidence"])
def test_bells_of_a_video_are_the_target_of_whatever_kind(kind):
    bells = region(time=(2.0, 3.0), bells=((0.5, 0.5, 0.1, 0.1), (0.9, 0.1, 0.02, 0.02)))
    batch = collator(map_kind=kind)([asked((), (CLIP,), (bells,))])
    found = dequantise(batch["gk_map_target"][0, 0]).view(3, 12)
    wanted = torch.zeros(3, 12)
    wanted[1] = target_map(patch_grid(3, 4), bells=bells.bells)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_shares_and_bells_in_a_video():
    """Two intervals of one second, a step each: 1 of 5 and 4 of 5, whatever is in them."""
    first = region(time=(0.0, 1.0), boxes=(CORNER,), share=1.0)
    second = region(time=(4.0, 5.0), bells=((0.5, 0.5, 0.1, 0.1),), share=4.0)
    make = collator(map_kind="overlap")
    batch = make([asked((), (CLIP,), (first, second))])
    found = dequantise(batch["gk_map_target"][0, 0]).view(3, 3, 4)
    assert found.sum((1, 2)).tolist() == pytest.approx([0.2, 0, 0.8], abs=1e-6)
    bell = target_map(patch_grid(3, 4), bells=second.bells).view(3, 4)
    torch.testing.assert_close(found[2], 0.8 * bell, rtol=0, atol=1e-6)
    inside = batch["gk_side_inside"][0, 0, batch["gk_map_columns"][0].long()].view(3, 12)
    assert inside.any(-1).tolist() == [True, False, True]


def test_a_heat_that_changes_counts_step_by_step_on_one_scale():
    """Seconds 0 to 1: weak at the left; 2 to 3: nothing; 4 to 5: four times as much at the right;
    from 5 on nothing. A step is two frames of a second each."""
    left, right = torch.zeros(2, 3, 4)
    left[0, 0], right[2, 3] = 1.0, 4.0
    track = (
        (0.0, Raster(left, peak=4.0)),
        (2.0, None),
        (4.0, Raster(right, peak=4.0)),
        (5.0, None),
    )
    changing = region(raster_track=track)
    times = [moment.time for moment in moments_of([changing], CLIP)]
    assert times == [0.0, 1.0, 4.0]
    batch = collator()([asked((), (CLIP,), (changing,))])
    found = dequantise(batch["gk_map_target"][0, 0]).view(3, 3, 4)
    assert found[0, 0, 0].item() == pytest.approx(0.2, abs=1e-6)
    assert found[2, 2, 3].item() == pytest.approx(0.8, abs=1e-6)
    late = region(raster_track=track, time=(4.5, 4.6))  # between two frames
    (moment,) = moments_of([late], CLIP)
    assert (moment.time, moment.shapes["rasters"][0]) == (4.0, track[2][1])
    assert moments_of([region(raster_track=track[2:], time=(0.0, 2.0))], CLIP) == []
    rects, steps = patch_grid(1, 1), torch.tensor([[0.0, 6.0]])
    assert maps_in_time.target_map(rects, steps, moments_of([changing], CLIP)).tolist() == [1]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"share": 0.0}, r"regions\[0\].share`: expected a number above 0 or None, got 0.0"),
        ({"share": float("nan")}, r"regions\[0\].share`: expected a number above 0 or None"),
        ({"bells": ((0.5, 0.5, 0.0, 0.1),)}, r"regions\[0\].bells`: expected spreads above 0"),
        ({"bells": ((1.5, 0.5, 0.1, 0.1),)}, "expected points within the image"),
        ({"raster_track": ((0.0, None),)}, r"raster_track`: expected a region of a video, got one"),
        ({"time": (0.0, 1.0)}, r"regions\[0\].time`: expected a region of a video"),
    ],
)
def test_bad_regions_are_named(place, message):
    bad = make_region(ANSWER, "row", boxes=(LEFT,), **place)
    with pytest.raises(ValueError, match=message):
        make_collator()([make_example(ANSWER, [bad])])


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (((1.0, None), (1.0, None)), "raster_track`: expected seconds that ascend"),
        (((0.0, torch.ones(2, 2)),), "raster_track`: expected each a `Raster` or None"),
    ],
)
def test_bad_raster_tracks_are_named(track, message):
    with pytest.raises(ValueError, match=message):
        collator()([asked((), (CLIP,), (region(raster_track=track),))])
