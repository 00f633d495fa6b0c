"""A folder for the files that targets read, removed when the process ends, with a few images."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundkern.hf.data.pictures import ORIENTATION

SIZES = {"a.png": (40, 30), "turned.jpg": (24, 36)}  # after EXIF rotation


@cache
def folder() -> Path:
    """The scratch folder."""
    memory = Path("/dev/shm")  # files are written a thousand times a second
    place = memory if memory.is_dir() else None
    path = Path(tempfile.mkdtemp(prefix="groundkern-fuzz-", dir=place))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def images() -> Path:
    """A data root with the images of `SIZES`, and in VG_100K, png and documents some of them; a
    mask and a heat of a.png; and five frames of a video."""
    root = folder() / "images"
    for name in ("VG_100K", "png", "documents", "clip"):
        (root / name).mkdir(parents=True)
    picture = Image.new("RGB", SIZES["a.png"], "white")
    for name in ("a.png", "png/a.png", "documents/a.png", "a.jpg", "VG_100K/7.jpg"):
        picture.save(root / name)
    for number in range(5):
        Image.new("RGB", (24, 16), "white").save(root / "clip" / f"{number}.png")
    labels = np.arange(40 * 30, dtype=np.uint8).reshape(30, 40) % 3
    Image.fromarray(labels).save(root / "labels.png")
    np.save(root / "heat.npy", labels * 0.5)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (36, 24), "white").save(root / "turned.jpg", exif=exif)
    return root


def written(name: str, data: bytes) -> Path:
    """A file of the scratch folder with this content; an empty folder is made for it."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def packed(**files: Any) -> bytes:
    """Several files as one JSON object of their names: a text, or a value that is JSON."""
    return json.dumps(files, ensure_ascii=False).encode()


def doubled(data: bytes) -> str | None:
    """A name that an object of this JSON has twice; None if there is none, or it is no JSON."""
    found: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            found.append(next(name for name in names if names.count(name) > 1))
        return dict(items)

    try:
        json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None
    return found[0] if found else None


def lines_of(data: bytes) -> Iterator[bytes]:
    """The lines that are not blank: only \\n and \\r\\n end one."""
    yield from (line for line in data.split(b"\n") if line.strip())
