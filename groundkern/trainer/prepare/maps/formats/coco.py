"""COCO: one JSON file with `images`, `categories` and `annotations`, or a list of results.

An annotation has `bbox` [x, y, width, height] in pixels, and `segmentation` as polygons
[x, y, x, y, ...] or as run lengths `{"size": [height, width], "counts"}`, compressed (a text) or
not (a list). Crowds (`iscrowd`) are one place for many things, so they are passed over. Panoptic
annotations have `segments_info`, each with a box.

Results are a list of `{"image_id", "category_id", "bbox" or "segmentation", "score"}`; `--names` is
the file that has the images and categories of their numbers.

Source: cocodataset.org, format of annotations and of results; cocoapi, coco.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.maps.formats.common import (
    NO_PLACES,
    Annotations,
    Options,
    Records,
    is_size,
    only_file,
    passed,
)
from groundkern.trainer.prepare.namesakes import Images, Where, last_of, within
from groundkern.trainer.prepare.reading import Table, json_array
from groundkern.trainer.prepare.sources import Unusable

CROWDS = "crowds"
UNPLACED = "annotations without a place"


def opened(options: Options) -> Annotations:
    """The file, or the only JSON file of a folder.

    Raises:
        ConfigError: there is none, or it lists results and `--names` is not given.
    """
    data = only_file(options.data, ".json", "one JSON file in COCO's format")
    results = _starts_with(data, b"[")
    if results and options.names is None:
        wanted = "expected --names, the file with the images and categories of these results"
        raise ConfigError(f"{data}: {wanted}")
    named = options.names or data

    def read() -> Records:
        names, labels, groups = Table(), Table(), Table()
        for record in json_array(named, "images"):
            if isinstance(record, dict):
                size = [record.get("width"), record.get("height")]
                names.add(record.get("id"), [record.get("file_name"), size])
        for record in json_array(named, "categories"):
            if isinstance(record, dict):
                labels.add(record.get("id"), record.get("name"))
        placed = Table()
        images = Images(options.root, lambda: _everyone(named))
        for i, record in enumerate(json_array(data, None if results else "annotations")):
            field = f"[{i}]" if results else f"annotations[{i}]"
            where = f"{data.name}{field}" if results else f"{data.name}: {field}"
            given = record.original if isinstance(record, Unusable) else record
            if isinstance(given, dict):
                placed.add(given.get("image_id"), True)
            for there, part in _parts(record, where, field):
                found = part if isinstance(part, Unusable) else _place(part, options, names, labels)
                if isinstance(found, Unusable):
                    yield there, found
                    continue
                thing = there.removeprefix(f"{data.name}: ")
                group = {} if len(found[1]) == 1 else {"group": thing}
                for place in found[1]:
                    groups.add(found[0], {**place, **group, "field": thing})
        for (image, label, size), places in groups.groups():
            name = images.find(_where(image))
            record = {"image": name, "label": label, "places": places}
            where = f"{data.name}: {image!r:.100} {label!r:.100}"
            yield where, {**record, "size": size} if is_size(size) else record
        if not results:
            yield from _without(named, placed)

    return Annotations(read, list(dict.fromkeys([data, named])), options.root)


def _everyone(file: Path) -> Iterator[Where]:
    for record in json_array(file, "images"):
        if isinstance(record, dict) and isinstance(name := record.get("file_name"), str):
            yield _where(name)


def _where(name: str) -> Where:
    """Where an image lies by its path, and by its name alone."""
    return Where(name, within(name, "images"), within(last_of(name), "images"))


def _starts_with(file: Path, first: bytes) -> bool:
    try:
        with file.open("rb") as opened_file:
            return opened_file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == first
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _parts(record: Any, where: str, field: str) -> Iterator[tuple[str, Any]]:
    """The annotation itself, or the segments of a panoptic one."""
    if isinstance(record, Unusable):
        yield where, record
    elif not isinstance(record, dict):
        yield where, Unusable(record, "expected an object")
    elif isinstance(record.get("segments_info"), list) and record["segments_info"]:
        for j, segment in enumerate(record["segments_info"]):
            there = f"{where}.segments_info[{j}]"
            if isinstance(segment, dict):
                yield there, {**segment, "image_id": record.get("image_id")}
            else:
                yield there, Unusable(segment, "expected an object")
    else:
        yield where, record


def _place(
    record: dict, options: Options, names: Table, labels: Table
) -> tuple[list, list[dict]] | Unusable:
    """([image, label, its size], places) of an annotation, or why it has none."""
    if record.get("iscrowd") in (1, True):
        short = {name: value for name, value in record.items() if name != "segmentation"}
        return passed(short, CROWDS, "`iscrowd`: expected 0, got 1: one place for many things")
    name, label = names.get(record.get("image_id")), labels.get(record.get("category_id"))
    if not name or not label:
        lacking = "category_id" if name else "image_id"
        reason = f"`{lacking}`: expected a known one, got {record.get(lacking)!r:.80}"
        return Unusable(record, reason)
    if not isinstance(name[0][0], str):
        return Unusable(record, f"`file_name`: expected a text, got {name[0][0]!r:.80}")
    places = places_of(record, options.prefer)
    if isinstance(places, Unusable):
        return places
    return [name[0][0], label[0], name[0][1]], places


def places_of(record: dict, prefer: str) -> list[dict] | Unusable:
    """The places of an annotation: its box, or what its `segmentation` holds."""
    box, shape = record.get("bbox") or None, record.get("segmentation") or None
    if box is None and shape is None:
        return passed(record, UNPLACED, "expected a `bbox` or a `segmentation`, got neither")
    if shape is None or (box is not None and prefer == "box"):
        return [{"box": box, "order": "xywh"}]
    if isinstance(shape, dict):
        return [{"mask": {name: shape.get(name) for name in ("size", "counts")}}]
    if not isinstance(shape, list) or not all(map(_flat, shape)):
        return Unusable(record, "`segmentation`: expected lists of x, y, ... or run lengths")
    return [{"polygon": _pairs(part)} for part in shape]


def _flat(part: Any) -> bool:
    return isinstance(part, list) and len(part) % 2 == 0


def _pairs(flat: list) -> list[list]:
    return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]


def _without(file: Path, placed: Table) -> Records:
    """The images that no annotation names."""
    for i, record in enumerate(json_array(file, "images")):
        if isinstance(record, dict) and not placed.get(record.get("id")):
            yield f"{file.name}: images[{i}]", passed(record, NO_PLACES, "expected annotations")
