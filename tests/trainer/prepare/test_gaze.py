"""`prepare gaze`: fixations of each format, the times they count in, and what is refused."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from groundkern.hf.data.moments import moments_of
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.gaze.fixations import Fixation, read_fixations
from groundkern.trainer.program import main
from tests.trainer.prepare.records import lines_of, sample

CSV = "path,x,y,duration,pupil\na.png,14,28,0.3,3\na.png,42,7,0.1,\nb.png,1,1,1,2\n"


def gaze(folder, data, fixations, *more):
    out = folder / "out.jsonl"
    main(["prepare", "gaze", str(data), "--fixations", str(fixations), "--output", str(out),
          "--workers", "1", "--spread", "5.6", *more])  # fmt: skip
    return lines_of(out)


def test_fixations_of_an_image_become_regions_weighted_by_how_long(write, tmp_path, capsys):
    (tmp_path / "gaze.csv").write_text(CSV + "a.png,60,7,0.2,\n")
    own = {"text": "red", "box": [0, 0, 9, 9]}
    data = write(sample("a red cat", regions=[own]), sample("yes", image=None), sample(""))
    found, without, empty = gaze(tmp_path, data, tmp_path / "gaze.csv")
    assert found["regions"][0] == own
    parsed = parse_sample(found, root=tmp_path, where="a:1")
    _, first, second = parsed.regions
    assert (first.start, first.stop) == (0, len("a red cat"))
    assert first.bells == ((0.25, 0.5, pytest.approx(0.1), pytest.approx(0.1)),)
    assert second.bells[0][:2] == (0.75, 0.125)
    assert (first.share, second.share) == (0.3, 0.1)
    assert without == sample("yes", image=None)
    assert empty == sample("")
    said = capsys.readouterr().out
    assert "4  fixations in" in said
    assert "2  fixations\n" in said
    assert "2  samples left as they were" in said


@pytest.mark.parametrize(
    ("around", "spans"),
    [
        ("past", [(0.5, 1.2), (1.0, 2.2), (3.9, 4.0)]),
        ("both", [(0.3, 1.2), (0.8, 2.2), (3.7, 4.0)]),
    ],
)
def test_in_a_video_a_fixation_counts_for_a_window(tmp_path, around, spans):
    """Lengths .5, 1 (two frames of half a second) and .3; a window of .2 s; the video has 4 s."""
    (tmp_path / "clip").mkdir()
    for i in range(8):
        Image.new("RGB", (56, 28)).save(tmp_path / "clip" / f"{i}.png")
    record = {**sample("a cat", image=None), "videos": [{"path": "clip", "fps": 2}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    records = [
        {"path": "clip", "x": 0.5, "y": 0.5, "time": 0.5, "duration": 0.5},
        {"path": "clip", "x": 0.5, "y": 0.25, "frame": 2, "duration": 1},
        {"path": "clip", "x": 1, "y": 1, "time": 3.9, "duration": 0.3},
    ]
    (tmp_path / "gaze.json").write_text(json.dumps(records))
    more = ("--coord", "unit", "--spread", "0.1", "--around", around)
    (found,) = gaze(tmp_path, tmp_path / "data.jsonl", tmp_path / "gaze.json", *more)
    example = parse_sample(found, root=tmp_path, where="a:1").load()
    times = [region.time for region in example.regions]
    assert times == [pytest.approx(span) for span in spans]
    assert example.regions[0].bells == ((0.5, 0.5, 0.1, pytest.approx(0.2)),)
    assert [region.share for region in example.regions] == [0.5, 1, 0.3]
    first = [m.time for m in moments_of(example.regions[:1], example.videos[0])]
    assert first == [0.5, 1.0]


def test_formats_say_the_same(tmp_path):
    wanted = {"a.png": [Fixation(1, 2.5, None, None, 0.3)], "b c": [Fixation(0, 4, 1.5, None, 1)]}
    records = [
        {"path": "a.png", "x": 1, "y": 2.5, "duration": 0.3, "more": []},
        {"path": "b c", "x": 0, "y": 4, "time": 1.5, "duration": 1},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    lines = "\ufeffpath,x,y,time,duration,more\r\na.png,1,2.5,,0.3,9\r\nb c,0,4,1.5,1,\r\n"
    (tmp_path / "a.csv").write_bytes(lines.encode())
    hashes = set()
    for name in ("a.json", "a.jsonl", "a.csv"):
        found, digest = read_fixations(tmp_path / name)
        assert found == wanted
        hashes.add(digest)
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected fixations with path, x, y, got others"),
        ("path,x,y\n", "expected one fixation at least, got none"),
        ("path,x\na.png,1\n", "expected fixations with path, x, y, got others"),
        ("path,x,y\na.png,1\n", "record 1: `y`: expected a number, got None"),
        ("path,x,y\na.png,1,nan\n", "record 1: `y`: expected a number, got 'nan'"),
        ("path,x,y\n,1,2\n", "record 1: `path`: expected an image or video, got None"),
        ("path,x,y,time\na,1,2,-1\n", "record 1: `time`: expected 0 or more, got -1"),
        ("path,x,y,frame\na,1,2,1.5\n", "`frame`: expected a whole number from 0, got 1.5"),
        ("path,x,y,frame,time\na,1,2,1,2\n", "record 1: expected `time` or `frame`, got both"),
        ("path,x,y,duration\na,1,2,0\n", "`duration`: expected a number above 0, got 0"),
        ("path,x,y,duration\na,1,2,1\na,1,2,\n", "`duration` of every fixation or of none"),
        ('path,x,y\na,"1,2\n', "expected fixations, got"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    (tmp_path / "gaze.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_fixations(tmp_path / "gaze.csv")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[1]", "[", "[" * 9999, '[{"path": 1, "x": true}]',
                                  '[{"path": "a", "x": 1e999, "y": 1}]'])  # fmt: skip
def test_bad_json_is_named(tmp_path, text):
    (tmp_path / "gaze.json").write_text(text)
    with pytest.raises(ConfigError, match=r"gaze\.json"):
        read_fixations(tmp_path / "gaze.json")


@pytest.mark.parametrize(
    ("fixation", "message"),
    [
        ({}, "`fixations of clip`: expected `time` or `frame` of each, on a video, got neither"),
        ({"time": 5}, "`fixations of clip`: expected times within the 4.000 s of the video, got 5"),
        ({"frame": 8}, "`fixations of clip`: expected a frame of the 8 of 'clip', from 0, got 8"),
    ],
)
def test_fixations_that_do_not_fit_their_video_reject_its_sample(tmp_path, fixation, message):
    (tmp_path / "clip").mkdir()
    for i in range(8):
        Image.new("RGB", (56, 28)).save(tmp_path / "clip" / f"{i}.png")
    record = {**sample("a cat", image=None), "videos": [{"path": "clip", "fps": 2}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "gaze.json").write_text(json.dumps([{"path": "clip", "x": 1, "y": 1, **fixation}]))
    assert gaze(tmp_path, tmp_path / "data.jsonl", tmp_path / "gaze.json") == []
    (rejected,) = lines_of(tmp_path / "out.jsonl.rejected.jsonl")
    assert message in json.dumps(rejected, ensure_ascii=False)
