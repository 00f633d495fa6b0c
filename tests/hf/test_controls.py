"""Wrong regions on purpose, grown regions, kept registers: which visual tokens they come to."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from groundkern.hf import Raster, Region, SampleRegions, Video
from groundkern.hf.data.controls import Controls
from groundkern.hf.data.moments import SHAPES
from groundkern.maps import dequantise, inside, patch_grid
from tests.hf.collating import IMAGE, make_collator, make_example, make_region
from tests.hf.test_video_regions import CLIP

ANSWER = "The red patch is in row 2"
PATCH = (0.4, 0.5, 0.6, 0.75)  # the token in column 2 and row 2 of 5 x 4
OTHERS = [
    make_example(ANSWER, [make_region(ANSWER, "red patch", boxes=(box,))], name=f"other:{i}")
    for i, box in enumerate([(0.0, 0.0, 0.2, 0.25), (0.8, 0.75, 1.0, 1.0), (0.6, 0.0, 0.8, 0.25)])
]
POOL = [SampleRegions.of(example) for example in OTHERS]
MASK = torch.zeros(112, 140, dtype=torch.bool)
MASK[56:84, 56:84] = True  # the same token

# for a process that does not import transformers
ELSEWHERE = f"""
from groundkern.hf.data.controls import Controls, SampleRegions
from groundkern.hf.data.example import GroundedExample, Region

def example(name, box):
    chat = [{{"role": "user", "content": "Where?"}}, {{"role": "assistant", "content": {ANSWER!r}}}]
    return GroundedExample((), chat, (Region(1, 4, 13, 0, boxes=(box,)),), name=name)

boxes = {[x.regions[0].boxes[0] for x in OTHERS]}
pool = [SampleRegions.of(example(f"other:{{i}}", box)) for i, box in enumerate(boxes)]
own = example("own:5", {PATCH})
print([Controls(pool, 3).regions(own, kind)[0].boxes for kind in ("random", "shuffled")])
"""


def example(name="own:1", **places):
    return make_example(ANSWER, [make_region(ANSWER, "red patch", **places)], name=name)


def tokens(batch) -> list[int]:
    """The visual tokens inside, of one set, as numbers of the grid of 5 x 4."""
    columns = batch["gk_map_columns"][0]
    return batch["gk_side_inside"][0, 0][columns].nonzero()[:, 0].tolist()


def controlled(kind, sample, **options):
    how = {"side_control": kind, "map_control": kind, "control_pool": POOL}
    return make_collator(**how, **options)([sample])


def test_shuffled_is_another_samples_region_and_not_the_own():
    names = [f"own:{i}" for i in range(12)]
    found = [tokens(controlled("shuffled", example(name, boxes=(PATCH,)))) for name in names]
    assert {tuple(each) for each in found} == {(0,), (19,), (3,)}  # each of the pool, none is 12
    own = [tokens(controlled("shuffled", each)) for each in OTHERS]
    assert all(a != b for a, b in zip(own, [[0], [19], [3]], strict=True))


def test_shuffled_moves_nothing_but_regions():
    sample = example(boxes=(PATCH,))
    plain, wrong = make_collator()([sample]), controlled("shuffled", sample)
    changed = {name for name in plain if not torch.equal(plain[name], wrong[name])}
    assert changed == {"gk_side_inside", "gk_map_target"}
    assert (wrong["gk_map_target"] == wrong["gk_map_target"].max()).sum() == 1


@pytest.mark.parametrize("only", ["side_control", "map_control"])
def test_each_control_is_of_its_own_objective(only):
    sample = example(boxes=(PATCH,))
    plain, wrong = make_collator()([sample]), make_collator(**{only: "random"})([sample])
    changed = {name for name in plain if not torch.equal(plain[name], wrong[name])}
    assert changed == {{"side_control": "gk_side_inside", "map_control": "gk_map_target"}[only]}


@pytest.mark.parametrize(
    "places",
    [
        {"boxes": (PATCH,)},
        {"boxes": (), "polygons": (((0.4, 0.5), (0.6, 0.5), (0.6, 0.75), (0.4, 0.75)),)},
        {"boxes": (), "rasters": (Raster(MASK),)},
        {"boxes": (), "rasters": (Raster(MASK.float() + 0.01),)},
        {"boxes": (), "points": ((0.5, 0.6), (0.7, 0.9))},
        {"boxes": (), "bells": ((0.5, 0.6, 0.1, 0.05),)},
        {"boxes": (), "polylines": (((0.1, 0.1), (0.3, 0.2), (0.5, 0.1)),)},
    ],
)
def test_random_keeps_the_shape_and_moves_it_within_the_image(places):
    rects = patch_grid(112, 140)  # of pixels
    sizes, spots = [], set()
    for name in "abcdefgh":
        own = example(name, **places)
        (moved,) = Controls(None, 0).regions(own, "random")
        assert (moved.turn, moved.start, moved.stop) == (1, *_span(own))
        replace(own, regions=(moved,), checked=False).check()
        covered = inside(rects, **{kind: getattr(moved, kind) for kind in SHAPES})
        sizes.append(int(covered.sum()))
        spots.add(tuple(covered.nonzero()[:3, 0].tolist()))
    own = example(**places).regions[0]
    right = inside(rects, **{kind: getattr(own, kind) for kind in SHAPES})
    assert max(sizes) <= 1.2 * int(right.sum()) + 4 and min(sizes) >= 0.8 * int(right.sum()) - 4
    assert len(spots) == 8


def _span(sample):
    return sample.regions[0].start, sample.regions[0].stop


def test_a_region_as_large_as_the_image_stays():
    (moved,) = Controls(None, 0).regions(example(boxes=((0, 0, 1, 1),)), "random")
    assert moved.boxes == ((0, 0, 1, 1),)


def test_equal_places_get_equal_ones():
    words = ("red patch", "row", "is")
    boxes = (PATCH,), (PATCH,), ((0.0, 0.0, 0.2, 0.25),)
    regions = [make_region(ANSWER, word, boxes=box) for word, box in zip(words, boxes, strict=True)]
    for kind in ("random", "shuffled"):
        made = Controls(POOL, 0).regions(make_example(ANSWER, regions), kind)
        assert made[0].boxes == made[1].boxes
        assert [r.start for r in made] == [r.start for r in regions]
    assert made[0].boxes == made[2].boxes  # the other sample has one region


def test_the_complement_is_what_the_region_does_not_cover():
    """(P's maximum - P): levels 1, .5, .001 become 0, .5, .999, on 1, 8 and 11 tokens."""
    sample = example(boxes=(PATCH,))
    batch = controlled("complement", sample)
    assert tokens(batch) == [token for token in range(20) if token != 12]
    plain = make_collator()([sample])
    found, right = (dequantise(x["gk_map_target"])[0, 0] for x in (batch, plain))
    want = right.max() - right
    torch.testing.assert_close(found, want / want.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[11] / found[0], torch.tensor(0.5 / 0.999), rtol=1e-5, atol=0)
    assert float(found[12]) == 0


def test_the_complement_of_everything_is_no_row():
    both = {"side_control": "complement", "map_control": "complement"}
    collator = make_collator(**both, map_kind="uniform")
    batch = collator([example(boxes=((0, 0, 1, 1),))])
    assert batch["gk_side_position"].shape[1] == batch["gk_map_position"].shape[1] == 0
    assert collator.counts["side_rows_without_region"]
    assert collator.counts["map_rows_without_target"]


def test_the_same_in_another_process_and_another_batch():
    sample = example("own:5", boxes=(PATCH,))
    for kind in ("shuffled", "random"):
        alone = controlled(kind, sample)
        both = make_collator(side_control=kind, map_control=kind, control_pool=POOL)(
            [OTHERS[0], sample]
        )
        at = both["gk_map_columns"][1]
        assert both["gk_side_inside"][1, 0][at].nonzero()[:, 0].tolist() == tokens(alone)
    told = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=True
    )
    own = [Controls(POOL, 3).regions(sample, kind)[0].boxes for kind in ("random", "shuffled")]
    assert told.stdout.strip() == str(own)
    assert Controls(POOL, 4).regions(sample, "random")[0].boxes != own[0]


def test_videos_move_in_space_and_time():
    track = ((1.0, (0.0, 0.0, 0.1, 0.1)), (3.0, (0.2, 0.4, 0.3, 0.5)))
    box = Region(1, 4, 7, 0, boxes=(PATCH,), video=0, time=(1.0, 2.0))
    clip = replace(make_example(ANSWER, images=()), videos=(CLIP,))
    times = set()
    for name in "abcdef":
        along = replace(box, boxes=(), time=None, tracks=(track,))
        own = replace(clip, name=name, regions=(box, along))
        moved, along = Controls(None, 0).regions(own, "random")
        assert moved.time[1] - moved.time[0] == pytest.approx(1.0)
        assert moved.time[0] >= 0 and moved.time[1] <= 6  # of six frames of a second
        (steps,) = along.tracks
        assert steps[1][0] - steps[0][0] == pytest.approx(2.0)
        assert steps[1][1][0] - steps[0][1][0] == pytest.approx(0.2)
        times.add(moved.time)
    assert len(times) == 6
    heats = ((1.0, Raster(MASK)), (2.0, None), (3.0, Raster(MASK)))
    own = replace(clip, regions=(replace(box, boxes=(), time=None, raster_track=heats),))
    (steps,) = [each.raster_track for each in Controls(None, 0).regions(own, "random")]
    assert steps[1][1] is None and steps[2][0] - steps[0][0] == pytest.approx(2.0)
    assert steps[0][1].values.sum() == MASK.sum()
    assert torch.equal(steps[0][1].values, steps[2][1].values)
    assert not torch.equal(steps[0][1].values, MASK)
    short = Video(CLIP.frames[:3], (10.0, 11.0, 12.0))  # 3 s against 6: times are halved
    other = SampleRegions.of(replace(clip, name="other", videos=(CLIP,), regions=(box,)))
    own = replace(clip, videos=(short,), regions=(replace(box, boxes=(), time=(10.0, 11.0)),))
    (given,) = Controls([POOL[0], other], 0).regions(own, "shuffled")
    assert given.boxes == (PATCH,) and given.time == (10.5, 11.0)


def test_refusals():
    with pytest.raises(ValueError, match="control_pool"):
        make_collator(side_control="shuffled")
    with pytest.raises(ValueError, match="map_control"):
        make_collator(map_control="wrong")
    own = example(boxes=(PATCH,))
    alone = make_collator(map_control="shuffled", control_pool=[SampleRegions.of(own)])
    with pytest.raises(ValueError, match=r"own:1: control_pool.*another sample"):
        alone([own])
    with pytest.raises(ValueError, match="region_dilation"):
        make_collator(region_dilation=-1)


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        (0, [12]),
        (0.4, [6, 7, 8, 11, 12, 13, 16, 17, 18]),  # a part of each neighbour
        (1, [6, 7, 8, 11, 12, 13, 16, 17, 18]),
        (2, list(range(20))),  # rows 0 to 4, columns 0 to 4
    ],
)
def test_a_region_grows_by_visual_tokens(by, wanted):
    sample = example(boxes=(PATCH,))
    batch = make_collator(region_dilation=by)([sample])
    assert tokens(batch) == wanted
    plain = make_collator()([sample])
    assert torch.equal(batch["gk_map_target"], plain["gk_map_target"])


def test_growth_is_in_each_rectangles_own_size():
    """A fine grid of 4 x 4 and a coarse one of 2 x 2 over the same image, a point at its corner."""
    rects = torch.cat([patch_grid(4, 4), patch_grid(2, 2), torch.full((1, 4), -1.0)]).double()
    found = inside(rects, points=[(0.1, 0.1)], grow=1)
    assert found.nonzero()[:, 0].tolist() == [0, 1, 4, 5, 16, 17, 18, 19]
    line = inside(rects[:16], polylines=[[(0.0, 0.1), (0.2, 0.1)]], grow=1)
    assert line.nonzero()[:, 0].tolist() == [0, 1, 4, 5]
    assert IMAGE.size == (140, 112)
