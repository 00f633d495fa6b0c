"""COCO, LabelMe and YOLO annotations as `{"image", "label", "places"}` records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.config import ConfigError
from trainer.data.dataset import MAX_LINE
from trainer.prepare.reading import Table, json_array, plain_json, split_lines
from trainer.prepare.sources import Unusable

Records = Iterator[tuple[str, Any]]
Reader = Callable[[], Records]


def coco(data: Path, root: Path) -> tuple[Reader, list[Path]]:
    """COCO's `instances.json`: `images`, `categories`, `annotations` with `bbox` [x, y, width,
    height] in pixels or, without a box, `segmentation` as polygons [x, y, x, y, ...].

    Source: cocodataset.org, format of annotations.
    """
    if not data.is_file():
        raise ConfigError(f"{data}: expected a JSON file in COCO's format")

    def read() -> Records:
        names, labels, groups = Table(), Table(), Table()
        for record in json_array(data, "images"):
            if isinstance(record, dict):
                names.add(record.get("id"), record.get("file_name"))
        for record in json_array(data, "categories"):
            if isinstance(record, dict):
                labels.add(record.get("id"), record.get("name"))
        for i, record in enumerate(json_array(data, "annotations")):
            field = f"annotations[{i}]"
            if isinstance(record, Unusable):
                yield f"{data.name}: {field}", record
                continue
            if not isinstance(record, dict):
                yield f"{data.name}: {field}", Unusable(record, "expected an object")
                continue
            name, label = names.get(record.get("image_id")), labels.get(record.get("category_id"))
            if not name or not label:
                lacking = "category_id" if name else "image_id"
                reason = f"`{lacking}`: expected a known one, got {record.get(lacking)!r}"
                yield f"{data.name}: {field}", Unusable(record, reason)
                continue
            places = _coco_places(record, field)
            if isinstance(places, str):
                yield f"{data.name}: {field}", Unusable(record, places)
            for place in places if isinstance(places, list) else ():
                groups.add([name[0], label[0]], place)
        for (image, label), places in groups.groups():
            where = f"{data.name}: {image!r:.100} {label!r:.100}"
            yield where, {"image": image, "label": label, "places": places}

    return read, [data]


def _coco_places(record: dict, field: str) -> list[dict] | str:
    """The places of an annotation, or why it has none."""
    if record.get("bbox") is not None:
        return [{"box": record["bbox"], "order": "xywh", "field": field}]
    polygons = record.get("segmentation")
    if isinstance(polygons, dict):
        return "`segmentation`: expected polygons, got run lengths"
    if not isinstance(polygons, list) or not polygons:
        return "expected a `bbox` or polygons as `segmentation`, got neither"
    if not all(isinstance(flat, list) and len(flat) % 2 == 0 for flat in polygons):
        return "`segmentation`: expected lists of x, y, x, y, ..."
    return [{"polygon": _pairs(flat), "field": field} for flat in polygons]


def _pairs(flat: list) -> list[list]:
    return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]


def labelme(data: Path, root: Path) -> tuple[Reader, list[Path]]:
    """LabelMe's JSON files, one an image: `imagePath` relative to the file, and `shapes` of
    `label`, `shape_type` and `points` in pixels. Rectangles, polygons, points, lines and
    linestrips; a rectangle's corners come in any order.

    Source: github.com/wkentaro/labelme, label_file.py.
    """
    files = sorted(data.rglob("*.json")) if data.is_dir() else [data]
    if not files:
        raise ConfigError(f"{data}: expected LabelMe's JSON files, got none")

    def read() -> Records:
        for file in files:
            name = os.path.relpath(file, data if data.is_dir() else data.parent)
            try:
                if file.stat().st_size > MAX_LINE:
                    raise ValueError(f"more than {MAX_LINE} bytes")
                found = plain_json(file.read_bytes())
                shapes, image = found["shapes"], found["imagePath"].replace("\\", "/")
                image = os.path.relpath(file.parent / image, root)
                if not isinstance(shapes, list):
                    raise TypeError("`shapes` is no list")
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
                reason = f"expected LabelMe's JSON with shapes and imagePath, got {e!r}"
                yield name, Unusable(name, reason)
                continue
            groups: dict[str, list[dict]] = {}
            for i, shape in enumerate(shapes):
                place = _labelme_place(shape, f"shapes[{i}]")
                if isinstance(place, str):
                    yield f"{name}: shapes[{i}]", Unusable(shape, place)
                else:
                    groups.setdefault(shape["label"], []).append(place)
            for label, places in groups.items():
                record = {"image": image, "label": label, "places": places}
                yield f"{name}: {label!r}", record

    return read, files


def _labelme_place(shape: Any, field: str) -> dict | str:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        return "`label`: expected a text of a shape"
    kind, points = shape.get("shape_type", "polygon"), shape.get("points")
    known = {"polygon": "polygon", "line": "polyline", "linestrip": "polyline"}
    known |= {"point": "points", "points": "points"}
    if isinstance(kind, str) and kind in known:
        return {known[kind]: points, "field": field}
    if kind != "rectangle":
        wanted = ", ".join(["rectangle", *known])
        return f"`shape_type`: expected one of {wanted}, got {kind!r}"
    try:
        (ax, ay), (bx, by) = points
        box = [min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)]
    except (TypeError, ValueError):
        return f"`points`: expected two corners of a rectangle, got {points!r}"
    return {"box": box, "field": field}


def yolo(data: Path, root: Path) -> tuple[Reader, list[Path]]:
    """YOLO's text files, one an image of the same name: lines of a class number and a centre, width
    and height, or three corners of a polygon and more, in fractions of the image. The classes'
    names are the lines of `classes.txt` in the folder.

    Source: docs.ultralytics.com, detection and segmentation data sets.
    """
    classes = data / "classes.txt"
    files = [file for file in sorted(data.rglob("*.txt")) if file != classes]
    if not (classes.is_file() and files):
        raise ConfigError(f"{data}: expected a folder of YOLO's .txt files with classes.txt")
    try:
        labels = split_lines(classes.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{classes}: expected a list of names in UTF-8 ({error})") from None

    def read() -> Records:
        known = Image.registered_extensions()
        for file in files:
            name = os.path.relpath(file, data)
            stem = os.path.splitext(name)[0]
            image = next((stem + e for e in known if (root / (stem + e)).is_file()), f"{stem}.jpg")
            groups: dict[str, list[dict]] = {}
            with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    place = _yolo_place(line, labels, number)
                    if isinstance(place, str):
                        yield f"{name}:{number}", Unusable(line, place)
                    else:
                        groups.setdefault(place[0], []).append(place[1])
            for label, places in groups.items():
                yield f"{name}: {label!r}", {"image": image, "label": label, "places": places}

    return read, [classes, *files]


def _yolo_place(line: str, labels: list[str], number: int) -> tuple[str, dict] | str:
    """(label, place) of a line, or what is wrong with it."""
    first, *rest = line.split()
    if not first.isdecimal() or len(first) > 9 or int(first) >= len(labels):
        return f"expected a class below {len(labels)}, got {first[:20]!r}"
    try:
        values = [float(text) for text in rest]
    except ValueError:
        return f"expected numbers after the class, got {line.strip()[:80]!r}"
    place: dict[str, Any] = {"coord": "unit", "field": f"line {number}"}
    if len(values) == 4:
        place |= {"box": values, "order": "cxcywh"}
    elif len(values) >= 6 and len(values) % 2 == 0:
        place["polygon"] = _pairs(values)
    else:
        return f"expected 4 numbers or the corners of a polygon, got {len(values)} numbers"
    return labels[int(first)], place


READERS = {"coco": coco, "labelme": labelme, "yolo": yolo}
