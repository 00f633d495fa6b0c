"""CVAT: its XML 1.1 for images and for videos, in pixels.

Of an `image`: box, polygon, polyline, points, ellipse and mask (run lengths along the rows within
left, top, width, height), boxes and ellipses with a `rotation` about their middle. Of a video:
`track`s with the same shapes by `frame`, of which those `outside` are no place; the frame's image
is `frame_<number>` of six digits, in `images` or beside the XML.

Source: docs.cvat.ai, XML annotation format 1.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from groundkern.trainer.prepare.maps.formats.common import (
    NO_LABEL,
    Annotations,
    Options,
    Records,
    by_label,
    is_size,
    only_file,
    passed,
    unplaced,
)
from groundkern.trainer.prepare.maps.formats.masks import from_rows, pasted
from groundkern.trainer.prepare.maps.formats.shapes import corners, ellipse, turned
from groundkern.trainer.prepare.markup import xml_children
from groundkern.trainer.prepare.namesakes import Images, Where, last_of, within
from groundkern.trainer.prepare.placing import first_there
from groundkern.trainer.prepare.reading import Table
from groundkern.trainer.prepare.sources import Unusable

OUTSIDE = "places of a track outside of its frame"
_POINTS = {"polygon": "polygon", "polyline": "polyline", "points": "points"}
_ENDINGS = (".PNG", ".png", ".jpg", ".jpeg")


def opened(options: Options) -> Annotations:
    """The file, or the only XML file of a folder.

    Raises:
        ConfigError: there is none.
    """
    data = only_file(options.data, ".xml", "one XML file of CVAT")
    root = options.root

    def read() -> Records:
        frames, size = Table(), None
        images = Images(root, lambda: _everyone(data))
        for number, element in enumerate(xml_children(data)):
            if element.tag == "meta":
                size = _size(element, "task/original_size/width", "task/original_size/height")
            elif element.tag == "image":
                if options.split in (None, element.get("subset")):
                    yield from _of_image(element, number, data.name, images)
            elif element.tag == "track":
                yield from _of_track(element, number, data.name, size, frames)
        for (frame, label), places in frames.groups():
            names = [f"frame_{frame:06d}{ending}" for ending in _ENDINGS]
            image = first_there(root, [*(f"images/{name}" for name in names), *names])
            record = {"image": image, "label": label, "places": places}
            where = f"{data.name}: frame {frame} {label!r:.100}"
            yield where, record if size is None else {**record, "size": size}

    return Annotations(read, [data], root)


def _everyone(file: Path) -> Iterator[Where]:
    for element in xml_children(file):
        if element.tag == "image" and element.get("name"):
            yield _where(element)


def _where(element: Element) -> Where:
    """Where an image lies by its subset and name, and without its subset or folders."""
    name = element.get("name") or ""
    path = "/".join(filter(None, [element.get("subset"), name]))
    short = [*within(name, "images"), *within(last_of(name), "images")]
    return Where(path, within(path, "images")[::-1], short)


def _size(element: Element, across: str, down: str) -> list[int] | None:
    """(width, height) that an element has as texts or, without a path, as attributes."""
    texts = [element.findtext(name) or element.get(name) or "" for name in (across, down)]
    size = [int(text) if text.strip().isdecimal() and len(text) < 9 else 0 for text in texts]
    return size if is_size(size) else None


def _of_image(element: Element, number: int, name: str, images: Images) -> Records:
    where = f"{name}: image[{element.get('id', number)}]"
    image, size = element.get("name") or "", _size(element, "width", "height")
    if not image:
        yield where, Unusable(dict(element.attrib), "`name`: expected the name of an image")
        return
    path = images.find(_where(element))
    places: list[tuple[str, dict]] = []
    if not len(element):
        yield where, unplaced(image)
    for i, shape in enumerate(element):
        place = _place(shape, f"{shape.tag}[{i}]", size)
        if isinstance(place, Unusable):
            yield f"{where}.{shape.tag}[{i}]", place
        else:
            places.append(((shape.get("label") or "").strip(), place))
    yield from by_label(where, path, places, size)


def _of_track(
    track: Element, number: int, name: str, size: list[int] | None, frames: Table
) -> Iterator[tuple[str, Any]]:
    where = f"{name}: track[{track.get('id', number)}]"
    for i, shape in enumerate(track):
        there, frame = f"{where}.{shape.tag}[{i}]", shape.get("frame", "")
        if shape.get("outside") == "1":
            yield there, passed(dict(shape.attrib), OUTSIDE, "`outside`: expected 0, got 1")
            continue
        shape.set("label", shape.get("label") or track.get("label") or "")
        place = _place(shape, there.removeprefix(f"{name}: "), size)
        if not frame.isdecimal() or len(frame) > 9:
            place = Unusable(dict(shape.attrib), f"`frame`: expected a number, got {frame!r:.40}")
        if isinstance(place, Unusable):
            yield there, place
        else:
            frames.add([int(frame), shape.get("label").strip()], place)


def _place(shape: Element, field: str, size: list[int] | None) -> dict | Unusable:
    given = {key: value for key, value in shape.attrib.items() if key != "rle"}
    if shape.tag not in (*_POINTS, "box", "ellipse", "mask"):
        kind = f"shapes of another kind, {shape.tag!r:.40}"
        return passed(given, kind, f"expected a shape with a place, got {shape.tag!r:.40}")
    if not (shape.get("label") or "").strip():
        return passed(given, NO_LABEL, "`label`: expected a text, got none")
    try:
        return {**_shape(shape, size), "field": field}
    except ValueError as error:
        return Unusable(given, str(error))


def _shape(shape: Element, size: list[int] | None) -> dict[str, Any]:
    """A shape's place.

    Raises:
        ValueError: one sentence: not numbers, or runs of another size.
    """
    if shape.tag in _POINTS:
        pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
        try:
            return {_POINTS[shape.tag]: [[float(x), float(y)] for x, y in pairs]}
        except ValueError:
            got = shape.get("points", "")
            raise ValueError(f"`points`: expected x,y;x,y;..., got {got!r:.80}") from None
    degrees = _numbers(shape, "rotation")[0] if shape.get("rotation") else 0.0
    if shape.tag == "mask":
        left, top, width, height = (int(v) for v in _numbers(shape, "left", "top", *_SIDES))
        runs = [text.strip() for text in shape.get("rle", "").split(",")]
        if not all(text.isdecimal() and len(text) < 10 for text in runs):
            raise ValueError("`rle`: expected whole numbers with commas between")
        bitmap = from_rows([int(text) for text in runs], (width, height))
        if size is None:
            raise ValueError("`width`, `height`: expected the image's size for a mask, got none")
        return {"mask": pasted(bitmap, left, top, (size[0], size[1]))}
    if shape.tag == "ellipse":
        x, y, rx, ry = _numbers(shape, "cx", "cy", "rx", "ry")
        return {"polygon": turned(ellipse(x, y, rx, ry), degrees, (x, y)), "clip": True}
    x0, y0, x1, y1 = _numbers(shape, "xtl", "ytl", "xbr", "ybr")
    if degrees % 360 == 0:
        return {"box": [x0, y0, x1, y1]}
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    return {"polygon": turned(corners(x0, y0, x1, y1), degrees, middle), "clip": True}


_SIDES = ("width", "height")


def _numbers(shape: Element, *names: str) -> list[float]:
    texts = [shape.get(name, "nothing") for name in names]
    try:
        found = [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"{', '.join(names)}: expected numbers, got {texts!r:.80}") from None
    if not all(abs(value) < 1e9 for value in found):
        raise ValueError(f"{', '.join(names)}: expected finite numbers, got {texts!r:.80}")
    return found
