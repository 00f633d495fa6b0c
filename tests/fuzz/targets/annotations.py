"""Formats of annotations and JSON lines of places: nothing is lost, every place is where it was."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from groundkern.trainer.prepare.maps.annotated import KNOWN, Annotate, sourced
from groundkern.trainer.prepare.maps.formats.common import Options
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.pipeline import Done
from groundkern.trainer.prepare.placing import Phrasing
from groundkern.trainer.prepare.sources import Item, open_source
from tests.fuzz.scratch import SIZES, folder, images, packed
from tests.fuzz.target import Target, expect
from tests.fuzz.targets.adapters import unpacked, walk

PHRASING = Phrasing("Where is the {label}?", "{count} {label}").check(KNOWN)
WORK = Annotate(PHRASING, 0.02, images(), None)
WITH_MAPS = Annotate(PHRASING, 0.02, images(), Grid(2, 3, "neighbours"))


def check(kind: str, inside: str, data: bytes) -> bool:
    """A file's annotations to samples."""
    place = f"maps-{kind}"
    files = unpacked(data, place)
    path = folder() / place / inside
    if files is None or not path.exists():
        return False
    options = Options(path, images=images(), output=folder() / "maps.jsonl")
    source, root = sourced(kind, options)
    items = list(source.read())
    LOST.get(kind, _any)(files, items)
    done = walk(source, work(data), root)
    for item, made in done:
        if isinstance(made, Done) and root == images():
            _placed(item.value, made)
    return any(isinstance(made, Done) for _, made in done)


def work(data: bytes) -> Annotate:
    """One in eight inputs with target maps, which take most of the time."""
    return WORK if sum(data) % 8 else WITH_MAPS


def _placed(value: dict, made: Done) -> None:
    """Boxes are the pixels that the record says, cut at the edge of the image."""
    sample = json.loads(made.lines[0])
    expect(len(sample["regions"]) == len(value["places"]), "a region for each place", sample)
    width, height = SIZES.get(Path(value["image"]).name, (40, 30))
    for place, region in zip(value["places"], sample["regions"], strict=True):
        if "box" not in region:
            continue
        numbers, scale = place["box"], (width, height) * 2
        if place.get("coord", "pixel") == "pixel":
            scale = (1, 1, 1, 1)
        elif place["coord"] != "unit":
            whole = {"percent": 100, "per_mille": 1000}[place["coord"]]
            scale = tuple(side / whole for side in scale)
        a, b, c, d = numbers
        edges = {
            "xyxy": (a, b, c, d),
            "xywh": (a, b, a + c, b + d),
            "cxcywh": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
        }[place.get("order", "xyxy")]
        wanted = [
            min(max(edge * by, 0), side)
            for edge, by, side in zip(edges, scale, (width, height) * 2, strict=True)
        ]
        near = all(abs(x - y) < 1e-6 for x, y in zip(region["box"], wanted, strict=True))
        expect(near, f"the box {wanted}", region["box"])


def _any(files: dict, items: list[Item]) -> None:
    """Every place is in a record or refused: formats whose oracle would be the reader itself."""


def _total(items: list[Item]) -> tuple[int, int]:
    """(places, refusals)."""
    places = sum(len(item.value["places"]) for item in items if item.problem is None)
    return places, sum(item.problem is not None for item in items)


def _coco(files: dict, items: list[Item]) -> None:
    found = files.get("data.json")
    annotations = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(annotations, list):
        return
    total = sum(_total(items))
    expect(total >= len(annotations), f"{len(annotations)} places and refusals or more", total)


def _labelme(files: dict, items: list[Item]) -> None:
    found = files.get("a.json")
    shapes = found.get("shapes") if isinstance(found, dict) else None
    if not isinstance(shapes, list) or not isinstance(found.get("imagePath"), str):
        return
    if "\0" not in found["imagePath"] and not found.get("imageData"):
        wanted, total = max(1, len(shapes)), sum(_total(items))
        expect(total == wanted, f"{wanted} places and refusals", total)


def _yolo(files: dict, items: list[Item]) -> None:
    text = files.get("a.txt")
    if not isinstance(text, str):
        return
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    lines = [line for line in lines if not line.startswith(("imagesource:", "gsd:"))]
    total = sum(_total([item for item in items if item.where.startswith("a.txt")]))
    expect(total >= len(lines), f"{len(lines)} lines", total)
    labels = files.get("classes.txt")
    if not isinstance(labels, str):
        return
    names = labels.removeprefix("\ufeff").split("\n")
    names = [name.removesuffix("\r") for name in names]
    numbered = not any(len(line.split()) == 10 for line in lines)  # DOTA's lines have names
    for item in items:
        if item.problem is None and numbered:
            expect(item.value["label"] in names, f"a label of {names}", item.value["label"])


LOST = {"coco": _coco, "labelme": _labelme, "yolo": _yolo}


def check_lines(data: bytes) -> bool:
    """JSON lines of `{"image", "label", "places"}`."""
    path = folder() / "maps-lines.jsonl"
    path.write_bytes(data)
    done = walk(open_source(path, unique=None), work(data), images())
    for item, made in done:
        if isinstance(made, Done):
            _placed(item.value, made)
    return any(isinstance(made, Done) for _, made in done)


def _line(**place: Any) -> bytes:
    return json.dumps({"image": "a.png", "label": "cat", "places": [place]}).encode()


VOC = """<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size>
<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>
</object></annotation>"""
CVAT = """<annotations><image id="0" name="a.png" width="40" height="30">
<box label="cat" xtl="1" ytl="2" xbr="9" ybr="9" rotation="30"/>
<polygon label="cat" points="1,2;3,4;9,1"/>
<mask label="dog" rle="1,2,1" left="2" top="2" width="2" height="2"/></image></annotations>"""
SQUARE = {"x": 5, "y": 5, "width": 9, "height": 9, "rotation": 3, "rectanglelabels": ["cat"]}
TRIANGLE = {"points": [[1, 1], [9, 1], [9, 9]], "polygonlabels": ["dog"]}
RESULTS = [
    {"original_width": 40, "original_height": 30, "value": SQUARE},
    {"original_width": 40, "original_height": 30, "value": TRIANGLE},
]
STUDIO = [{"data": {"image": "/data/upload/1/a.png"}, "annotations": [{"result": RESULTS}]}]
COCO = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "categories": [{"id": 5, "name": "cat"}],
    "annotations": [
        {"image_id": 1, "category_id": 5, "bbox": [1, 2, 10, 12]},
        {"image_id": 1, "category_id": 5, "segmentation": [[0, 0, 9, 0, 9, 9]]},
    ],
}
SHAPES = [
    {"label": "cat", "shape_type": "rectangle", "points": [[20, 20], [1, 1]]},
    {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [9, 1], [9, 9]]},
    {"label": "dog", "shape_type": "linestrip", "points": [[1, 1], [9, 1]]},
]
LINES = {
    "box": _line(box=[1, 2, 20, 20]),
    "centre": _line(box=[0.5, 0.5, 0.2, 0.2], order="cxcywh", coord="unit"),
    "percent": _line(points=[[10, 20], [30, 40]], coord="percent"),
    "polygon": _line(polygon=[[0, 0], [900, 0], [900, 900]], coord="per_mille"),
    "polyline": _line(polyline=[[0, 0], [9, 9]]),
}
PIECES = ("id", "image_id", "category_id", "bbox", "segmentation", "label", "points", "places")
PIECES += ("box", "polygon", "polyline", "coord", "order", "xywh", "field", "0 0.5 0.5 1 1\n")
TARGETS = (
    Target("coco", partial(check, "coco", "data.json"), {"two": packed(**{"data.json": COCO})},
           "json", PIECES, 1.0),
    Target("labelme", partial(check, "labelme", "a.json"), {"three": packed(**{
        "a.json": {"version": "5", "imagePath": "../images/a.png", "shapes": SHAPES}})},
        "json", PIECES, 1.5),
    Target("yolo", partial(check, "yolo", ""), {"two": packed(**{
        "classes.txt": "cat\ndog\n", "a.txt": "0 0.5 0.5 0.2 0.3\n1 0 0 1 0 1 1\n"})},
        "json", PIECES, 1.5),
    Target("voc", partial(check, "voc", ""), {"one": packed(**{"Annotations/a.xml": VOC})},
           "json", (*PIECES, "<part>", "</object>", "xmin", "&lt;", "<!DOCTYPE a>"), 1.0),
    Target("cvat", partial(check, "cvat", "annotations.xml"), {"three": packed(**{
        "annotations.xml": CVAT})}, "json", (*PIECES, "outside", "<track>", "frame", "rle"), 1.0),
    Target("labelstudio", partial(check, "labelstudio", "data.json"), {"two": packed(**{
        "data.json": STUDIO})}, "json", (*PIECES, "rle", "radiusX", "rotation", "value"), 1.0),
    Target("places", check_lines, LINES, "jsonl", PIECES, 1.5),
)  # fmt: skip
