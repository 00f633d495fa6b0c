"""ScreenSpot and its like: an instruction and the element of a screenshot that it means.

On disk a JSON list, or a folder of such files, of which each record is one of
- ScreenSpot's `{"img_filename", "instruction", "bbox": [x, y, width, height]}` in pixels;
- the same with edges [left, top, right, bottom] as fractions (OS-Atlas, SeeClick's mobile data);
- one with a list `elements` (SeeClick's web data) or `element` (ShowUI) of instructions and boxes
  in fractions, whose image is `img_filename` or `img_url`.
On the hub rows of `image`, `instruction` and `bbox` in fractions.

A box of which no number is above 2 is one of fractions: in pixels it would be smaller than two.

Source: github.com/njucckevin/SeeClick, readme_data.md; huggingface.co/datasets/OS-Copilot/
OS-Atlas-data, showlab/ShowUI-desktop, rootsautomation/ScreenSpot.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.config import ConfigError
from trainer.prepare.adapt.common import Options, embedded, tables
from trainer.prepare.pipeline import Made
from trainer.prepare.placing import (
    Frame,
    Phrasing,
    field_of,
    first_there,
    numbers,
    per_mille,
    size_of,
)
from trainer.prepare.reading import json_array
from trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = (Phrasing("{instruction}", "{box}"), ("instruction", "box"))
_LISTS = ("elements", "element")


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The instructions, one input each."""
    if (rows := tables(options)) is not None:
        return rows, None
    data = options.data
    files = [data] if data.is_file() else sorted(data.glob("*.json"))
    if not files:
        raise ConfigError(f"{data}: expected JSON files, got none")

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            for i, record in enumerate(json_array(file)):
                yield from _instructions(record, f"{file.name}[{i}]")

    return listed(read, files), options.images or (data if data.is_dir() else data.parent)


def _instructions(record: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(record, Unusable) or not isinstance(record, dict):
        bad = isinstance(record, Unusable)
        yield where, record if bad else Unusable(record, "expected an object")
        return
    name = next((n for n in _LISTS if isinstance(record.get(n), list)), None)
    image = record.get("img_filename", record.get("img_url"))
    if name is None:
        yield where, {**record, "img_filename": image}
        return
    if not record[name]:
        yield where, Unusable(record, f"`{name}`: expected elements", "images without annotations")
    for i, element in enumerate(record[name]):
        there = f"{where}.{name}[{i}]"
        if isinstance(element, dict):
            yield there, {**element, "img_filename": image}
        else:
            yield there, Unusable(element, "expected an object")


def convert(item: Item, options: Options) -> Made:
    """One instruction; its region is the element's box."""
    row, where, pictures = item.value, item.where, {}
    instruction = field_of(row, "instruction", str, where).strip()
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures, size = found.path, found.files, found.size
    else:
        name = field_of(row, "img_filename", str, where)
        last = PurePosixPath(name).name
        image = first_there(options.root, [name, last, f"images/{name}", f"images/{last}"])
        size = size_of(image, options.root, where)
    given = numbers(row.get("bbox"), 4, where, "bbox")
    if all(abs(value) <= 2 for value in given):
        unit, cut = Frame(1, 1, options.overhang, where).box(given, "bbox")
        box = [value * side for value, side in zip(unit, size * 2, strict=True)]
    else:
        box, cut = Frame(*size, options.overhang, where).box(given, "bbox", order="xywh")
    values = {"instruction": instruction, "box": per_mille(box, size)}
    phrasing = options.phrasing(PHRASING[0])
    sample = phrasing.sample("screenspot", image, values, [{"box": box}])
    return Made([sample], pictures, {"regions": 1, **cut})
