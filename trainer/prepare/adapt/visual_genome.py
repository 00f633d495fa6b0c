"""Visual Genome: short descriptions of regions of photographs.

On disk: `region_descriptions.json`, a list of `{"id", "regions": [{"region_id", "image_id",
"phrase", "x", "y", "width", "height"}]}`, and the images `<image_id>.jpg` in `VG_100K` and
`VG_100K_2` below `--images`.

Boxes are the top left corner, width and height in pixels; some stick out of their image by a few
pixels, for which there is `--overhang`.

Source: visualgenome.org, readme of the region descriptions; arXiv 1602.07332.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.prepare.adapt.common import Options
from trainer.prepare.pipeline import Made
from trainer.prepare.placing import Frame, Phrasing, field_of, first_there, size_of
from trainer.prepare.reading import json_array
from trainer.prepare.sources import Item, Source, Unusable, listed, members

PHRASING = (Phrasing("Describe a part of this image.", "{label}"), ("label", "box", "point"))


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The regions of all images, one input each."""
    file = options.data / "region_descriptions.json" if options.data.is_dir() else options.data

    def read() -> Iterator[tuple[str, Any]]:
        for i, image in enumerate(json_array(file)):
            where = f"{file.name}[{i}]"
            for there, region in members(image, "regions", "a list of an image", where):
                if isinstance(region, Unusable):
                    yield there, region
                else:
                    yield there, (image.get("id", image.get("image_id")), region)

    return listed(read, [file]), options.images or file.parent


def convert(item: Item, options: Options) -> Made:
    """One description; its region is the box."""
    (image_id, region), where = item.value, item.where
    phrase = field_of(region, "phrase", str, where).strip()
    number = field_of({"image_id": region.get("image_id", image_id)}, "image_id", int, where)
    folders = ("VG_100K/", "VG_100K_2/", "")
    image = first_there(options.root, [f"{folder}{number}.jpg" for folder in folders])
    size = size_of(image, options.root, where)
    values = [region.get(name) for name in ("x", "y", "width", "height")]
    box, counts = Frame(*size, options.overhang, where).box(values, "region", order="xywh")
    sample = options.phrasing(PHRASING[0]).sample(
        "visual_genome",
        image,
        {"label": phrase},
        [{"box": box}],
        size=size,
        writer=options.writer,
        where=where,
    )
    return Made([sample], {}, {"regions": 1, **counts})
