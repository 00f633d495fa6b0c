"""`prepare maps`: annotations to pixel edges by hand, hostile ones rejected by their place."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.adapt.work import Adapt
from groundkern.trainer.prepare.maps.annotated import Annotate
from groundkern.trainer.prepare.maps.drawing import Draw
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.placing import Frame, Phrasing
from tests.trainer.prepare.reading_samples import lines, picture, prepared, said

WIDTH, HEIGHT = 200, 100


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "img" / "a.png", WIDTH, HEIGHT)
    return tmp_path


def places(root, *records, **options):
    """What becomes of plain records with these places: (samples, rejected)."""
    path = root / "in.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    status, samples, rejected = prepared(
        root / "out.jsonl", "maps", path, "--images", root / "img", *words
    )
    assert status == 0
    return samples, rejected


def record(*given, image="a.png", label="dog") -> dict:
    return {"image": image, "label": label, "places": list(given)}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"box": [20, 10, 60, 30]}, {"box": [20, 10, 60, 30]}),
        ({"box": [20, 10, 40, 20], "order": "xywh"}, {"box": [20, 10, 60, 30]}),
        ({"box": [40, 20, 40, 20], "order": "cxcywh"}, {"box": [20, 10, 60, 30]}),
        ({"box": [0.1, 0.1, 0.3, 0.3], "coord": "unit"}, {"box": [20, 10, 60, 30]}),
        ({"box": [100, 100, 300, 300], "coord": "per_mille"}, {"box": [20, 10, 60, 30]}),
        ({"box": [10, 10, 20, 20], "coord": "percent", "order": "xywh"}, {"box": [20, 10, 60, 30]}),
        ({"points": [[50, 50], [25, 10]], "coord": "percent"}, {"points": [[100, 50], [50, 10]]}),
        ({"polyline": [[0, 0], [1, 1]], "coord": "unit"}, {"polyline": [[0, 0], [200, 100]]}),
        ({"polygon": [[0, 0], [9, 0], [0, 9]]}, {"polygon": [[0, 0], [9, 0], [0, 9]]}),
        ({"box": [150, 50, 201, 101]}, {"box": [150, 50, 200, 100]}),  # a hundredth over the edge
    ],
)
def test_every_convention_comes_out_in_pixel_edges(root, given, wanted):
    (sample,), rejected = places(root, record(given))
    assert rejected == []
    (region,) = sample["regions"]
    ((kind, values),) = wanted.items()
    for mine, hand in zip(region[kind], values, strict=True):
        assert mine == pytest.approx(hand)
    assert said(sample) == ("Where is the dog?", "dog")
    assert region["char_span"] == [0, 3]


def test_masks_and_heats_are_passed_on(root, capsys):
    runs = {"size": [10, 20], "counts": [0, 100, 100]}
    np.save(root / "img" / "heat.npy", np.eye(4))
    Image.new("L", (WIDTH, HEIGHT), 3).save(root / "img" / "labels.png")
    given = [{"mask": runs}, {"heat": "heat.npy"}, {"mask": "labels.png", "mask_value": 3}]
    whole = record(given[2])
    samples, rejected = places(root, record(*given, {"points": [[1, 1]]}), whole, grid="2x4")
    assert rejected == []
    assert samples[0]["regions"] == [{"char_span": [0, 3], **place} for place in given] + [
        {"char_span": [0, 3], "points": [[1, 1]]}
    ]
    assert "8.0  tokens on the target" in capsys.readouterr().out
    (loaded,) = [JsonLinesDataset(root / "out.jsonl", root=root / "img")[0]]
    assert [len(region.rasters) for region in loaded.regions] == [1, 1, 1, 0]


def test_spreads_and_shares_are_passed_on_in_pixels(root, capsys):
    """The image has 200 x 100 pixels: a tenth of either side is 20 or 10."""
    point = {"points": [[0.5, 0.5]], "coord": "unit"}
    given = [{**point, "spread": 0.1, "share": 2}, {**point, "spread": [0.1, 0.1]}]
    (sample,), rejected = places(root, record(*given), grid="1x2")
    assert rejected == []
    assert [region["spread"] for region in sample["regions"]] == [20, [20, 10]]
    assert [region.get("share") for region in sample["regions"]] == [2, None]
    assert "2.0  tokens on the target, on average, with 100% of" in capsys.readouterr().out
    first, second = JsonLinesDataset(root / "out.jsonl", root=root / "img")[0].regions
    assert (first.bells, second.bells) == (((0.5, 0.5, 0.1, 0.2),), ((0.5, 0.5, 0.1, 0.1),))


def test_places_of_a_label_are_one_phrase_and_answers_may_say_where(root):
    given = [{"box": [0, 0, 100, 50]}, {"box": [100, 50, 200, 100]}, {"points": [[1, 1], [2, 2]]}]
    options = {"question": "Find the {label}.", "answer": "At {box} are {count} {{dogs}}."}
    (sample,), _ = places(root, record(*given), **options)
    answer = "At [0, 0, 500, 500] [500, 500, 1000, 1000] are 4 {dogs}."
    assert said(sample) == ("Find the dog.", answer)
    assert (
        [answer[slice(*r["char_span"])] for r in sample["regions"]]
        == [
            "[0, 0, 500, 500]",  # each box's own numbers
            "[500, 500, 1000, 1000]",
            answer[3:42],  # of the points, which are not in {box}, the whole of it
        ]
    )
    assert [r.get("box") for r in sample["regions"]] == [[0, 0, 100, 50], [100, 50, 200, 100], None]
    dataset = JsonLinesDataset(root / "out.jsonl", root=root / "img", on_bad_sample="stop")
    assert len(dataset[0].regions) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record({"box": [0, 0, float("nan"), 9]}), "`places[0].box`: expected 4 finite numbers"),
        (record({"box": [0, 0, float("inf"), 9]}), "expected 4 finite numbers"),
        (record({"box": [0, 0, 10**400, 9]}), "expected 4 finite numbers"),
        (record({"box": [9, 0, 3, 9]}), "expected x0 < x1, y0 < y1, got [9, 0, 3, 9]"),
        (record({"box": [9, 9, -3, 9], "order": "xywh"}), "expected positive width and height"),
        (record({"box": [9, 9, 9, 20]}), "expected x0 < x1"),
        (record({"box": [150, 50, 210, 90]}), "`places[0].box`: expected coordinates within 200"),
        (record({"box": [200.5, 5, 201, 9]}), "expected a box that overlaps the image"),
        (record({"box": [0, 0, "9", 9]}), "expected 4 numbers"),
        (record({"points": [[1, 1]], "spread": 0}), "`places[0].spread`: expected numbers above 0"),
        (record({"points": [[1, 1]], "spread": [1]}), "`places[0].spread`: expected 2 numbers"),
        (record({"points": [[1, 1]], "share": -1}), "`regions[0].share[0]`: expected greater than"),
        (record({"box": [0, 0, True, 9]}), "expected 4 numbers"),
        (record({"box": {"x": 0}}), "expected 4 numbers"),
        (record({"box": [1, 2, 3]}), "expected 4 numbers"),
        (record({"points": [[1, 2], [3]]}), "`places[0].points[1]`: expected 2 numbers"),
        (record({"points": []}), "expected a list of 1 points or more"),
        (record({"polyline": [[1, 1], [1, 1]]}), "expected a line with a length"),
        (record({"polygon": [[0, 0], [5, 5], [9, 9]]}), "expected a polygon with an area"),
        (record({"polygon": [[0, 0], [5, 5]]}), "expected a list of 3 points or more"),
        (record({"box": [0, 0, 9, 9], "points": [[1, 1]]}), "got box and points"),
        (record({"box": [0, 0, 9, 9], "coord": "cm"}), "`places[0].coord`: expected one of pixel"),
        (record({"box": [0, 0, 9, 9], "coord": []}), "`places[0].coord`: expected one of pixel"),
        (record({"box": [0, 0, 9, 9], "order": []}), "expected xyxy, xywh or cxcywh"),
        (record({"mask": {"size": [1, 2], "counts": [2]}}), "expected a mask with a pixel inside"),
        (
            record({"mask": {"size": [8, 4], "counts": [0, 32]}}),
            "`places[0].mask`: expected a mask",
        ),
        (record({"mask": "a.png", "mask_value": 3}), "expected a mask with a pixel of the value 3"),
        (record({"mask": "a.png", "mask_value": "3"}), "expected a number of a label image, of a"),
        (record({"heat": 3}), "`places[0].heat`: expected the path of a grey PNG or a .npy, got 3"),
        (
            record({"heat": "a.png"}),
            "`places[0].heat`: expected a grey PNG, got mode RGB in",
        ),
        (record({"heat": "b.npy", "mask": "a.png"}), "got mask and heat"),
        (record(3), "`places[0]`: expected an object, got 3"),
        (record(), "`places`: expected at least one, got none"),
        ({"image": "a.png", "label": "x", "places": "none"}, "`places`: expected a list"),
        (record({"points": [[1, 1]]}, label=" "), "`label`: expected a text, got ' '"),
        (record({"points": [[1, 1]]}, label=7), "`label`: expected a text, got 7"),
        (record({"points": [[1, 1]]}, label="<image>"), "got the text <image>"),
        (record({"points": [[1, 1]]}, image="\ud800"), "got half a surrogate pair"),
        (record({"points": [[1, 1]]}, image="none.png"), "which is not there"),
        (record({"points": [[1, 1]]}, image="../in.jsonl"), "a relative path inside the data root"),
        (record({"points": [[1, 1]]}, image=None), "`image`: expected a text, got None"),
        ([1], "object, got [1]"),
    ],
)
def test_a_bad_record_is_rejected_with_its_line_and_the_rest_goes_on(root, bad, message):
    good = record({"points": [[1, 1]]})
    samples, rejected = places(root, good, bad, good)
    assert len(samples) == 2
    (lost,) = rejected
    assert lost["where"] == "in.jsonl:2"
    assert message in lost["reason"]
    if isinstance(bad, dict):
        assert json.dumps(lost["original"]) == json.dumps(bad)


def test_drawings_are_the_same_again_and_a_finished_run_is_left_alone(tmp_path):
    words = ["maps", "--task", "grid_patch", "line_tracing", "--count", "4", "--size", "128"]
    assert prepared(tmp_path / "one" / "d.jsonl", *words)[0] == 0
    assert prepared(tmp_path / "two" / "d.jsonl", *words)[0] == 0
    one, two = (sorted((tmp_path / n / "d_images").iterdir()) for n in ("one", "two"))
    assert len(one) == 8
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    dataset = JsonLinesDataset(tmp_path / "one" / "d.jsonl", on_bad_sample="stop")
    assert dataset.tasks == ["grid_patch", "line_tracing"] * 4
    assert lines(tmp_path / "one" / "d.jsonl") == lines(tmp_path / "two" / "d.jsonl")
    assert prepared(tmp_path / "one" / "d.jsonl", *words)[0] == 0  # finished: nothing to do
    assert prepared(tmp_path / "one" / "d.jsonl", *words, "--seed", "1")[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected annotations or --task, got neither"),
        (("none.json",), "which are not there"),
        (("--task", "x"), "`--task`: expected some of line_intersection"),
        (("--task", "grid_patch", "grid_patch"), "expected each task once"),
        (("--task", "grid_patch", "--count", "0"), "expected a positive number"),
        (("--task", "grid_patch", "--size", "9"), "`size`: expected 64 to 4096"),
        (("--task", "grid_patch", "--difficulty", "x"), "`difficulty`: expected one of"),
        (("--task", "grid_patch", "--split", "x"), "`split`: expected one of"),
        (("--task", "grid_patch", "--set", "lines=3"), "expected NAME=NUMBER with a name of side"),
        (("--task", "grid_patch", "--set", "side=x"), "got 'side=x'"),
        (("--task", "grid_patch", "--grid", "16"), "`--grid`: expected HEIGHTxWIDTH"),
        (("--task", "grid_patch", "--grid", "9999x9999"), "at most 1048576 tokens"),
        (("--task", "grid_patch", "--preview", "3"), "--preview needs --grid"),
        (("IN", "--overhang", "-1"), "`--overhang`: expected at least 0"),
        (("IN", "--overhang", "nan"), "`--overhang`: expected at least 0"),
        (("IN", "--images", "none"), "`--images`: expected a folder"),
        (
            ("IN", "--question", "{x}"),
            "`--question`: expected {label}, {count}, {box}, {point}, got",
        ),
        (("IN", "--answer", "{label!r}"), "`--answer`: expected {label}"),
        (("IN", "--answer", "{"), "`--answer`: expected a text"),
        (("IN", "--answer", ""), "`--answer`: expected a text, got none"),
        (("IN", "--format", "yolo"), "YOLO's .txt files"),
    ],
)
def test_bad_settings_are_one_sentence(root, capsys, words, message):
    (root / "in.jsonl").write_text("")
    words = [str(root / "in.jsonl") if word == "IN" else word for word in words]
    assert prepared(root / "out.jsonl", "maps", *words)[0] == 2
    assert message in capsys.readouterr().err
    assert not (root / "out.jsonl").exists()


def test_work_can_be_sent_to_other_processes():
    grid, phrasing = Grid(4, 4, "gaussian"), Phrasing("a", "b")
    works = [
        Draw(0, "train", {"size": 128, "difficulty": "easy"}, {"grid_patch": {}}, grid, "x"),
        Annotate(phrasing, 0.1, Path("img"), grid),
        Adapt("squad", Options(Path("data"))),
    ]
    for work in works:
        assert pickle.loads(pickle.dumps(work)) == work


def test_phrasing_ties_the_first_value_of_the_answer():
    values = {"label": "{count}", "count": "2"}
    assert Phrasing("", "No {count} {label}").filled(values) == ("No 2 {count}", [3, 4])
    assert Phrasing("", "All of it").filled(values) == ("All of it", [0, 9])


def test_frames_cut_what_sticks_out_a_little():
    frame = Frame(200, 100, 0.05, "x")
    assert frame.box([-10, -5, 210, 105], "box") == ([0, 0, 200, 100], {"boxes_cut": 1})
    assert frame.box([0, 0, 200, 100], "box") == ([0, 0, 200, 100], {})
    assert frame.point([205, 50], "p") == ([200, 50], True)


def test_counts_of_a_grid_by_hand():
    grid = Grid.of("2x4", "uniform")
    sample = {"regions": [{"box": [0, 0, 100, 50]}]}  # 2 of 8 tokens of 50 x 50
    counts = grid.counts(sample, (200, 100))
    assert counts == {"maps": 1, "map_tokens": 2, "map_mass": pytest.approx(2 / 2.006)}
    assert grid.counts({"regions": []}, (200, 100)) == {}
