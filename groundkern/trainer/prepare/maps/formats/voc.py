"""Pascal VOC: an XML file an image, with `object` of a `name` and a `bndbox`.

A data set is a folder with `Annotations`, `JPEGImages` and perhaps `ImageSets/Main/<split>.txt`,
that folder's `Annotations`, or XML files beside their images. Boxes are pixels counted from 1, the
last one included: the edges are `xmin - 1, ymin - 1, xmax, ymax`. (Tools that count from 0 are off
by one pixel; a 0 stays 0.) A `part` of an object is a place with a name of its own. With `--prefer
mask` the places are those pixels of `SegmentationObject/<image>.png` that have an object's number,
where there is such a file.

Source: host.robots.ox.ac.uk/pascal/VOC, development kit of 2012, sections 3 to 5.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.maps.formats.common import (
    Annotations,
    Files,
    Options,
    Records,
    by_label,
    files_of,
    is_size,
    unplaced,
)
from groundkern.trainer.prepare.markup import plain_xml
from groundkern.trainer.prepare.namesakes import Images, Where, last_of, within
from groundkern.trainer.prepare.reading import split_lines
from groundkern.trainer.prepare.sources import Unusable

_LARGEST = 1 << 22  # bytes of a file
_ENDINGS = (".jpg", ".png", ".jpeg")
_NOTED = ("difficult", "truncated")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def opened(options: Options) -> Annotations:
    """The XML files of a folder, or those that `--split` lists.

    Raises:
        ConfigError: there are none, or no such list.
    """
    top = options.data.parent if options.data.name == "Annotations" else options.data
    base = top / "Annotations" if (top / "Annotations").is_dir() else options.data
    root = options.images or (top if top.is_dir() else top.parent)
    if options.split is None:
        files = files_of(base, ".xml", "Pascal VOC's XML files")
    else:
        files = _listed(top / "ImageSets" / "Main" / f"{options.split}.txt", base)

    def named(file: Path) -> str:
        return os.path.relpath(file, top) if top.is_dir() else file.name

    def folders(file: Path) -> list[str]:  # of its image: the twin of its own, and its own
        inner = os.path.relpath(file.parent, base if base.is_dir() else base.parent)
        beside = os.path.relpath(file.parent, root)
        own = [f"JPEGImages/{inner}", inner, beside]
        return [folder for folder in own if not folder.startswith("..")]

    def where(file: Path, image: str) -> Where:
        # some tools keep the name that an image had before it was renamed with its XML
        same = [f"{file.stem}{ending}" for ending in _ENDINGS]
        names = [image.replace("\\", "/"), *same]
        paths = (f"{folder}/{name}" for name in names for folder in folders(file))
        by_name = [path for name in names for path in within(last_of(name), "JPEGImages")]
        return Where(named(file), list(map(os.path.normpath, paths)), by_name)

    def read() -> Records:
        images = Images(root, lambda: (where(file, f"{file.stem}.jpg") for file in files))
        for file in files:
            name = named(file)
            try:
                if file.stat().st_size > _LARGEST:
                    raise ValueError(f"expected at most {_LARGEST} bytes")
                found = plain_xml(file.read_bytes())
            except (OSError, ValueError) as error:
                yield name, Unusable(name, f"expected Pascal VOC's XML ({error})")
                continue
            image = (found.findtext("filename") or "").strip() or f"{file.stem}.jpg"
            image = images.find(where(file, image))
            yield from _records(found, name, image, images, options.prefer)

    return Annotations(read, Files(list(filter(os.path.isfile, files.names))), root)


def _listed(chosen: Path, base: Path) -> Files:
    """The annotation files of an image set, whose lines are a name and perhaps a number."""
    try:
        lines = split_lines(chosen.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{chosen}: expected the list that --split names ({error})") from None
    names = dict.fromkeys(line.split()[0] for line in lines if line.strip())
    bad = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if bad:
        raise ConfigError(f"{chosen}: expected names of images, got {bad[0]!r:.80}")
    return Files([str(base / f"{name}.xml") for name in names])


def _records(found: Element, name: str, image: str, images: Images, prefer: str) -> Records:
    sizes = [found.findtext(f"size/{side}") or "" for side in ("width", "height")]
    size = [int(text) if text.strip().isdecimal() and len(text) < 9 else 0 for text in sizes]
    places: list[tuple[str, dict]] = []
    things = found.findall("object")
    if not things:
        yield name, unplaced(name)
    inner = os.path.splitext(image.removeprefix("JPEGImages/"))[0]
    masks = f"SegmentationObject/{inner}.png"
    with_masks = prefer == "mask" and images.there(masks)
    for number, thing in enumerate(things, start=1):
        for field, label, place in _places(thing, f"object[{number - 1}]"):
            if isinstance(place, Unusable) or not label:
                why = "`name`: expected a text of an object, got none"
                unusable = place if isinstance(place, Unusable) else Unusable(label, why)
                yield f"{name}: {field}", unusable
                continue
            if with_masks and "part" not in field:
                place = {"mask": masks, "mask_value": number, "field": field}
            noted = [mark for mark in _NOTED if (thing.findtext(mark) or "").strip() == "1"]
            places.append((label, {**place, "notes": noted} if noted else place))
    yield from by_label(name, image, places, size if is_size(size) else None)


def _places(thing: Element, field: str) -> Iterator[tuple[str, str, Any]]:
    """(field, label, place or what is wrong with it) of an object and of its parts."""
    boxes = [(field, thing), *((f"{field}.part[{i}]", p) for i, p in enumerate(thing.iter("part")))]
    for there, part in boxes:
        label = (part.findtext("name") or "").strip()
        texts = [part.findtext(f"bndbox/{side}") or "nothing" for side in _SIDES]
        try:
            low, high = ([float(text) for text in two] for two in (texts[:2], texts[2:]))
        except ValueError:
            yield there, label, Unusable(label, f"`bndbox`: expected four numbers, got {texts}")
            continue
        edges = [max(0.0, value - 1) if value >= 0 else value - 1 for value in low]
        yield there, label, {"box": [*edges, *high], "field": there}
