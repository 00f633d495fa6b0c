"""YOLO: a text file an image, a line a thing: a class number, then fractions of the image.

Four numbers are a box (centre, width, height); six and more are a polygon's corners, also the four
corners of a turned box (OBB). A file of poses says `kpt_shape` in its `data.yaml`: box, then key
points, of which only the box is used. DOTA's lines (eight pixels, a name, a difficulty) are read
too. Names are those of `data.yaml`, `classes.txt` or `obj.names`, in the folder or in the two above
it; lists that disagree are an error, and DOTA's lines need none. Images lie beside their files, or
in `images` where these are in `labels`.

Source: docs.ultralytics.com, detection, segmentation, pose and OBB data sets; Darknet's obj.names;
captain-whu.github.io/DOTA.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from groundkern.trainer.config import ConfigError
from groundkern.trainer.prepare.maps.formats.common import (
    Annotations,
    Files,
    Options,
    Records,
    by_label,
    files_of,
    image_files,
    passed,
    unplaced,
)
from groundkern.trainer.prepare.namesakes import Images, Where, within
from groundkern.trainer.prepare.reading import split_lines
from groundkern.trainer.prepare.sources import Unusable

NO_LABELS = "text files that hold no labels"
KEYPOINTS = "poses whose key points were not used"
_NAMES = ("classes.txt", "obj.names")
_YAML = (".yaml", ".yml")
_TWINS = {"labels": "images", "labelTxt": "images", "Annotations": "Images"}
_USUAL = (".jpg", ".png", ".jpeg")  # endings of images, looked for before all others
_LARGEST = 1 << 20  # bytes of a list of names


@dataclass(frozen=True)
class Classes:
    """Names by number, how many numbers a key point has and of how many there are, from where."""

    names: dict[int, str]
    keypoints: tuple[int, int] | None
    file: Path | None


def opened(options: Options) -> Annotations:
    """The text files of a folder, or of the folder that a `data.yaml` is in.

    Raises:
        ConfigError: no text files, or no names of classes.
    """
    data = options.data
    folder = data if data.is_dir() else data.parent
    found = files_of(folder, ".txt", "YOLO's .txt files").names
    files = Files([name for name in found if os.path.basename(name) not in _NAMES])
    if not files:
        raise ConfigError(f"{folder}: expected YOLO's .txt files, got none")
    classes = _classes(data, folder, files)
    root = options.images or folder
    if options.images is None:  # of a folder within `labels`, the images are beside that
        for parent in (folder, *folder.parents):
            if parent.name in _TWINS and (parent.parent / _TWINS[parent.name]).is_dir():
                root = parent.parent
                break

    def read() -> Records:
        seen = set()
        images = Images(root, lambda: (_where(file, folder, root) for file in files))
        for file in files:
            name = os.path.relpath(file, folder)
            image = images.find(_where(file, folder, root))
            seen.add(image)
            yield from _records(file, name, image, (root / image).is_file(), classes)
        for image in image_files(root):
            if image not in seen:
                yield image, unplaced(image)

    described = [] if classes.file is None else [str(classes.file)]
    return Annotations(read, Files([*described, *files.names]), root)


def _where(file: Path, folder: Path, root: Path) -> Where:
    """Where a text file's image lies: in the twin of its folder or beside it; by its name alone."""
    base = root if file.is_relative_to(root) else folder
    parts = list(file.relative_to(base).with_suffix("").parts)
    stems = []
    for i in reversed(range(len(parts) - 1)):
        if parts[i] in _TWINS:
            twin = [*parts[:i], _TWINS[parts[i]], *parts[i + 1 :]]
            stems += ["/".join(twin), "/".join(parts[:i] + parts[i + 1 :])]
            break
    stems += ["/".join(parts)]
    known = dict.fromkeys([*_USUAL, *Image.registered_extensions()])
    places, by_name = (
        [stem + ending for stem in each for ending in known]
        for each in (stems, within(parts[-1], "images"))
    )
    return Where(str(file), places, by_name)


def _records(file: Path, name: str, image: str, there: bool, classes: Classes) -> Records:
    places: list[tuple[str, dict]] = []
    bad = 0
    with file.open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith(("imagesource:", "gsd:")):
                continue
            if not there and not places and not bad and not _number(line.split()[0]):
                why = "expected a class number or corners, and an image of this name"
                yield name, passed(name, NO_LABELS, why)
                return
            place = _place(line, classes, number)
            if isinstance(place, Unusable):
                bad += 1
                yield f"{name}:{number}", place
            else:
                places.append(place)
    if not places and not bad:
        yield name, unplaced(image)
    yield from by_label(name, image, places)


def _place(line: str, classes: Classes, number: int) -> tuple[str, dict] | Unusable:
    """(label, place) of a line, or what is wrong with it."""
    first, *rest = line.split()
    place: dict[str, Any] = {"field": f"line {number}"}
    if _is_dota(line):
        return _oriented([first, *rest], place, line)
    known = classes.names
    if not first.isdecimal() or len(first) > 9 or int(first) not in known:
        return Unusable(line, f"expected a class below {len(known)}, got {first[:20]!r}")
    try:
        values = [float(text) for text in rest]
    except ValueError:
        return Unusable(line, f"expected numbers after the class, got {line.strip()[:80]!r}")
    place["coord"] = "unit"
    if classes.keypoints is not None:
        count, each = classes.keypoints
        if len(values) != 4 + count * each:
            wanted = f"4 numbers and {count} key points of {each}"
            return Unusable(line, f"expected {wanted}, got {len(values)} numbers")
        place |= {"box": values[:4], "order": "cxcywh", "notes": [KEYPOINTS]}
    elif len(values) == 4:
        place |= {"box": values, "order": "cxcywh"}
    elif len(values) >= 6 and len(values) % 2 == 0:
        place["polygon"] = _pairs(values)
    else:
        wanted = "4 numbers or the corners of a polygon (of poses, kpt_shape in data.yaml)"
        return Unusable(line, f"expected {wanted}, got {len(values)} numbers")
    return known[int(first)], place


def _is_dota(line: str) -> bool:
    words = line.split()
    return len(words) == 10 and not _number(words[8])


def _oriented(words: list[str], place: dict, line: str) -> tuple[str, dict] | Unusable:
    """DOTA's corners in pixels, a name and a difficulty."""
    try:
        values = [float(text) for text in words[:8]]
    except ValueError:
        return Unusable(line, f"expected four corners and a name, got {line.strip()[:80]!r}")
    notes = {"notes": ["difficult"]} if words[9] not in ("0", "-1") else {}
    return words[8], {**place, "polygon": _pairs(values), "clip": True, **notes}


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pairs(values: list) -> list[list]:
    return [list(pair) for pair in zip(values[::2], values[1::2], strict=True)]


def _classes(data: Path, folder: Path, files: Files) -> Classes:
    """The names of the classes.

    Raises:
        ConfigError: no file has them, what is there is no list of names, or two differ.
    """
    if data.is_file():
        if data.name in _NAMES or data.suffix in _YAML:
            return _listed(data)
        raise ConfigError(f"{data}: expected a folder, data.yaml, or {' or '.join(_NAMES)}")
    found: list[Classes] = []
    for place in (folder, *list(folder.resolve().parents)[:2]):
        for file in (*_described(place), *(place / name for name in _NAMES)):
            if file.is_file():
                found.append(_listed(file))
    for other in found[1:]:
        if any(name != found[0].names.get(number, name) for number, name in other.names.items()):
            got = f"{found[0].file} and {other.file} with others; name the one that is right"
            raise ConfigError(f"{folder}: expected one list of names, got {got}")
    if found:
        return found[0]
    with files[0].open(encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        if any(map(_is_dota, islice(lines, 8))):
            return Classes({}, None, None)
    wanted = f"data.yaml, {' or '.join(_NAMES)} with the names of YOLO's classes"
    raise ConfigError(f"{folder}: expected {wanted}")


def _described(place: Path) -> Iterator[Path]:
    """The YAML files of a folder that describe a data set."""
    for file in sorted((*place.glob("*.yaml"), *place.glob("*.yml"))):
        try:
            if file.stat().st_size <= _LARGEST and "\nnames:" in "\n" + file.read_text("utf-8"):
                yield file
        except (OSError, UnicodeDecodeError):
            continue


def _listed(file: Path) -> Classes:
    keypoints = None
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix not in _YAML:
            return Classes(dict(enumerate(split_lines(text))), None, file)
        found = yaml.safe_load(text)
        names, shape = found["names"], found.get("kpt_shape")
        names = dict(enumerate(names)) if isinstance(names, list) else names
        if not all(type(k) is int and isinstance(v, str | int) for k, v in names.items()):
            raise ValueError("`names` are no numbers with texts")
        if shape is not None:
            count, each = shape
            if type(count) is not int or not 0 < count < 1 << 16 or each not in (2, 3):
                raise ValueError("`kpt_shape` is no count with 2 or 3")
            keypoints = (count, each)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"{file}: expected a list of names in UTF-8 ({why})") from None
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{file}: expected plain YAML with names ({why})") from None
    return Classes({number: str(name) for number, name in names.items()}, keypoints, file)
