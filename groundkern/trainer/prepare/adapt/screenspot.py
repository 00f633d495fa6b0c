"""ScreenSpot and its like: an instruction and the element of a screenshot that it means.

On disk a JSON list, or a folder of such files, of which each record is one of
- ScreenSpot's `{"img_filename", "instruction", "bbox": [x, y, width, height]}` in pixels;
- the same with edges [left, top, right, bottom] as fractions (OS-Atlas, SeeClick's mobile data);
- one with a list `elements` (SeeClick's web data) or `element` (ShowUI) of instructions and boxes
  in fractions, whose image is `img_filename` or `img_url`.
On the hub rows of `image`, `instruction` and `bbox` in fractions.

Of elements of one screenshot with the same instruction ("Read more") none says which is meant: they
are passed over. A box of which no number is above 2 is one of fractions: in pixels it would be
smaller than two.

Source: github.com/njucckevin/SeeClick, readme_data.md; huggingface.co/datasets/OS-Copilot/
OS-Atlas-data, showlab/ShowUI-desktop, rootsautomation/ScreenSpot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.namesakes import Images, Where, last_of, within
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import (
    Frame,
    Phrasing,
    field_of,
    numbers,
    size_of,
)
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed

PHRASING = (Phrasing("{instruction}", "{box}"), ("instruction", "box", "point"))
_LISTS = ("elements", "element")


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The instructions, one input each."""
    if (rows := tables(options)) is not None:
        return rows, None
    data = options.data
    files = [data] if data.is_file() else sorted(data.glob("*.json"))
    if not files:
        raise ConfigError(f"{data}: expected JSON files, got none")

    root = options.images or (data if data.is_dir() else data.parent)

    def everyone() -> Iterator[Where]:
        for record in (record for file in files for record in json_array(file)):
            if isinstance(record, dict) and isinstance(name := _image(record), str):
                yield _where(name)

    def read() -> Iterator[tuple[str, Any]]:
        images = Images(root, everyone)
        for file in files:
            for i, record in enumerate(json_array(file)):
                yield from _instructions(record, f"{file.name}[{i}]", images)

    return listed(read, files), root


def _image(record: dict) -> Any:
    return record.get("img_filename", record.get("img_url"))


def _where(name: str) -> Where:
    return Where(name, within(name, "images"), within(last_of(name), "images"))


def _instructions(record: Any, where: str, images: Images) -> Iterator[tuple[str, Any]]:
    if isinstance(record, Unusable) or not isinstance(record, dict):
        bad = isinstance(record, Unusable)
        yield where, record if bad else Unusable(record, "expected an object")
        return
    name = next((n for n in _LISTS if isinstance(record.get(n), list)), None)
    image = images.find(_where(given)) if isinstance(given := _image(record), str) else given
    if name is None:
        yield where, {**record, "img_filename": image}
        return
    if not record[name]:
        yield where, Unusable(record, f"`{name}`: expected elements", "images without annotations")
    times = Counter(map(_asked, record[name]))
    for i, element in enumerate(record[name]):
        there = f"{where}.{name}[{i}]"
        if not isinstance(element, dict):
            yield there, Unusable(element, "expected an object")
        elif (number := times[asked := _asked(element)]) > 1 and asked is not None:
            why = f"`instruction`: expected {asked!r:.80} of one element, got it of {number}"
            yield there, Unusable(element, why, "instructions that several elements have")
        else:
            yield there, {**element, "img_filename": image}


def _asked(element: Any) -> str | None:
    instruction = element.get("instruction") if isinstance(element, dict) else None
    return instruction.strip() if isinstance(instruction, str) else None


def convert(item: Item, options: Options) -> Made:
    """One instruction; its region is the element's box."""
    row, where, pictures = item.value, item.where, {}
    instruction = field_of(row, "instruction", str, where).strip()
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures, size = found.path, found.files, found.size
    else:
        image = field_of(row, "img_filename", str, where)
        size = size_of(image, options.root, where)
    given = numbers(row.get("bbox"), 4, where, "bbox")
    if all(abs(value) <= 2 for value in given):
        unit, cut = Frame(1, 1, options.overhang, where).box(given, "bbox")
        box = [value * side for value, side in zip(unit, size * 2, strict=True)]
    else:
        box, cut = Frame(*size, options.overhang, where).box(given, "bbox", order="xywh")
    sample = options.phrasing(PHRASING[0]).sample(
        "screenspot",
        image,
        {"instruction": instruction},
        [{"box": box}],
        size=size,
        writer=options.writer,
        where=where,
    )
    return Made([sample], pictures, {"regions": 1, **cut})
