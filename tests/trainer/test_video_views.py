"""Videos as models see them: batches, `inspect`, `look`, heat maps of reports, questions."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import torch
from PIL import Image, ImageSequence

from groundkern.hf import GroundingCollator, attach
from groundkern.trainer import look as looking
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.demo.model import build_model, build_processor, build_tokenizer
from groundkern.trainer.evaluation.generating import Answerer
from groundkern.trainer.evaluation.questions import Asking
from groundkern.trainer.heatmaps import heat_maps
from groundkern.trainer.inspection.cards import card
from groundkern.trainer.inspection.recent import Recent
from groundkern.trainer.inspection.seen import SeenByModel
from groundkern.trainer.looks import look
from groundkern.trainer.program import main
from groundkern.trainer.streaming.stream import SampleStream
from groundkern.trainer.visual_places import visual_places
from tests.trainer.clips import ANSWER, record, write_frames
from tests.trainer.streaming.test_stream import source

CLIP = {"path": "clip", "fps": 4, "frames": 4}  # at 0, 0.75, 1.5 and 2.25 s; 2 frames a token


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_frames(folder / "clip", 12, size=(112, 84))
    Image.new("RGB", (56, 56), "green").save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def small():
    """A model and its processor."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([f"Where? {ANSWER}"] * 3, size=300)
    return build_model(tokenizer), build_processor(tokenizer, videos=True)


def value(**more):
    regions = [
        {"text": "patch", "video": 0, "time": [0, 1], "box": [0, 0, 28, 28]},
        {"text": "from 1 s on", "video": 0, "time": [1.5, 3.0]},
        {"text": "The", "image": 0, "box": [0, 0, 28, 28]},
    ]
    return record(CLIP, images=["a.png"], regions=regions, **more)


def test_places_are_those_of_the_columns(root, small):
    model, processor = small
    example = parse_sample(value(), root=root, where="v:1").load()
    example.messages[0]["content"].insert(1, {"type": "image"})  # behind the video
    collator = GroundingCollator(processor, model.config)
    batch = collator([example])
    places = visual_places(collator, example, batch)
    assert places.number.tolist() == [1] * 24 + [0] * 4  # 2 steps of 3 x 4 tokens
    assert places.times[0].tolist() == [0.0, 1.5]
    assert places.times[12].tolist() == [1.5, 3.0]
    assert (places.times[24:] == -1).all()
    assert places.of(1, 0.75).nonzero()[:, 0].tolist() == list(range(12))
    assert places.of(0).sum() == 4
    inside = batch["gk_side_inside"][0][:, batch["gk_map_columns"][0].long()]
    found = {tuple(each.nonzero()[:, 0].tolist()) for each in inside}
    assert found == {(0,), tuple(range(12, 24)), (24,)}


def test_a_page_shows_every_frame_with_its_regions(root, small):
    model, processor = small
    seen = SeenByModel.__new__(SeenByModel)
    seen.processor, seen.config, seen.cell = processor, model.config, 28
    seen._collator, seen.labels = GroundingCollator(processor, model.config), Counter()
    sample = parse_sample(value(), root=root, where="v:1")
    for made in (card(sample, None, Recent()), card(sample, seen, Recent())):
        picture, sheet = made.views
        assert len(picture.regions) == 1
        assert "4 frames of a video of 4 a second, 112 x 84 pixels" in sheet.caption
        assert (sheet.width, sheet.height) == (2 * 230 + 6, 2 * 194 + 6)  # 2 x 2, twice as large
        boxes = [shape.box for shape in sheet.regions]
        assert [shape.number for shape in sheet.regions] == [1, 1, 2, 2]
        assert boxes == [(6, 6, 56, 56), (236, 6, 56, 56), (6, 200, 224, 168), (236, 200, 224, 168)]
    assert len(sheet.grid) == 4 * 12
    assert len(sheet.inside) == 2 * 1 + 2 * 12
    path = root / "page.jsonl"
    free = record({"path": "clip", "fps": 4})  # its record does not say how many
    path.write_text(json.dumps(value()) + "\n" + json.dumps(free) + "\n")
    assert main(["inspect", str(path), "--video-frames", "2"]) == 0
    page = path.with_suffix(".inspect.html").read_text()
    assert "4 frames of a video" in page  # its record says so itself
    assert "2 frames of a video" in page
    assert "<td>videos</td><td>2</td>" in page


def test_look_writes_a_sheet_and_animations(root, small, monkeypatch, capsys):
    model, processor = small
    monkeypatch.setattr(looking, "open_model", lambda *_, **__: (model, processor))
    monkeypatch.setattr("groundkern.trainer.look_video.LARGEST", 9000)
    words = ["look", "--model", "m", "--video", str(root / "clip"), "--prompt", "Where?"]
    words += ["--video-fps", "4", "--video-frames", "4", "--answer", ANSWER, "--token", "1"]
    words += ["--output", str(root / "o.png")]
    assert main([*words, "--time", "1.5,3", "--region", "0,0,28,28"]) == 0
    assert "against the region" in capsys.readouterr().out
    with Image.open(root / "o.png") as sheet:
        assert sheet.width == 4 * 332 + 12
        assert sheet.height > 3 * 80
    for suffix in ("webp", "gif"):
        with Image.open(root / f"o.{suffix}") as film:
            assert film.n_frames == 4
            lengths = []
            for shown in ImageSequence.Iterator(film):
                shown.load()
                lengths.append(film.info["duration"])
            assert lengths == [750, 750, 750, 750]
    assert main([*words, "--time", "3,1"]) == 2
    assert "--time: expected 0 <= T0 < T1" in capsys.readouterr().err
    assert main([*words, "--per-layer"]) == 2
    assert "--per-layer: expected an --image" in capsys.readouterr().err
    picture = [*words[:3], "--image", str(root / "a.png"), *words[5:], "--time", "1,2"]
    assert main(picture) == 2
    assert "--time: expected a --video" in capsys.readouterr().err


def test_maps_of_a_video_are_of_all_its_tokens(root, small):
    model, processor = small
    (video,) = parse_sample(record(CLIP), root=root, where="v:1").load().videos
    looks = look(model, processor, video, "Where?", ANSWER)
    assert looks.rects.shape == (24, 4)
    assert looks.times.tolist() == [[0.0, 1.5]] * 12 + [[1.5, 3.0]] * 12
    torch.testing.assert_close(looks.maps["attention"].sum(-1), torch.ones(len(looks.tokens), 4))
    target = looking.Clip(video, time=(1.5, 3.0)).on(looks)
    assert target.tolist() == [False] * 12 + [True] * 12
    assert looking.Clip(video).on(looks) is None


def test_a_report_draws_the_frames(root, small):
    model, processor = small
    attach(model)
    regions = [{"text": "patch", "track": [{"time": 0, "box": [0, 0, 28, 28]},
                                           {"time": 3, "box": [84, 0, 112, 28]}]}]  # fmt: skip
    path = root / "report.jsonl"
    path.write_text(json.dumps(record(CLIP, regions=regions)) + "\n")
    data = JsonLinesDataset(path)
    collator = GroundingCollator(processor, model.config, map_rows="phrase")
    (entry,) = heat_maps(model.eval(), collator, {"": [0]}, data, limit=1)
    assert len(entry["rects"]) == len(entry["attention"]) == 48  # two frames to a token
    assert sum(entry["attention"]) == pytest.approx(2, abs=1e-3)
    assert len(entry["boxes"]) == 4
    width, _ = entry["size"]
    lefts = [round(x0 * width) for x0, *_ in entry["boxes"]]
    assert lefts == [6, 236 + 42, 6 + 84, 236 + 126]
    assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in entry["rects"])


def test_a_model_is_asked_about_videos(root, small):
    model, processor = small
    asking, answerer = Asking(processor), Answerer(model, processor, max_new_tokens=2)
    later = value()
    later["messages"].append({"role": "user", "content": [{"type": "video"}]})
    later["videos"] = [CLIP, {**CLIP, "frames": 2}]  # the second behind the answer: not asked
    later["messages"][0]["content"].insert(0, {"type": "image"})
    questions = [
        asking.question(parse_sample(each, root=root, where="v:1").load())
        for each in (value(), later, {**record(), "videos": []})
    ]
    assert [len(question.videos) for question in questions] == [1, 1, 0]
    inputs = answerer.inputs(questions)
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 8], [2, 6, 8]]
    assert len(answerer.answer(inputs)) == 3


def test_a_stream_has_videos(root, tmp_path):
    path = root / "stream.jsonl"
    path.write_text(json.dumps(record(CLIP)) + "\n" + json.dumps(record("clip")) + "\n")
    stream = SampleStream([source(path, tmp_path)], seed=0, buffer=4)
    (example,) = itertools.islice(stream, 1)
    assert len(example.videos[0].frames) == 4
