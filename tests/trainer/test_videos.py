"""Samples with videos: folders of frames, which frames are taken, regions in time, limits."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from groundkern.hf import Video
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.lengths import LengthEstimate
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.data.videos import RULES, VideoRules, natural, sampled
from groundkern.trainer.metrics.registry import gold_of
from tests.trainer.clips import ANSWER, number_of, record, write_frames

CLIP = {"path": "clip", "fps": 4}  # 12 frames: 3 seconds


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_frames(folder / "clip", 12)
    (folder / "clip" / "notes.txt").write_text("no frame")
    (folder / "clip" / ".hidden.png").write_text("nor this")
    write_frames(folder / "other", 3, size=(32, 32))
    Image.new("RGB", (40, 20)).save(folder / "a.png")
    mixed = write_frames(folder / "mixed", 3)
    Image.new("RGB", (48, 64)).save(mixed / "frame_2.png")
    (folder / "empty").mkdir()
    return folder


def parse(value, root, **options):
    return parse_sample(json.dumps(value), root=root, where="v.jsonl:3", **options)


def region(**place):
    return {"text": "patch", **place}


def refused(value, root, **options) -> str:
    with pytest.raises(SampleError) as caught:
        parse(value, root, **options).load()
    message = str(caught.value)
    assert message.startswith("v.jsonl:3: ")
    assert len(message.splitlines()) == 1
    return message


def test_names_are_sorted_as_people_count():
    names = ["frame_10.png", "frame_2.png", "a10b2", "a10b10", "a9", "b", "7", "frame_2.PNG"]
    order = sorted(names, key=natural)
    assert order.index("frame_2.png") < order.index("frame_10.png")
    assert order[:4] == ["7", "a9", "a10b2", "a10b10"]


def test_a_folder_of_frames_is_a_video(root):
    sample = parse(record(CLIP), root)
    (stored,) = sample.videos
    assert (stored.size, stored.fps, stored.duration, stored.planned) == ((64, 48), 4, 3.0, 6)
    example = sample.load()
    (video,) = example.videos
    assert isinstance(video, Video)
    assert [number_of(frame) for frame in video.frames] == [0, 2, 4, 6, 8, 10]
    assert video.times == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert video.fps == 4
    assert example.images == ()
    example.check()
    replace(example, checked=False).check()  # the library's own rules too


@pytest.mark.parametrize(
    ("rules", "more", "numbers"),
    [
        (RULES, {"frames": 3}, [0, 4, 8]),
        (VideoRules(fps=None), {}, list(range(12))),
        (VideoRules(fps=None, frames=5), {}, [0, 2, 4, 7, 9]),
        (VideoRules(fps=100.0), {}, list(range(12))),
        (VideoRules(fps=1.0), {"start": 0.75, "end": 2.8}, [3, 7, 11]),
        (VideoRules(fps=0.1), {}, [0]),
        (VideoRules(fps=3.0), {}, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
    ],
)
def test_which_frames_are_taken(root, rules, more, numbers):
    sample = parse(record({**CLIP, **more}), root, videos=rules)
    (video,) = sample.load().videos
    assert [number_of(frame) for frame in video.frames] == numbers
    assert video.times == tuple(number / 4 for number in numbers)
    assert len(numbers) <= sample.videos[0].planned <= len(numbers) + 1


def test_frames_of_any_times_are_taken_evenly():
    times = np.cumsum(np.random.default_rng(0).uniform(0.001, 0.4, 200))
    for rate, most in ((2.0, 64), (7.0, 5), (None, 9)):
        chosen = sampled(times, 3.0, 20.0, rate, most)
        assert len(set(chosen)) == len(chosen) <= most
        assert all(3.0 <= times[index] < 20.0 for index in chosen)
        step = 17 / most if rate is None or 17 * rate > most else 1 / rate
        for target in 3.0 + step * np.arange(int(17 / step)):
            shown = max(np.searchsorted(times, target, "right") - 1, 0)
            assert shown in chosen or times[shown] < 3.0
    assert sampled(times, 1e6, 1e7, 2.0, 64) == []
    assert sampled(np.array([5.0]), 0.0, 9.0, 2.0, 4) == [0]  # nothing is shown before it


def test_regions_in_space_and_time(root):
    regions = [
        region(box=[0, 0, 32, 24]),
        region(box=[0, 0, 0.5, 0.5], coord="unit", time=[1, 2]),
        region(points=[[500, 500]], coord="per_mille", frame=5),
        region(time=[0.5, 3.0]),
        region(video=0, frame=11),
        region(track=[{"frame": 2, "box": [0, 0, 8, 8]}, {"time": 1.5, "box": [8, 8, 16, 16]}]),
        region(polygon=[[0, 0], [64, 0], [64, 48]], video=0),
        region(track=[{"time": t, "box": [8, 8, 16, 8]} for t in (0, 3.01)], order="xywh"),
    ]
    sample = parse(record(CLIP, regions=regions), root)
    found = sample.regions
    assert all((r.video, r.image) == (0, -1) for r in found)
    times = [None, (1, 2), (1.25, 1.5), (0.5, 3.0), (2.75, 3.0), None, None, None]
    assert [r.time for r in found] == times
    assert [r.boxes for r in found[:2]] == [((0, 0, 0.5, 0.5),)] * 2
    assert found[2].points == ((0.5, 0.5),)
    assert not any((found[3].boxes, found[3].points, found[3].polygons, found[3].tracks))
    assert found[5].tracks == (((0.5, (0, 0, 1 / 8, 1 / 6)), (1.5, (1 / 8, 1 / 6, 1 / 4, 1 / 3))),)
    assert found[6].polygons == (((0, 0), (1, 0), (1, 1)),)
    assert found[7].tracks[0][0] == (0, (1 / 8, 1 / 6, 3 / 8, 1 / 3))
    replace(sample.load(), checked=False).check()


def test_a_mask_of_a_video_is_of_its_frames(root):
    runs = {"size": [48, 64], "counts": [100, 50, 48 * 64 - 150]}
    sample = parse(record(CLIP, regions=[region(mask=runs, time=[0, 1])]), root)
    (raster,) = sample.load().regions[0].rasters
    assert raster.values.shape == (48, 64)
    turned = {"size": [64, 48], "counts": [100, 50, 48 * 64 - 150]}
    got = refused(record(CLIP, regions=[region(mask=turned)]), root)
    assert "expected a mask of the ratio of its image, 64 x 48, got 48 x 64" in got


def test_images_and_videos_together(root):
    places = [region(image=0, box=[0, 0, 40, 20]), region(video=1, box=[0, 0, 32, 32])]
    value = record(CLIP, {"path": "other", "fps": 1}, regions=places, images=["a.png"])
    value["messages"][0]["content"] = "Where?"  # no parts: images, then videos, come first
    example = parse(value, root).load()
    assert [r.boxes for r in example.regions] == [((0, 0, 1, 1),)] * 2
    assert [example.place(r) for r in example.regions] == [0, 2]
    kinds = [part["type"] for part in example.chat()[0]["content"]]
    assert kinds == ["image", "video", "video", "text"]
    assert "within video 1, 32 x 32" in refused(
        {**value, "regions": [region(video=1, box=[0, 0, 33, 32])]}, root
    )
    two = record(CLIP, images=["a.png", "a.png"], regions=[region(box=[0, 0, 1, 1])])
    assert "`regions[0].image`" in refused(two, root)
    got = refused({**value, "regions": [region(time=[0, 1])]}, root)
    assert "`regions[0].video`: expected one of the 2 videos, from 0, got none" in got


MOVES = [{"time": 0, "box": [0, 0, 9, 9]}, {"time": 1, "box": [0, 0, 9, 9]}]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({}, "expected one of box, points, polygon, polyline, mask, heat and track, or a time or"),
        ({"box": [0, 0, 9, 9], "points": [[1, 1]]}, "frame alone, got box and points"),
        ({"box": [0, 0, 9, 9], "track": MOVES}, "or a time or frame alone, got box and track"),
        ({"time": [0, 1], "frame": 3}, "`regions[0]`: expected one of time, frame and track, got"),
        ({"time": [0, 1], "track": MOVES}, "one of time, frame and track, got time and track"),
        ({"time": [0, 1], "image": 0}, "expected either `image` or what a video has, got both"),
        ({"time": [1, 1]}, "`regions[0].time`: expected [t0, t1] in seconds, 0 <= t0 < t1, got"),
        ({"time": [-1, 1]}, "`regions[0].time`: expected [t0, t1] in seconds, 0 <= t0 < t1"),
        ({"time": [3, 4]}, "`regions[0].time`: expected a time within the 3.000 s of the video"),
        ({"time": [1, 3.2]}, "`regions[0].time`: expected a time within the 3.000 s of the video"),
        ({"time": [1]}, "`regions[0].time[1]`: expected a value, got nothing"),
        ({"frame": 12}, "`regions[0].frame`: expected a frame of the 12 of 'clip', from 0, got 12"),
        ({"frame": 1.5}, "`regions[0].frame`: expected a valid integer, got 1.5"),
        ({"video": 1, "frame": 0}, "`regions[0].video`: expected an index of the sample's 1 vid"),
        ({"box": [0, 0, 65, 9]}, "expected pixel coordinates within video 0, 64 x 48, got"),
        ({"track": MOVES[:1]}, "`regions[0].track`: expected list should have at least 2 items"),
        ({"track": MOVES[::-1]}, "`regions[0].track[1]`: expected a time behind 1 s, got 0"),
        ({"track": [{"box": [0, 0, 9, 9]}] * 2}, "track[0]`: expected either time or frame, got n"),
        ({"track": [*MOVES, {"time": 9, "box": [0, 0, 9, 9]}]}, "`regions[0].track[2].time`: ex"),
        ({"track": [*MOVES, {"frame": 99, "box": [0, 0, 9, 9]}]}, "[2].frame`: expected a frame"),
        ({"track": [*MOVES, {"time": 2, "box": [0, 0, 9, 49]}]}, "`regions[0].track[2].box`"),
    ],
)
def test_bad_region(root, place, message):
    assert message in refused(record(CLIP, regions=[region(**place)]), root)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("clip", "`videos[0].fps`: expected how many frames of the folder were taken in a second"),
        ("none", "`videos[0]`: expected a video file or a folder of frames under"),
        ("../videos0/clip", "`videos[0]`: expected a relative path inside the data root"),
        ("/tmp", "`videos[0]`: expected a relative path inside the data root"),
        (3, "`videos[0]`: expected"),
        ({"fps": 2}, "`videos[0].path`: expected a value, got nothing"),
        ({"path": "clip", "speed": 2}, "`videos[0].speed`: expected a field of the format"),
        ({"path": "clip", "fps": 0}, "`videos[0].fps`: expected greater than 0, got 0"),
        ({"path": "clip", "fps": float("inf")}, "`videos[0].fps`: expected a finite number"),
        ({**CLIP, "frames": 0}, "`videos[0].frames`: expected greater than or equal to 1, got 0"),
        ({**CLIP, "start": 3}, "`videos[0].start`: expected a time below 3.000 s, got 3"),
        ({**CLIP, "start": 2, "end": 1}, "`videos[0].end`: expected a time behind `start`, 2, g"),
        ({**CLIP, "end": 4}, "`videos[0].end`: expected a time within the 3.000 s of the video"),
        ({**CLIP, "start": 0.1, "end": 0.2}, "expected a frame between 0.1 and 0.2 s, got none"),
        ({"path": "clip", "fps": 1e-9}, "at most 14400 seconds (`data.video_seconds`), got 12"),
        ({"path": "mixed", "fps": 2}, "of one size, 64 x 48 as 'frame_0.png' has, got 48 x 64 in"),
        ({"path": "empty", "fps": 2}, "`videos[0]`: expected a folder with frames (.png, .jpg"),
    ],
)  # fmt: skip
def test_bad_video(root, video, message):
    assert message in refused(record(video), root)


def test_bad_parts(root):
    value = record(CLIP)
    value["messages"][0]["content"] *= 2
    wanted = "`messages`: expected 1 video parts, one for each video, or none, got 2"
    assert wanted in refused(value, root)
    value["messages"][1]["content"] = [{"type": "video"}]
    assert "expected videos in user messages only, got assistant" in refused(value, root)
    value = record(CLIP, messages=[{"role": "assistant", "content": "<video> " + ANSWER}])
    wanted = 'expected videos as parts, {"type": "video"}, got the text <video>'
    assert wanted in refused(value, root)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_part_that_has_text_is_named(root, kind):
    value = record(CLIP, images=["a.png"])
    parts = [{"type": each} for each in ("image", "video")]
    content = [{**part, "text": "a"} if part["type"] == kind else part for part in parts]
    value["messages"][0]["content"] = content
    got = refused(value, root)
    assert f"`messages[0].content`: expected no text in parts of type {kind}, got some" in got


def test_links_may_not_leave_the_root(root, tmp_path):
    outside = write_frames(tmp_path / "outside", 2)
    (tmp_path / "data").mkdir()
    os.symlink(outside, tmp_path / "data" / "link")
    assert "a link to" in refused(record({"path": "link", "fps": 1}), tmp_path / "data")
    inside = write_frames(tmp_path / "data" / "in", 2)
    os.symlink(outside / "frame_1.png", inside / "frame_2.png")
    assert "a link to" in refused(record({"path": "in", "fps": 1}), tmp_path / "data")


def test_all_frames_together_are_limited(root):
    rules = VideoRules(max_pixels=64 * 48 * 9)
    got = refused(record(CLIP, CLIP), root, videos=rules)
    assert "`videos[1]`: expected at most 27648 pixels in all frames together" in got
    assert got.endswith("got 36864 with 6 frames of 64 x 48")
    assert "at most 3000 pixels, got 64 x 48" in refused(record(CLIP), root, max_pixels=3000)


def test_the_index_counts_videos_and_a_damaged_frame_is_a_bad_sample(tmp_path):
    write_frames(tmp_path / "clip", 12)
    half = write_frames(tmp_path / "half", 12)
    cut = (half / "frame_4.png").read_bytes()
    (half / "frame_4.png").write_bytes(cut[:-40])
    lines = [record(CLIP, regions=[region(time=[0, 1])]), record({"path": "half", "fps": 4})]
    lines += [record("clip"), {"messages": record()["messages"]}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = JsonLinesDataset(path, cache=tmp_path / "run")
    counted = {n: data.counts[n].tolist() for n in ("videos", "frames", "frame_width", "regions")}
    assert counted == {
        "videos": [1, 1, 0], "frames": [6, 6, 0], "frame_width": [64, 64, 0], "regions": [1, 0, 0]
    }  # fmt: skip
    assert [bad.where for bad in data.bad] == ["d.jsonl:3"]
    assert len(data[0].videos[0].frames) == 6
    assert data[1].videos == ()  # the next that can be decoded
    assert "`videos[0]`: expected an image that can be decoded, got 'frame_4.png'" in str(data.bad)
    again = JsonLinesDataset(path, cache=tmp_path / "run", videos=VideoRules(frames=2))
    assert again.counts["frames"].tolist() == [2, 2, 0]  # not those of the other rules


def test_lengths_count_frames(root):
    class Processor:
        image_token, video_processor = "<image>", type("V", (), {"temporal_patch_size": 2})()

        def tokenizer(self, texts, **_):
            return {"input_ids": [[0] * len(text) for text in texts]}

        def _get_num_multimodal_tokens(self, image_sizes):
            ((height, width),) = image_sizes
            return type("N", (), {"num_image_tokens": [height * width // 64]})()

    config = type("C", (), {"image_token_id": 1})()
    sample = parse(record(CLIP), root)
    estimate = LengthEstimate(Processor(), config, [sample])
    letters = len("Where?") + len(ANSWER)
    assert estimate.of(sample) == 3 * 48 + letters


def test_metrics_of_places_leave_regions_of_videos_out(root):
    value = record(CLIP, images=["a.png"], regions=[region(video=0, box=[0, 0, 9, 9])])
    assert gold_of(parse(value, root)).regions == ()


def test_without_pyav_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"0000ftypmp42")
    monkeypatch.setitem(sys.modules, "av", None)
    got = refused(record("a.mp4"), tmp_path)
    wanted = "expected PyAV, which decodes videos (pip install av), or a folder of frames, got"
    assert got == f"v.jsonl:3: `videos[0]`: {wanted} 'a.mp4', and no PyAV"
