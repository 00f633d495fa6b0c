"""LabelMe: a JSON file an image, with `imagePath` relative to it and `shapes` in pixels.

A shape has `label`, `shape_type` and `points`: rectangle (two corners in any order), polygon,
oriented_rectangle, circle (its middle and a point on it), line, linestrip, point(s), and mask (two
corners, both included, and a PNG in base64). Shapes of one label and `group_id` are one thing.
`__ignore__` marks what is not to be learnt; `flags` of an image are no places.

If images are not there but inside their files (`imageData`), they are written beside the output,
and so are the others then, because all paths start from one folder.

Source: github.com/wkentaro/labelme, _label_file.py, _utils/shape.py, examples.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from PIL import Image

from groundkern.trainer.data.images import SampleError, confined
from groundkern.trainer.prepare.adapt.common import encoded
from groundkern.trainer.prepare.maps.formats.common import (
    Annotations,
    Options,
    Records,
    by_label,
    files_of,
    is_size,
    passed,
    unplaced,
)
from groundkern.trainer.prepare.maps.formats.masks import from_png, pasted
from groundkern.trainer.prepare.maps.formats.shapes import ellipse
from groundkern.trainer.prepare.pipeline import write_image
from groundkern.trainer.prepare.placing import numbers
from groundkern.trainer.prepare.reading import plain_json
from groundkern.trainer.prepare.sources import Unusable

IGNORED = "shapes labelled __ignore__"
_LARGEST = 1 << 26  # bytes of a file, which may hold an image
_KNOWN = {"polygon": "polygon", "oriented_rectangle": "polygon", "line": "polyline"}
_KNOWN |= {"linestrip": "polyline", "point": "points", "points": "points"}


def opened(options: Options) -> Annotations:
    """The JSON files of a folder.

    Raises:
        ConfigError: there are none.
    """
    files = files_of(options.data, ".json", "LabelMe's JSON files")
    top = options.data if options.data.is_dir() else options.data.parent
    root = options.root
    written = any(_inside_only(file, root) for file in files)

    def read() -> Records:
        for file in files:
            name = os.path.relpath(file, top)
            try:
                found = _content(file)
                shapes, image = found["shapes"], _image(found, file, root)
                if not isinstance(shapes, list):
                    raise TypeError("`shapes` is no list")
                if written and shapes:
                    image = _beside(found, image, options, name)
            except SampleError as error:
                yield name, Unusable(name, str(error).removeprefix(f"{name}: "))
                continue
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
                reason = f"expected LabelMe's JSON with shapes and imagePath, got {e!r}"
                yield name, Unusable(name, reason)
                continue
            size = [found.get("imageWidth"), found.get("imageHeight")]
            places = []
            if not shapes:
                yield name, unplaced(name)
            for i, shape in enumerate(shapes):
                place = _place(shape, f"shapes[{i}]", size)
                if isinstance(place, Unusable):
                    yield f"{name}: shapes[{i}]", place
                else:
                    places.append((shape["label"], place))
            yield from by_label(name, image, places, size if is_size(size) else None)

    return Annotations(read, files, options.output.parent if written else root)


def _content(file: Path) -> dict:
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"more than {_LARGEST} bytes")
    return plain_json(file.read_bytes())


def _image(found: dict, file: Path, root: Path) -> str:
    """The image's path below the root, whether or not it is there."""
    return os.path.relpath(file.parent / found["imagePath"].replace("\\", "/"), root)


def _inside_only(file: Path, root: Path) -> bool:
    """Whether a file holds an image that is not below the root: missing, linked away, or named as
    the JSON file itself.
    """
    try:
        found = _content(file)
        image = _image(found, file, root) if found["imageData"] else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    if image is None:
        return False
    try:
        confined(image, root, where="", field="")
    except SampleError:
        return True
    return Path(image).suffix.lower() not in Image.registered_extensions()


def _beside(found: dict, image: str, options: Options, where: str) -> str:
    """The path below the output's folder of an image that is written there, named by its hash."""
    if found.get("imageData"):
        try:
            data = base64.b64decode(found["imageData"], validate=True)
        except (TypeError, binascii.Error, ValueError) as error:
            raise SampleError(f"`imageData`: expected an image in base64 ({error})") from None
    else:
        data = confined(image, options.root, where=where, field="imagePath").read_bytes()
    stem = f"{options.output.stem}_images/{hashlib.sha256(data).hexdigest()[:16]}"
    path = stem + encoded(data, where, "imageData")[0]
    if not (options.output.parent / path).exists():
        write_image(options.output.parent / path, data)
    return path


def _place(shape: Any, field: str, size: list) -> dict | Unusable:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        return Unusable(shape, "`label`: expected a text of a shape")
    if shape["label"] == "__ignore__":
        return passed(shape, IGNORED, "`label`: expected what is to be learnt, got __ignore__")
    kind, points = shape.get("shape_type", "polygon"), shape.get("points")
    place: dict[str, Any] = {"field": field}
    if shape.get("group_id") is not None:
        place["group"] = f"{shape['group_id']!r:.80}"
    if isinstance(kind, str) and kind in _KNOWN:
        clip = {"clip": True} if kind == "oriented_rectangle" else {}
        return {**place, _KNOWN[kind]: points, **clip}
    if kind not in ("rectangle", "circle", "mask"):
        wanted = ", ".join(["rectangle", "circle", "mask", *_KNOWN])
        reason = f"`shape_type`: expected one of {wanted}, got {kind!r:.80}"
        return passed(shape, f"shapes of an unknown kind, {kind!r:.40}", reason)
    try:
        (ax, ay), (bx, by) = (numbers(point, 2, "", "point") for point in points)
    except (TypeError, ValueError):
        two = "the middle of a circle and a point on it" if kind == "circle" else "two corners"
        return Unusable(shape, f"`points`: expected {two}, got {points!r:.80}")
    if kind == "circle":
        radius = math.hypot(bx - ax, by - ay)
        return {**place, "polygon": ellipse(ax, ay, radius, radius), "clip": True}
    box = [min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)]
    if kind == "rectangle":
        return {**place, "box": box}
    left, top, right, bottom = (int(value) for value in box)
    try:
        bitmap = from_png(shape.get("mask"), (right - left + 1, bottom - top + 1))
        return {**place, "mask": pasted(bitmap, left, top, (size[0], size[1]))}
    except ValueError as error:
        return Unusable({**shape, "mask": "..."}, f"`mask`: {error}")
