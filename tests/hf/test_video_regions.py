"""Where regions of a video are in time: moments, sets of tokens, targets; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.families.zoo.first import tiny_qwen_processor
from groundkern import maps, maps_in_time
from groundkern.hf import GroundingCollator, Raster, Region, Video, Word
from groundkern.hf.data.geometry.videos import check_videos
from groundkern.hf.data.moments import moments_of
from groundkern.hf.data.video import box_at
from groundkern.maps_in_time import Moment
from tests.hf import videos
from tests.hf.collating import make_config
from tests.hf.videos import asked

CORNER = (0.0, 0.0, 0.3, 0.4)
FRAME = Image.new("RGB", (112, 84), "white")  # 3 rows of 4 tokens
CLIP = Video((FRAME,) * 6, (0.0, 1.0, 2.0, 3.0, 4.0, 5.0))
TRACK = ((1.0, (0.0, 0.0, 0.1, 0.1)), (3.0, (0.2, 0.4, 0.3, 0.5)))


def shown(region: Region, video: Video = CLIP) -> list[tuple[float, dict]]:
    return [(moment.time, dict(moment.shapes)) for moment in moments_of([region], video)]


def region(**places) -> Region:
    return Region(1, 4, 7, 0, video=0, **places)


def config_of(processor, kind="qwen2_5_vl"):
    known = {**vars(make_config("qwen")), "video_token_id": processor.video_token_id}
    return SimpleNamespace(**known | {"model_type": kind})


def collator(**options):
    processor = videos.processor("qwen2_5_vl", own=False)
    return GroundingCollator(processor, config_of(processor), **options)


@pytest.mark.parametrize(
    ("time", "times"),
    [
        (None, CLIP.times),
        ((1.0, 3.0), (1.0, 2.0)),
        ((1.0004, 3.0004), (1.0, 2.0)),  # rounded
        ((0.9996, 2.9996), (1.0, 2.0)),
        ((1.2, 1.4), (1.0,)),  # between two frames: the one that lasts
        ((5.5, 5.6), (5.0,)),
        ((-2.0, 0.5), (0.0,)),
        ((6.0, 7.0), ()),
        ((-2.0, -1.0), ()),
    ],
)
def test_a_region_counts_in_the_frames_of_its_time(time, times):
    found = shown(region(time=time, boxes=(CORNER,)))
    assert found == [(each, {"boxes": (CORNER,)}) for each in times]


def test_a_time_alone_is_the_whole_of_its_frames_and_nothing_alone_is_nothing():
    assert shown(region(time=(1.0, 2.0))) == [(1.0, {"boxes": ((0.0, 0.0, 1.0, 1.0),)})]
    assert shown(region()) == []


def test_a_track_moves_straight_and_is_nowhere_else():
    found = shown(region(tracks=(TRACK,)))
    assert [time for time, _ in found] == [1.0, 2.0, 3.0]
    assert found[1][1]["boxes"][0] == pytest.approx((0.1, 0.2, 0.2, 0.3))
    assert box_at(TRACK, 0.5) is None
    assert box_at(TRACK, 3.5) is None
    assert [time for time, _ in shown(region(tracks=(TRACK,), time=(1.5, 2.5)))] == [2.0]
    assert shown(region(tracks=(TRACK,), time=(4.0, 5.0))) == []


@pytest.mark.parametrize(("at", "frame"), [(2.0, 2.0), (1.9995, 2.0), (2.0005, 2.0), (2.5, 2.0)])
def test_one_box_of_a_track_is_in_the_frame_of_its_time(at, frame):
    assert shown(region(tracks=(((at, CORNER),),))) == [(frame, {"boxes": (CORNER,)})]


def test_sets_and_targets_are_of_the_tokens_that_are_there_then():
    """Frames 2 and 3 are one step of 12 tokens; neighbours are around it and beside it in time."""
    batch = collator(lens=True, lens_outside=None)(
        [asked((), (CLIP,), (region(time=(2.0, 4.0), boxes=(CORNER,)),))]
    )
    columns = batch["gk_map_columns"][0].long()
    assert len(columns) == 36
    inside = batch["gk_side_inside"][0, 0]
    covered = torch.zeros(3, 3, 4, dtype=torch.bool)
    covered[1, :2, :2] = True
    assert torch.equal(inside[columns], covered.flatten())
    assert int(inside.sum()) == 4
    target = batch["gk_map_target"][0, 0].view(3, 3, 4).double() / 2**20
    wanted = torch.full((3, 3, 4), 1e-3, dtype=torch.float64)
    wanted[1, :3, :3] = 0.5
    wanted[0, :2, :2] = wanted[2, :2, :2] = 0.5
    wanted[1, :2, :2] = 1.0
    torch.testing.assert_close(target, wanted, rtol=0, atol=1e-6)
    on = batch["gk_lens_position"][0][batch["gk_lens_inside"][0] == 1]
    assert sorted(on.tolist()) == columns[covered.flatten()].tolist()


def test_videos_count_behind_images_wherever_they_stand():
    """The messages put the second video before the image."""
    example = asked((FRAME,), (CLIP, CLIP), (region(boxes=(CORNER,)),))
    parts = [{"type": kind} for kind in ("video", "image", "video")]
    example.messages[0]["content"] = [*parts, {"type": "text", "text": "Where?"}]
    example = replace(
        example,
        regions=(*example.regions, Region(1, 0, 3, 0, boxes=(CORNER,))),
        words=(Word("red", CORNER, 0),),
    )
    batch = collator()([example])
    image = batch["gk_image"][0]
    assert image[image >= 0].tolist() == [1] * 36 + [0] * 12 + [2] * 36
    assert batch["gk_word_bag"].shape[:2] == (1, 3)
    assert sorted(batch["gk_map_image"][0].tolist()) == [0, 1]
    packed = collator(pack_to=400)([example, example])
    image = packed["gk_image"][0]
    assert image[image >= 0].tolist()[84:] == [4] * 36 + [3] * 12 + [5] * 36
    assert sorted(packed["gk_map_image"][0].tolist()) == [0, 1, 3, 4]


@pytest.mark.parametrize("step", [0.5, 2.0])
def test_seconds_of_a_step_come_from_the_times(step):
    clip = Video((FRAME,) * 5, tuple(7.0 + step * i for i in range(5)))
    batch = collator()([asked((), (clip, Video((FRAME,), (3.0,))))])
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2 * step, 2.0])
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 1]


def test_times_of_frames_are_in_the_text_of_qwen3():
    processor = videos.processor("qwen3_vl", own=False)
    config = config_of(processor, "qwen3_vl")
    clip = Video((FRAME,) * 4, (0.5, 1.0, 4.0, 9.0))
    batch = GroundingCollator(processor, config)([asked((), (clip,), (region(boxes=(CORNER,)),))])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "<0.8 seconds>" in text
    assert "<6.5 seconds>" in text
    start, stop = (batch["gk_image"][0] >= 0).nonzero()[[0, -1], 0].tolist()
    assert int((batch["gk_image"][0] >= 0).sum()) < stop + 1 - start
    short = GroundingCollator(processor, config, max_length=stop + 8)
    cut = short([asked((), (clip,), answer="the red patch " * 20)])
    assert torch.equal(
        cut["input_ids"][0, start : stop + 1], batch["input_ids"][0, start : stop + 1]
    )
    with pytest.raises(ValueError, match="for its images"):
        GroundingCollator(processor, config, max_length=stop - start)([asked((), (clip,))])


def test_a_heat_is_its_own_target():
    rects, times = maps.patch_grid(2, 2).repeat(2, 1), torch.tensor([[0.0, 1], [1, 2]])
    times = times.repeat_interleave(4, 0).double()
    heat = Raster(torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    found = maps_in_time.target_map(rects, times, [Moment(1.0, {"rasters": (heat,)})])
    torch.testing.assert_close(found, torch.tensor([0, 0, 0, 0, 0, 1, 2, 4]) / 7)
    nothing = maps_in_time.target_map(rects, times, [Moment(5.0, {"rasters": (heat,)})])
    assert not nothing.any()


@pytest.mark.parametrize(
    ("at", "step"), [(0.9, None), (1.0, 0), (1.9, 0), (2.0, None), (2.5, 1), (4.0, None)]
)
def test_a_moment_is_in_the_step_of_its_time_alone(at, step):
    """Steps in any order, with a time between them that no token shows."""
    rects = maps.patch_grid(1, 2).repeat(2, 1)
    times = torch.tensor([[2.5, 4.0], [1.0, 2.0]]).double().repeat_interleave(2, 0)
    found = maps_in_time.inside(rects, times, [Moment(at, {"points": ((0.7, 0.5),)})])
    assert found.nonzero()[:, 0].tolist() == {None: [], 0: [3], 1: [1]}[step]


@pytest.mark.parametrize("kind", ["neighbours", "uniform", "overlap", "gaussian"])
def test_one_step_has_the_target_of_an_image(kind):
    rects = torch.cat([maps.patch_grid(3, 4), torch.full((1, 4), -1.0)])
    times = torch.tensor([[1.0, 2.0]] * 12 + [[-1.0, -1.0]])
    boxes = {"boxes": ((0.1, 0.1, 0.4, 0.5),)}
    found = maps_in_time.target_map(rects, times, [Moment(1.5, boxes)], kind=kind)
    torch.testing.assert_close(found, maps.target_map(rects, kind=kind, **boxes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"videos": (replace(CLIP, frames=()),)}, r"videos\[0\].frames`: expected one frame"),
        ({"videos": (replace(CLIP, times=(0.0,)),)}, "one time for each of 6 frames"),
        ({"videos": (replace(CLIP, times=(0.0, 1, 1, 2, 3, 4)),)}, "seconds that ascend"),
        ({"videos": (replace(CLIP, fps=0.0),)}, r"videos\[0\].fps`: expected"),
        (
            {"videos": (Video((FRAME, Image.new("RGB", (56, 56))), (0.0, 1.0)),)},
            r"frames of one size, got \[\(56, 56\), \(112, 84\)\]",
        ),
        ({"videos": ()}, "one video part per video, 0, got 1"),
        ({"regions": (Region(1, 4, 7, 0, video=1),)}, r"regions\[0\].video`: expected below 1"),
        ({"regions": (region(time=(2.0, 2.0)),)}, "t0 < t1"),
        ({"regions": (region(tracks=((),)),)}, r"tracks\[0\]`: expected one box at least"),
        ({"regions": (region(tracks=(((1.0, (0, 0, 2, 1)),),)),)}, "a box within the image"),
        ({"regions": (region(tracks=(TRACK[::-1],)),)}, "seconds that ascend"),
        ({"regions": (Region(1, 4, 7, 0, time=(0.0, 1.0)),)}, "a region of a video"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    images = (FRAME,) if "regions" in change else ()
    example = replace(asked(images, (CLIP,)), name="train.jsonl:3", **change)
    with pytest.raises(ValueError, match=message) as error:
        example.check()
    assert "train.jsonl:3: " in str(error.value)


def test_families_whose_videos_are_not_known_are_refused_by_name():
    with pytest.raises(ValueError, match=r"whose videos are known: .*, got 'internvl'"):
        check_videos("internvl", [CLIP])
    with pytest.raises(ValueError, match=r"llava_onevision takes no other\), got \[1, 6\]"):
        check_videos("llava_onevision", [CLIP, Video((FRAME,), (0.0,))])
    check_videos("qwen2_vl", [CLIP, Video((FRAME,), (0.0,))])
    check_videos("internvl", [])
    plain = GroundingCollator(tiny_qwen_processor(), make_config("qwen"))
    with pytest.raises(ValueError, match=r"processor.video_processor`: expected a part for videos"):
        plain([asked((), (CLIP,))])
