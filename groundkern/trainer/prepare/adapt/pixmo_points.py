"""PixMo-Points: a label and the points of an image that it names.

On disk: rows of `image_url`, `image_sha256`, `label`, `points [{"x", "y"}]`, `count`. The images
are not part of it: they are downloaded from their addresses and lie in `--images` under their
SHA-256, with or without an extension; the hash is checked, because points of an image that changed
since mean nothing. Rows with an `image` that holds bytes work too.

Points are percent of the width and height, 0 to 100. The data set's card says pixels; Molmo's own
loader reads percent and clips them, and so does this one (`--points-in pixel` for other copies).

Source: huggingface.co/datasets/allenai/pixmo-points, card; Molmo's `PixMoPoints`
(`point_scale=100`, `clip_points`); arXiv 2409.17146.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import confined, wrong
from groundkern.trainer.prepare.adapt.common import Options, embedded, tables
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, first_there, size_of
from groundkern.trainer.prepare.sources import Item, Source

PHRASING = (Phrasing("How many are there: {label}?", "{count}"), ("label", "count", "point"))
_EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif")


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The rows of the data set."""
    if (rows := tables(options)) is None:
        raise ConfigError(f"{options.data}: expected Parquet files or a saved data set")
    return rows, options.images


def convert(item: Item, options: Options) -> Made:
    """One label; without points the answer is a count of 0 that has no place."""
    row, where, pictures = item.value, item.where, {}
    label = field_of(row, "label", str, where).strip()
    points = field_of(row, "points", list, where)
    if options.root is None:
        found = embedded(row, item, options)
        image, pictures, size = found.path, found.files, found.size
    else:
        image = _checked(field_of(row, "image_sha256", str, where), options.root, where)
        size = size_of(image, options.root, where)
    whole = size if options.points_in == "pixel" else (100, 100)
    frame = Frame(*whole, options.overhang, where)
    inside, moved = [], 0
    for i, point in enumerate(points):
        xy = [point.get("x"), point.get("y")] if isinstance(point, dict) else point
        (x, y), cut = frame.point(xy, f"points[{i}]")
        inside.append([x / frame.width, y / frame.height])
        moved += cut
    places = [{"points": inside, "coord": "unit"}] if inside else []
    values = {"label": label, "count": str(len(inside))}
    phrasing = options.phrasing(PHRASING[0])
    sample = phrasing.sample(
        "pixmo_points", image, values, places, size=size, writer=options.writer, where=where
    )
    return Made([sample], pictures, {"regions": len(places), "boxes_cut": moved})


def _checked(digest: str, root: Path, where: str) -> str:
    """The path of the image with this SHA-256."""
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise wrong(where, "image_sha256", "64 hexadecimal digits", repr(digest)[:80])
    name = first_there(root, [digest + extension for extension in _EXTENSIONS])
    path = confined(name, root, where=where, field="images[0]")
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise wrong(
            where, "images[0]", "the image that was annotated", f"SHA-256 {found.hexdigest()}"
        )
    return name
