"""COCO, LabelMe, YOLO and JSON lines of places: nothing is lost, every place is where it was."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.scratch import SIZES, folder, images, packed
from tests.fuzz.target import Target, expect
from tests.fuzz.targets.adapters import unpacked, walk
from trainer.prepare.maps.annotated import KNOWN, Annotate
from trainer.prepare.maps.grid import Grid
from trainer.prepare.maps.readers import READERS
from trainer.prepare.pipeline import Done
from trainer.prepare.placing import Phrasing
from trainer.prepare.sources import Unusable, listed, open_source

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
    source = listed(*READERS[kind](path, images()))
    pairs = list(READERS[kind](path, images())[0]())
    LOST[kind](files, pairs)
    done = walk(source, work(data), images())
    for item, made in done:
        if isinstance(made, Done):
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


def _coco(files: dict, pairs: list) -> None:
    found = files.get("data.json")
    annotations = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(annotations, list):
        return
    places = sum(len(v["places"]) for _, v in pairs if not isinstance(v, Unusable))
    refused = sum(isinstance(v, Unusable) for _, v in pairs)
    several = sum(
        len(a["segmentation"]) - 1
        for a in annotations
        if isinstance(a, dict)
        and a.get("bbox") is None
        and isinstance(a.get("segmentation"), list)
        and a["segmentation"]
    )
    total = places + refused
    least, most = len(annotations), len(annotations) + several
    expect(least <= total <= most, f"{least} to {most} places and refusals", total)


def _labelme(files: dict, pairs: list) -> None:
    found = files.get("a.json")
    shapes = found.get("shapes") if isinstance(found, dict) else None
    if not isinstance(shapes, list) or not isinstance(found.get("imagePath"), str):
        return
    places = sum(len(v["places"]) for _, v in pairs if not isinstance(v, Unusable))
    refused = sum(isinstance(v, Unusable) for _, v in pairs)
    if "\0" not in found["imagePath"]:
        total = places + refused
        expect(total == len(shapes), f"{len(shapes)} places and refusals", total)


def _yolo(files: dict, pairs: list) -> None:
    text = files.get("a.txt")
    if not isinstance(text, str):
        return
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    places = sum(len(v["places"]) for _, v in pairs if not isinstance(v, Unusable))
    refused = sum(isinstance(v, Unusable) for _, v in pairs)
    expect(places + refused == len(lines), f"{len(lines)} lines", places + refused)
    labels = files.get("classes.txt")
    if not isinstance(labels, str):
        return
    names = labels.removeprefix("\ufeff").split("\n")
    names = [name.removesuffix("\r") for name in names]
    for _, value in pairs:
        if not isinstance(value, Unusable):
            expect(value["label"] in names, f"a label of {names}", value["label"])


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
    Target("places", check_lines, LINES, "jsonl", PIECES, 1.5),
)  # fmt: skip
