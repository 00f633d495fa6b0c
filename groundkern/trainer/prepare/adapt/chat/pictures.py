"""Images as chat data refer to them: files, data URLs, base64 and bytes; never the network."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from groundkern.trainer.data.images import SampleError, confined, image_size, wrong
from groundkern.trainer.prepare.adapt.chat.turns import REFERENCES
from groundkern.trainer.prepare.adapt.common import Options, encoded
from groundkern.trainer.prepare.sources import Item
from groundkern.trainer.wording import short

ROOT = "--images, --root or data.root"  # as prepare, inspect and evaluate, train call them
ROOTS = "--image-root or data.image_roots"
_SURROGATE = re.compile("[\ud800-\udfff]")
FIELDS = ("images", "image", "image_path", "image_paths")
# how JPEG, PNG, GIF, WebP and TIFF begin in base64
_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")


@dataclass(frozen=True)
class Picture:
    """An image: its path below the data root, its (width, height), and what to write there."""

    path: str
    size: tuple[int, int]
    data: bytes | None = None


def references(record: dict[str, Any], where: str) -> list[Any]:
    """What a record's own fields refer to, one for each image, in their order.

    Raises:
        SampleError: two fields with images.
    """
    given = [name for name in FIELDS if record.get(name) not in (None, [], "")]
    if len(given) > 1:
        raise wrong(where, given[0], "one field with the images", f"another one, `{given[1]}`")
    found = record[given[0]] if given else []
    return found if isinstance(found, list) else [found]


def folder_of(reference: Any, options: Options) -> Path | None:
    """The allowed folder that the file of a reference is in, the first one if it is in none; None
    for a reference that holds the image."""
    found = _inside(reference)
    if not isinstance(found, str) or _data_of(found) is not None:
        return None
    try:
        return _file(found, options, "", "")[0]
    except SampleError:
        return _folders(options)[0]


def picture(reference: Any, field: str, number: int, item: Item, options: Options) -> Picture:
    """The image that a reference means.

    Args:
        reference: a path, `file://`, a data URL, base64, bytes, or an object that has one of them.
        field: what error messages call it.
        number: of the image in its record, from 0.
        item: the record.
        options: `images`, `image_roots`, `root` and where images are written.

    Raises:
        SampleError: on the network, not below an allowed folder, not there, no image.
    """
    found = _inside(reference)
    if isinstance(found, str) and (data := _data_of(found)) is not None:
        found = _decoded(data, item.where, field)
    if isinstance(found, bytes):
        extension, size = encoded(found, item.where, field)
        name = f"{options.folder}/{item.index:08d}_{number}{extension}"
        return Picture(_below_root(options.output / name, options, item.where, field), size, found)
    if not isinstance(found, str) or not found:
        raise wrong(item.where, field, "an image or its path", short(found))
    if re.match(r"(?i)(https?|ftp|s3|gs|hdfs|oss)://", found):
        raise wrong(item.where, field, "a file (the network is never used)", short(found))
    folder, part = _file(found, options, item.where, field)
    file = folder / part
    size = image_size(file, where=item.where, field=field)
    return Picture(_below_root(file, options, item.where, field), size)


def _folders(options: Options) -> list[Path]:
    """The folders that images may be in; relative paths start from each, in this order."""
    own = options.data if options.data.is_dir() else options.data.parent
    return [Path(os.path.abspath(f)) for f in (options.images or own, *options.image_roots)]


def _inside(reference: Any) -> Any:
    """What an object like `{"bytes", "path"}` or `{"url"}` holds; anything else as it is."""
    for _ in range(3):  # {"image_url": {"url": ...}}, {"source": {"type": "base64", "data": ...}}
        if not isinstance(reference, dict):
            break
        names = ("bytes", "data", *REFERENCES)
        values = (reference[name] for name in names if reference.get(name) is not None)
        reference = next(values, None)
    return reference


def _data_of(text: str) -> str | None:
    """The base64 of a data URL or of a text that is nothing but an image in base64."""
    if text.startswith("data:"):
        return text.partition(",")[2]
    return text if _BASE64.fullmatch(text) else None


def _decoded(data: str, where: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong(where, field, "an image in base64", f"{short(data, 40)} ({error})") from None


def _file(name: str, options: Options, where: str, field: str) -> tuple[Path, str]:
    """(an allowed folder, the path of a file below it); links out of the folder are refused."""
    if _SURROGATE.search(name):
        raise wrong(where, field, "a path in Unicode", short(name))
    if name.startswith("file:"):
        name = unquote(name.removeprefix("file:").removeprefix("//").removeprefix("localhost"))
    allowed = _folders(options)
    if "\\" in name and not os.path.exists(allowed[0] / name):
        name = name.replace("\\", "/")
    inside = [(folder, _relative(name, folder)) for folder in allowed]
    inside = [(folder, part) for folder, part in inside if part is not None]
    if not inside:
        wanted = f"a path below {' or '.join(map(str, allowed))} ({ROOTS} allows others)"
        raise wrong(where, field, wanted, short(name))
    problem = None
    for folder, part in inside:
        try:
            confined(part, folder, where=where, field=field)
            return folder, part
        except SampleError as error:
            problem = problem or error
    if (above := _above(name, options)) is not None:
        raise SampleError(f"{problem}, but below {above}: name that with {ROOT}")
    raise problem


def _above(name: str, options: Options) -> Path | None:
    """The folder around the data's that a relative path starts from, as many files have them; None
    if there is none. Nothing is read from there."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return None
    around = [f for f in Path(os.path.abspath(options.data)).parents if f not in _folders(options)]
    return next((folder for folder in around if os.path.isfile(folder / name)), None)


def _relative(name: str, folder: Path) -> str | None:
    """A path as one from the folder; None for an absolute one that is not below it."""
    if not name.startswith("/"):
        return name
    for base in (folder, Path(os.path.realpath(folder))):
        if Path(name).is_relative_to(base):
            return PurePosixPath(name).relative_to(base).as_posix()
    return None


def _below_root(file: Path, options: Options, where: str, field: str) -> str:
    """A file's path from the data root."""
    root = Path(os.path.abspath(options.root))
    path = Path(os.path.normpath(os.path.abspath(file)))
    if not path.is_relative_to(root):
        wanted = f"images of one kind, all below {root} (name the folder above with {ROOTS})"
        raise wrong(where, field, wanted, short(str(path)))
    return path.relative_to(root).as_posix()


def common_root(paths: Sequence[Path]) -> Path:
    """The deepest folder that holds all of the paths."""
    return Path(os.path.commonpath([os.path.abspath(path) for path in paths]))
