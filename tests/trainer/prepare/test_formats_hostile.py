"""Hostile annotations: each is refused in a sentence, and nothing large is made of it."""

import base64
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from groundkern.trainer.data.images import SampleError
from groundkern.trainer.prepare.maps.formats.masks import from_brush, from_png, from_rows, pasted
from groundkern.trainer.prepare.markup import plain_xml, xml_children
from tests.trainer.prepare.reading_samples import picture, prepared, write
from tests.trainer.prepare.test_hostile import png_header

SIDE = 30_000  # of squares of 9 x 10^8 pixels
LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 9))
BOMB = f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a0 "ha">{LAUGHS}]><a>&a8;</a>'
READS = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations>&x;</annotations>'


@pytest.fixture
def root(tmp_path):
    picture(tmp_path / "img" / "a.png", 20, 10)
    return tmp_path


@pytest.fixture
def small():
    """What is done within may take a megabyte."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_rows([SIDE * SIDE], (SIDE, SIDE)), "at most 100000000 pixels"),
        (lambda: from_rows([10**30], (2, 2)), "expected runs of 2 x 2 pixels"),
        (lambda: from_rows([5, -1], (2, 2)), "expected runs of 2 x 2 pixels"),
        (lambda: from_brush([255] * 8, (SIDE, SIDE)), "at most 100000000 pixels"),
        (lambda: from_brush([255] * 8, (20, 10)), "expected 800 values"),
        (lambda: from_brush([0, 0, 3, 32, 7], (20, 10)), "it is cut off"),
        (lambda: from_brush([0, 0, 3, 32, 61] + [255] * 9, (20, 10)), "expected"),
        (lambda: from_brush([256], (2, 2)), "a list of bytes"),
        (lambda: from_brush("AAAA", (2, 2)), "a list of bytes"),
        (lambda: from_brush([], (True, 2)), "expected the image's width and height"),
        (lambda: from_png(_text(png_header(SIDE, SIDE)), (4, 4)), "expected a PNG"),
        (lambda: from_png(_text(png_header(9_000, 9_000)), (4, 4)), "expected a PNG of 4 x 4"),
        (lambda: from_png(_text(b"GIF89a"), (4, 4)), "expected a PNG"),
        (lambda: from_png("\u00e9", (4, 4)), "expected base64"),
        (lambda: from_png(7, (4, 4)), "expected a PNG in base64, got 7"),
        (lambda: pasted(np.ones((2, 2)), 50, 50, (20, 10)), "pixels within 20 x 10, got none"),
        (lambda: pasted(np.ones((2, 2)), 0, 0, (None, 10)), "width and height"),
        (lambda: plain_xml(BOMB), "no document type"),
        (lambda: plain_xml(READS), "no document type"),
        (lambda: plain_xml(b"\xff\xfe<\0a\0>\0"), "expected UTF-8"),
        (lambda: plain_xml("<a>"), "expected XML"),
    ],
)
def test_sizes_and_texts_that_lie(small, make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_png_that_is_cut_off_is_refused():
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 255).save(buffer, "PNG")
    assert from_png(_text(buffer.getvalue()), (64, 64)).all()
    with pytest.raises(ValueError, match="expected a PNG"):
        from_png(_text(buffer.getvalue()[:50]), (64, 64))


@pytest.mark.parametrize("text", [BOMB, READS, " " * 65_530 + BOMB, "<a>" * 3, "", "\ud800"])
def test_large_xml_files_that_are_hostile(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SampleError, match=r"a\.xml: expected"):
        list(xml_children(path))


def test_xml_is_read_an_element_at_a_time(tmp_path):
    path = tmp_path / "a.xml"
    with path.open("w") as file:
        file.write("<a>")
        for i in range(2_000):
            file.write(f'<image id="{i}">' + '<box label="dog" xtl="1"/>' * 5 + "</image>")
        file.write("</a>")
    tracemalloc.start()
    assert sum(len(element) for element in xml_children(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_element_of_17_megabytes_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<a><b>" + "x" * (17 << 20) + "</b></a>")
    with pytest.raises(SampleError, match="elements of at most 16777216 characters"):
        list(xml_children(path))


@pytest.mark.parametrize("image", ["../../secret.png", "/etc/passwd", "..\\..\\secret.png"])
def test_no_format_leaves_the_folder_of_the_images(root, image):
    picture(root / "secret.png", 20, 10)
    shape = {"label": "dog", "shape_type": "point", "points": [[5, 6]]}
    write(root / "lm" / "x" / "a.json", {"imagePath": "../" + image, "shapes": [shape]})
    instances = {
        "images": [{"id": 1, "file_name": image}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}],
    }
    write(root / "coco.json", instances)
    value = {"x": 1, "y": 1, "keypointlabels": ["dog"]}
    for address in (image, f"/data/local-files/?d={image}"):
        write(root / "ls.json", [{"image": address, "a": [value]}])
    box = '<box label="dog" xtl="1" ytl="1" xbr="2" ybr="2"/>'
    cvat = f'<annotations><image name="{image}">{box}</image></annotations>'
    (root / "cvat.xml").write_text(cvat)
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    voc = f"<a><filename>{image}</filename><object><name>dog</name>{box}</object></a>"
    (root / "voc").mkdir()
    (root / "voc" / "b.xml").write_text(voc)
    for style, data in (
        ("labelme", "lm"),
        ("coco", "coco.json"),
        ("labelstudio", "ls.json"),
        ("cvat", "cvat.xml"),
        ("voc", "voc"),
    ):
        words = ("maps", root / data, "--format", style, "--images", root / "img", "--overwrite")
        status, samples, (lost,) = prepared(root / "out.jsonl", *words)
        assert (status, samples) == (0, [])
        assert "`images[0]`" in lost["reason"] or "`size`" in lost["reason"]


def test_lines_may_not_name_what_only_formats_use(root):
    good = {"image": "a.png", "label": "dog", "places": [{"box": [1, 1, 2, 2]}]}
    bad = [
        {**good, "size": 5},
        {**good, "size": [1, "x"]},
        {**good, "places": [{"polygon": [[1, 1], 5, [3, 3]], "clip": True}]},
        {**good, "places": [{"polygon": [[90, 90], [95, 90], [90, 95]], "clip": True}]},
    ]
    fine = {**good, "places": [{"box": [1, 1, 2, 2], "notes": 5, "group": [1]}]}
    path = root / "in.jsonl"
    path.write_text("".join(f"{json.dumps(each)}\n" for each in [good, *bad, fine]))
    words = ("maps", path, "--images", root / "img")
    status, samples, rejected = prepared(root / "out.jsonl", *words)
    assert (status, len(samples)) == (0, 2)
    assert [each["where"] for each in rejected] == [f"in.jsonl:{i}" for i in (2, 3, 4, 5)]
