"""Label Studio: JSON or JSON-MIN exports, a list of tasks with results in percent of the image.

A result is a rectangle or an ellipse (both with a rotation), a polygon, a key point, or what a
brush painted (run lengths of the image). Of several annotations of a task the ground truth is
taken, else the one that was changed last. Tasks name their image by its address; it is looked for
below `--images` and nothing is downloaded: by what follows `/data/local-files/?d=`, by what follows
`/data/upload/` (with and without the prefix that uploads get), or by the end of a URL's path.

Source: labelstud.io/guide/export, /tags/{rectangle,ellipse,polygon,keypoint,brush}labels;
github.com/HumanSignal/label-studio-converter, tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image

from groundkern.trainer.data.images import SampleError
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
from groundkern.trainer.prepare.maps.formats.masks import from_brush, pasted
from groundkern.trainer.prepare.maps.formats.shapes import corners, ellipse, turned
from groundkern.trainer.prepare.namesakes import Images, Where
from groundkern.trainer.prepare.placing import numbers
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Unusable

OTHERS = "annotations of a task of which another was taken"
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
_LABELS = re.compile(r"^(rectangle|polygon|ellipse|keypoint|brush|vector|hypertext)?labels$")


def opened(options: Options) -> Annotations:
    """The file, or the only JSON file of a folder.

    Raises:
        ConfigError: there is none.
    """
    data = only_file(options.data, ".json", "one JSON export of Label Studio")

    def read() -> Records:
        images = Images(options.root, lambda: _everyone(data))
        for i, task in enumerate(json_array(data)):
            where = f"{data.name}[{i}]"
            if not isinstance(task, dict):
                unusable = isinstance(task, Unusable)
                yield where, task if unusable else Unusable(task, "expected a task, an object")
                continue
            yield from _records(task, where, images)

    return Annotations(read, [data], options.root)


def _records(task: dict, where: str, images: Images) -> Records:
    image = _address(task.get("data", task))
    if image is None:
        wanted = "expected one field of the task that names an image"
        yield where, Unusable({**task, "annotations": "..."}, wanted)
        return
    whole = isinstance(task.get("annotations", task.get("completions")), list)
    found, others = _chosen(task, where) if whole else (list(_short(task, where)), [])
    yield from others
    if not found:
        yield where, unplaced(image)
        return
    name = images.find(_where(image))
    places: list[tuple[str, dict]] = []
    sizes = set()
    for there, result in found:
        place = _place(result, there.removeprefix(f"{where}."))
        if isinstance(place, Unusable):
            yield there, place
            continue
        places += [(label, place) for label in _labels(result)]
        size = (result.get("original_width"), result.get("original_height"))
        sizes |= {size} if is_size(size) else set()
    yield from by_label(where, name, places, list(sizes.pop()) if len(sizes) == 1 else None)


def _chosen(task: dict, where: str) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The results of one annotation of a task, and the other annotations."""
    name = "annotations" if "annotations" in task else "completions"
    there = [(f"{where}.{name}[{i}]", each) for i, each in enumerate(task[name])]
    used = [
        (place, each)
        for place, each in there
        if isinstance(each, dict)
        and not (each.get("was_cancelled") or each.get("skipped"))
        and isinstance(each.get("result"), list)
    ]
    used.sort(key=lambda pair: (pair[1].get("ground_truth") is True, _changed(pair[1])))
    others = [
        (place, passed({"id": each.get("id")}, OTHERS, "expected one annotation of a task"))
        for place, each in used[:-1]
    ]
    results = [
        (f"{place}.result[{i}]", result)
        for place, each in used[-1:]
        for i, result in enumerate(each["result"])
    ]
    return results, others


def _changed(annotation: dict) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _short(task: dict, where: str) -> Iterator[tuple[str, Any]]:
    """JSON-MIN: the values of regions, directly under the names of their controls."""
    for name, values in task.items():
        if not isinstance(values, list):
            continue
        for i, value in enumerate(values):
            if isinstance(value, dict) and any(map(_LABELS.match, value)):
                outer = {key: value.get(key) for key in ("original_width", "original_height")}
                yield f"{where}.{name}[{i}]", {**outer, "value": value}


def _labels(result: dict) -> list[str]:
    """The names of a result; one of several names is a place of each."""
    value = result["value"]
    found = [value[key] for key in value if _LABELS.match(key)]
    return [name for names in found if isinstance(names, list) for name in names]


def _place(result: Any, field: str) -> dict | Unusable:
    value = result.get("value") if isinstance(result, dict) else None
    if not isinstance(value, dict):
        kind = result.get("type") if isinstance(result, dict) else result
        return passed(result, f"results of another kind, {kind!r:.40}", "expected a region")
    if not any(key in value for key in ("x", "points", "rle")):
        kind = result.get("type") or next(iter(value), None)
        return passed(result, f"results of another kind, {kind!r:.40}", "expected a region")
    names = _labels(result)
    if not names:
        return passed(result, NO_LABEL, "expected a label of the region, got none")
    if not all(isinstance(name, str) for name in names):
        return Unusable(result, f"expected texts as labels, got {names!r:.80}")
    if result.get("image_rotation") or value.get("image_rotation"):
        return Unusable(result, "`image_rotation`: expected 0: turn the image itself instead")
    size = [result.get(f"original_{side}", 0) for side in ("width", "height")]
    try:
        return {**_shape(value, size), "field": field}
    except SampleError as error:
        return Unusable(result, str(error).removeprefix(": "))
    except ValueError as error:
        return Unusable({**result, "value": "..."}, str(error))


def _shape(value: dict, size: list) -> dict[str, Any]:
    """The place of a value, in percent; a turned one in pixels of the image that was annotated.

    Raises:
        ValueError: not numbers, or no size where one is needed.
    """
    if "rle" in value:
        return {"mask": pasted(from_brush(value["rle"], tuple(size)), 0, 0, tuple(size))}
    if "points" in value:
        return {"polygon": value["points"], "coord": "percent"}
    oval = "radiusX" in value
    if not oval and "height" not in value:
        return {"points": [[value.get("x"), value.get("y")]], "coord": "percent"}
    names = ("x", "y", "radiusX", "radiusY") if oval else ("x", "y", "width", "height")
    x, y, across, down = numbers([value.get(name) for name in names], 4, "", "value")
    (degrees,) = numbers([value.get("rotation") or 0], 1, "", "rotation")
    if not oval and degrees % 360 == 0:
        return {"box": [x, y, across, down], "order": "xywh", "coord": "percent"}
    if not is_size(size):
        raise ValueError(f"`original_width`, `original_height`: expected a size, got {size}")
    x, across = x * size[0] / 100, across * size[0] / 100
    y, down = y * size[1] / 100, down * size[1] / 100
    shape = ellipse(x, y, across, down) if oval else corners(x, y, x + across, y + down)
    # a rectangle turns about its top left corner, an ellipse about its middle
    return {"polygon": turned(shape, degrees, (x, y)), "clip": True}


def _address(data: Any) -> str | None:
    """The image's address: under `image`, or the only text that looks like one."""
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("image"), str):
        return data["image"]
    found = [v for v in data.values() if isinstance(v, str) and _is_image(v)]
    return found[0] if len(found) == 1 else None


def _is_image(address: str) -> bool:
    if address.startswith(("/data/upload/", "/data/local-files/")):
        return True
    ending = PurePosixPath(unquote(address.partition("?")[0][-300:])).suffix.lower()
    return ending in Image.registered_extensions()


def _everyone(data: Path) -> Iterator[Where]:
    for task in json_array(data):
        if isinstance(task, dict) and (address := _address(task.get("data", task))) is not None:
            yield _where(address)


def _where(address: str) -> Where:
    """Where an image lies below the root by its address, and by the end of that."""
    try:
        parts = urlsplit(address)
        path = unquote(parts.path)
        asked = parse_qs(parts.query).get("d")
    except ValueError:
        return Where(address, [address[:300]], [])
    if path.endswith("/data/local-files/") and asked:
        path = asked[0]
    path = path.partition("/data/upload/")[2] or path
    steps = path.lstrip("/").split("/")
    if ".." in steps or not steps[-1]:
        return Where(address, [address[:300]], [])
    plain = _UPLOADED.sub("", steps[-1])
    ends = ["/".join(steps[i:]) for i in range(1, min(len(steps), 16))]
    by_name = [*ends, f"images/{steps[-1]}", plain, f"images/{plain}"]
    return Where(address, ["/".join(steps)], by_name)
