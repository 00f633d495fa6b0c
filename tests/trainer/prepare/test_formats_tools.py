"""`prepare maps --format labelme`, `labelstudio` and `cvat`: every kind of shape by hand."""

import base64
import io
import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer.data.run_lengths import decoded, read_counts
from groundkern.trainer.prepare.maps.formats.shapes import CORNERS, clipped, ellipse
from tests.trainer.prepare.reading_samples import picture, prepared, said, write

WIDTH, HEIGHT = 200, 100


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "img" / "a.png", WIDTH, HEIGHT)
    return tmp_path


def made(root, style, data, *words):
    """(status, samples, rejected) of annotations and the folder `img`."""
    words = ("--images", root / "img", "--overwrite", *words)
    return prepared(root / "out.jsonl", "maps", data, "--format", style, *words)


def png(pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def inside(mask) -> np.ndarray:
    """(row, column) of the pixels of a region's mask."""
    height, width = mask["size"]
    runs = read_counts(mask["counts"], height * width, where="", field="")
    return np.argwhere(decoded(runs, height, width))


def near(points, wanted) -> bool:
    return np.allclose(np.array(points), np.array(wanted), atol=1e-9)


def area(points) -> float:
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x * b - a * y for (x, y), (a, b) in pairs)) / 2


# LabelMe


def test_labelme_shapes(root, capsys):
    shapes = [
        {"label": "dog", "shape_type": "rectangle", "points": [[60, 30], [20, 10]]},
        {"label": "way", "shape_type": "linestrip", "points": [[0, 0], [10, 10], [20, 0]]},
        {"label": "dog", "shape_type": "polygon", "points": [[0, 0], [9, 0], [0, 9]]},
        {"label": "tip", "shape_type": "point", "points": [[5, 6]]},
        {"label": "dog", "shape_type": "blob", "points": [[5, 6], [7, 8]]},
        {"label": None, "shape_type": "point", "points": [[5, 6]]},
        {"label": "x", "shape_type": [[]], "points": [[5, 6]]},
        {"label": "out", "shape_type": "point", "points": [[500, 6]]},
        {"label": "__ignore__", "shape_type": "point", "points": [[5, 6]]},
        {"label": "bad", "shape_type": "circle", "points": [[5, 6]]},
    ]
    write(root / "img" / "a.json", {"imagePath": "a.png", "shapes": shapes, "version": "5"})
    write(root / "img" / "b.json", {"shapes": []})
    write(root / "img" / "d.json", {"imagePath": "a.png", "shapes": [], "flags": {"cat": True}})
    (root / "img" / "c.json").write_text("{")
    status, samples, rejected = made(root, "labelme", root / "img")
    assert status == 0
    found = {said(sample)[1]: sample["regions"] for sample in samples}
    assert set(found) == {"dog", "way", "tip"}
    assert found["dog"][0]["box"] == [20, 10, 60, 30]
    assert found["dog"][1]["polygon"] == [[0, 0], [9, 0], [0, 9]]
    assert found["way"][0]["polyline"] == [[0, 0], [10, 10], [20, 0]]
    assert found["tip"][0]["points"] == [[5, 6]]
    reasons = {each["where"]: each["reason"] for each in rejected}
    places = [f"a.json: shapes[{i}]" for i in (4, 5, 6, 8, 9)]
    assert set(reasons) == {*places, "a.json: 'out'", "b.json", "c.json", "d.json"}
    assert "got 'blob'" in reasons["a.json: shapes[4]"]
    assert "the middle of a circle and a point on it" in reasons["a.json: shapes[9]"]
    printed = capsys.readouterr().out
    assert "1  passed over: shapes of an unknown kind, 'blob'" in printed
    assert "1  passed over: shapes labelled __ignore__" in printed
    assert "1  passed over: images without annotations" in printed


def test_labelme_circles_masks_and_groups(root):
    pixels = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    shapes = [
        {"label": "sun", "shape_type": "circle", "points": [[100, 50], [130, 90]]},
        {"label": "sun", "shape_type": "circle", "points": [[0, 0], [10, 0]], "group_id": 7},
        {"label": "sun", "shape_type": "polygon", "points": [[1, 1], [9, 1], [1, 9]]},
        {"label": "star", "shape_type": "mask", "points": [[4, 2], [6, 3]], "mask": png(pixels)},
        {"label": "star", "shape_type": "mask", "points": [[4, 2], [7, 3]], "mask": png(pixels)},
        {"label": "star", "shape_type": "mask", "points": [[4, 2], [6, 3]], "mask": "?"},
    ]
    shapes[2]["group_id"] = 7
    sizes = {"imageWidth": WIDTH, "imageHeight": HEIGHT}
    write(root / "img" / "a.json", {"imagePath": "a.png", "shapes": shapes, **sizes})
    words = ("--answer", "{count}: {label}")
    _, (sun, star), rejected = made(root, "labelme", root / "img", *words)
    assert said(sun)[1] == "2: sun"
    circle = sun["regions"][0]["polygon"]
    assert {round(math.hypot(x - 100, y - 50), 9) for x, y in circle} == {50}
    quarter = sun["regions"][1]["polygon"]
    assert area(quarter) == pytest.approx(math.pi * 100 / 4, rel=0.002)
    (region,) = star["regions"]
    assert region["mask"]["size"] == [HEIGHT, WIDTH]
    assert inside(region["mask"]).tolist() == [[2, 5], [2, 6], [3, 6]]
    assert [each["reason"] for each in rejected] == [
        "`mask`: expected a PNG of 4 x 2, got 3 x 2",
        "`mask`: expected base64 (Only base64 data is allowed)",
    ]


def test_images_within_labelme_s_files_are_written_beside_the_output(root):
    shape = {"label": "dog", "shape_type": "point", "points": [[5, 6]]}
    data = png(np.zeros((10, 20), np.uint8))
    for name, image, held in (("one", "gone", data), ("two", "a", None), ("bad", "no", "AAAA")):
        record = {"imagePath": f"{image}.png", "shapes": [shape], "imageData": held}
        write(root / "img" / f"{name}.json", record)
    status, (one, two), (lost,) = made(root, "labelme", root / "img")
    assert status == 0
    for sample, size in ((one, (20, 10)), (two, (WIDTH, HEIGHT))):
        (path,) = sample["images"]
        assert path.startswith("out_images/")
        assert Image.open(root / path).size == size
    assert lost["where"] == "bad.json"
    assert lost["reason"].startswith("`imageData`: expected an image in a known format, got")


def test_ellipses_are_as_near_as_their_module_says():
    points = ellipse(0, 0, 1, 1)
    middles = [math.hypot((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in pairwise(points)]
    assert CORNERS == 64
    assert 1 - min(middles) == pytest.approx(0.0012, abs=1e-5)
    assert 1 - area(points) / math.pi == pytest.approx(0.0016, abs=1e-5)


def test_polygons_are_cut_at_the_edge():
    assert clipped([[1, 1], [3, 1], [3, 3]], 10, 10) == [[1, 1], [3, 1], [3, 3]]
    assert area(clipped([[-5, -5], [5, -5], [5, 5], [-5, 5]], 10, 10)) == 25
    assert clipped([[-5, -5], [-1, -5], [-1, -1]], 10, 10) == []


# Label Studio


def result(value, *, size=(WIDTH, HEIGHT), **more) -> dict:
    sizes = dict(zip(("original_width", "original_height"), size, strict=True))
    return {"value": value, "type": "rectanglelabels", **sizes, **more}


def task(*results, image="/data/local-files/?d=x/a.png", **more) -> dict:
    annotation = {"id": 1, "result": list(results), "was_cancelled": False}
    return {"data": {"image": image}, "annotations": [annotation], **more}


def studio(root, *tasks, words=()):
    return made(root, "labelstudio", write(root / "export.json", tasks), *words)


def brush(pixels) -> list[int]:
    """Label Studio's run lengths of a mask: each RGBA value literally, in runs of up to 16."""
    values = np.zeros((*pixels.shape, 4), np.uint8)
    values[pixels] = (7, 8, 9, 255)
    values = values.reshape(-1).tolist()
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{n:04b}" for n in (3, 7, 15, 15))
    at = 0
    while at < len(values):
        same = next((i for i, v in enumerate(values[at:]) if v != values[at]), len(values) - at)
        if same > 3:
            same = min(same, 1 << 16)
            bits += f"110{same - 1:016b}{values[at]:08b}"
        else:
            same = min(16, len(values) - at)
            bits += f"000{same - 1:04b}" + "".join(f"{v:08b}" for v in values[at : at + same])
        at += same
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def test_label_studio_s_percent(root):
    box = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0}
    polygon = {"points": [[0, 0], [50, 0], [50, 50]], "closed": True, "polygonlabels": ["way"]}
    point = {"x": 50, "y": 50, "width": 0.4, "keypointlabels": ["tip"]}
    oval = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 90}
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[10:12, 5:8] = True
    _, samples, rejected = studio(
        root,
        task(
            result({**box, "rectanglelabels": ["dog"]}),
            result(polygon),
            result(point),
            result({**oval, "ellipselabels": ["sun"]}),
            result({"format": "rle", "rle": brush(pixels), "brushlabels": ["star"]}),
            result({**box, "rectanglelabels": ["dog"], "rotation": 90}),
        ),
    )
    assert rejected == []
    found = {said(sample)[1]: sample["regions"] for sample in samples}
    assert found["dog"][0] == {"char_span": [0, 3], "box": [20, 10, 60, 30]}
    # 40 x 20 pixels, turned clockwise about its top left corner
    assert near(found["dog"][1]["polygon"], [[20, 10], [20, 50], [0, 50], [0, 10]])
    assert found["way"][0]["polygon"] == [[0, 0], [100, 0], [100, 50]]
    assert found["tip"][0]["points"] == [[100, 50]]
    xs, ys = zip(*found["sun"][0]["polygon"], strict=True)
    wide = [min(xs), max(xs), min(ys), max(ys)]
    assert wide == pytest.approx([90, 110, 30, 70])  # radii of 20 and 10 pixels, turned
    rows = [[y, x] for y in (10, 11) for x in (5, 6, 7)]
    assert inside(found["star"][0]["mask"]).tolist() == rows


def test_one_annotation_of_a_task_counts(root, capsys):
    several = task()
    several["annotations"] = [
        {"id": i, "result": [result({"x": i, "y": 1, "keypointlabels": ["dog"]})], **more}
        for i, more in enumerate(
            [
                {"updated_at": "2024-01-03", "was_cancelled": True},
                {"updated_at": "2024-01-02"},
                {"updated_at": "2024-01-01"},
            ]
        )
    ]
    _, (sample,), _ = studio(root, several, task())
    assert sample["regions"][0]["points"] == [[2, 1]]
    printed = capsys.readouterr().out
    assert "1  passed over: annotations of a task of which another was taken" in printed
    assert "1  passed over: images without annotations" in printed
    several["annotations"][2]["ground_truth"] = True
    _, (sample,), _ = studio(root, several)
    assert sample["regions"][0]["points"] == [[4, 1]]


def test_json_min(root):
    box = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["dog"]}
    sizes = {"original_width": WIDTH, "original_height": HEIGHT}
    short = {"id": 1, "photo": "https://x.org/b/a.png?sig=1", "boxes": [{**box, **sizes}]}
    _, (sample,), rejected = studio(root, {**short, "annotator": 1, "lead_time": 2.5})
    assert rejected == []
    assert sample["images"] == ["a.png"]
    assert sample["regions"] == [{"char_span": [0, 3], "box": [20, 10, 60, 30]}]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/upload/29/0a1b2c3d-a.png", "a.png"),
        ("/data/upload/29/0a1b2c3d-b.png", "29/0a1b2c3d-b.png"),
        ("/data/local-files/?d=photos%2Fc%20d.png", "photos/c d.png"),
        ("s3://bucket/some/photos/c%20d.png", "photos/c d.png"),
        ("http://localhost:8080/data/upload/1/a.png", "a.png"),
    ],
)
def test_addresses_of_images(root, address, name):
    picture(root / "img" / "29" / "0a1b2c3d-b.png", WIDTH, HEIGHT)
    picture(root / "img" / "photos" / "c d.png", WIDTH, HEIGHT)
    _, (sample,), _ = studio(
        root, task(result({"x": 1, "y": 1, "keypointlabels": ["dog"]}), image=address)
    )
    assert sample["images"] == [name]


def test_label_studio_takes_no_image_of_another_folder_for_its_own(root):
    point = result({"x": 1, "y": 1, "keypointlabels": ["dog"]})
    addresses = ("/data/upload/1/0a1b2c3d-a.png", "/data/upload/2/11111111-a.png")
    _, samples, rejected = studio(root, *(task(point, image=each) for each in addresses))
    assert (samples, len(rejected)) == ([], 2)


def test_what_is_wrong_with_some_results(root, capsys):
    box = {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["dog"]}
    results = [
        result({"choices": ["good"]}, type="choices"),
        {"from_id": "a", "to_id": "b", "type": "relation"},
        result({key: value for key, value in box.items() if key != "rectanglelabels"}),
        result({**box, "rotation": 5}, size=(None, None)),
        result(box, image_rotation=90),
        result({**box, "x": "1"}),
        result({**box, "rectanglelabels": [5]}),
        result(box),
    ]
    _, (sample,), rejected = studio(root, task(*results), {"data": {"a": "text"}}, 7)
    assert len(sample["regions"]) == 1
    reasons = [each["reason"] for each in rejected]
    assert "`original_width`, `original_height`: expected a size" in reasons[3]
    assert "`image_rotation`: expected 0" in reasons[4]
    assert "expected 4 numbers" in reasons[5]
    assert "expected texts as labels" in reasons[6]
    assert "expected one field of the task that names an image" in reasons[7]
    assert len(reasons) == 9
    printed = capsys.readouterr().out
    assert "1  passed over: results of another kind, 'choices'" in printed
    assert "1  passed over: results of another kind, 'relation'" in printed
    assert "1  passed over: places without a label" in printed


# CVAT


def cvat(root, text, *words):
    (root / "annotations.xml").write_text(
        f"<annotations><version>1.1</version>{text}</annotations>"
    )
    return made(root, "cvat", root / "annotations.xml", *words)


def test_cvat_images(root, capsys):
    text = """<image id="0" name="a.png" subset="Train" width="200" height="100">
    <box label="dog" xtl="20" ytl="10" xbr="60" ybr="30" occluded="0"><attribute name="a">1
    </attribute></box>
    <box label="dog" xtl="20" ytl="10" xbr="60" ybr="30" rotation="90"/>
    <polygon label="way" points="0,0;9,0;0,9"/><polyline label="line" points="1,2;3,4"/>
    <points label="tip" points="5,6;7,8"/><ellipse label="sun" cx="50" cy="50" rx="20" ry="10"/>
    <mask label="star" rle="1, 2, 2, 1" left="4" top="2" width="3" height="2"/>
    <cuboid label="cube" xtl1="1"/><tag label="good"/><box label="" xtl="1"/>
    <box label="bad" xtl="x" ytl="0" xbr="1" ybr="1"/><polygon label="bad" points="1,2;3"/>
    <mask label="bad" rle="1,2" left="0" top="0" width="30000" height="30000"/>
    </image><image id="1" name="b.png" subset="Test" width="9" height="9"/>"""
    _, samples, rejected = cvat(root, text)
    found = {said(sample)[1]: sample["regions"] for sample in samples}
    assert found["dog"][0] == {"char_span": [0, 3], "box": [20, 10, 60, 30]}
    assert near(found["dog"][1]["polygon"], [[50, 0], [50, 40], [30, 40], [30, 0]])
    assert found["way"][0]["polygon"] == [[0, 0], [9, 0], [0, 9]]
    assert found["line"][0]["polyline"] == [[1, 2], [3, 4]]
    assert found["tip"][0]["points"] == [[5, 6], [7, 8]]
    assert area(found["sun"][0]["polygon"]) == pytest.approx(math.pi * 200, rel=0.002)
    assert inside(found["star"][0]["mask"]).tolist() == [[2, 5], [2, 6], [3, 6]]
    reasons = {each["where"].partition(": ")[2]: each["reason"] for each in rejected}
    assert "expected numbers" in reasons["image[0].box[10]"]
    assert "expected x,y;x,y;..." in reasons["image[0].polygon[11]"]
    assert "expected at most 100000000 pixels" in reasons["image[0].mask[12]"]
    printed = capsys.readouterr().out
    assert "1  passed over: shapes of another kind, 'cuboid'" in printed
    assert "1  passed over: shapes of another kind, 'tag'" in printed
    assert "1  passed over: places without a label" in printed
    assert "1  passed over: images without annotations" in printed
    _, samples, rejected = cvat(root, text, "--split", "Test")
    assert (samples, len(rejected)) == ([], 1)


def test_cvat_subsets_keep_their_images(root):
    picture(root / "img" / "images" / "Train" / "a.png", WIDTH, HEIGHT)
    text = "".join(
        f'<image name="a.png" subset="{subset}" width="200" height="100">'
        '<points label="tip" points="5,6"/></image>'
        for subset in ("Train", "Test")
    )
    _, (sample,), (lost,) = cvat(root, text)
    assert sample["images"] == ["images/Train/a.png"]
    assert "'images/Test/a.png', which is not there" in lost["reason"]


def test_cvat_tracks(root, capsys):
    picture(root / "img" / "images" / "frame_000003.png", WIDTH, HEIGHT)
    text = """<meta><task><original_size><width>200</width><height>100</height></original_size>
    </task></meta><track id="0" label="dog">
    <box frame="3" outside="0" xtl="20" ytl="10" xbr="60" ybr="30"/>
    <box frame="4" outside="1" xtl="20" ytl="10" xbr="60" ybr="30"/></track>
    <track id="1" label="dog"><polygon frame="3" outside="0" points="0,0;9,0;0,9"/>
    <box frame="x" outside="0" xtl="20" ytl="10" xbr="60" ybr="30"/></track>"""
    _, (sample,), rejected = cvat(root, text)
    assert sample["images"] == ["images/frame_000003.png"]
    assert [sorted(region)[0] for region in sample["regions"]] == ["box", "char_span"]
    assert [each["where"].partition(": ")[2] for each in rejected] == [
        "track[0].box[1]",
        "track[1].box[1]",
    ]
    assert "1  passed over: places of a track outside of its frame" in capsys.readouterr().out
