"""Visual Genome: short descriptions of regions of photographs, or the names of their objects.

On disk: `region_descriptions.json`, a list of `{"id", "regions": [{"region_id", "image_id",
"phrase", "x", "y", "width", "height"}]}`, or `objects.json`, a list of `{"image_id", "objects":
[{"names", "x", "y", "w", "h"}]}` whose objects of one first name in one image are one sample; and
the images `<image_id>.jpg` in `VG_100K` and `VG_100K_2` below `--images`.

Boxes are the top left corner, width and height in pixels; some stick out of their image by a few
pixels, for which there is `--overhang`.

Source: visualgenome.org, readme of the region descriptions; arXiv 1602.07332.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundkern.trainer.prepare.adapt.common import Options
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, first_there, size_of
from groundkern.trainer.prepare.reading import json_array
from groundkern.trainer.prepare.sources import Item, Source, Unusable, listed, members

PHRASING = (Phrasing("Describe a part of this image.", "{label}"), ("label", "box", "point"))


def inputs(options: Options) -> tuple[Source, Path | None]:
    """The regions of all images, one input each."""
    file = options.data / "region_descriptions.json" if options.data.is_dir() else options.data

    def read() -> Iterator[tuple[str, Any]]:
        for i, image in enumerate(json_array(file)):
            where = f"{file.name}[{i}]"
            if isinstance(image, dict) and isinstance(image.get("objects"), list):
                yield from _named(image, where)
                continue
            for there, region in members(image, "regions", "a list of an image", where):
                if isinstance(region, Unusable):
                    yield there, region
                else:
                    yield there, (image.get("id", image.get("image_id")), [region])

    return listed(read, [file]), options.images or file.parent


def _named(image: dict, where: str) -> Iterator[tuple[str, Any]]:
    """The objects of an image by their first name."""
    groups: dict[str, list[dict]] = {}
    for i, thing in enumerate(image["objects"]):
        names = thing.get("names") if isinstance(thing, dict) else None
        name = names[0] if isinstance(names, list) and names else None
        if not isinstance(name, str) or not name.strip():
            yield f"{where}.objects[{i}]", Unusable(thing, "`names`: expected a list of texts")
            continue
        box = {"x": "x", "y": "y", "width": "w", "height": "h"}
        region = {side: thing.get(short) for side, short in box.items()}
        groups.setdefault(name.strip(), []).append({"phrase": name, **region})
    for name, regions in groups.items():
        yield f"{where}: {name!r:.100}", (image.get("image_id", image.get("id")), regions)


def convert(item: Item, options: Options) -> Made:
    """One description or name; its regions are the boxes."""
    (image_id, regions), where = item.value, item.where
    phrase = field_of(regions[0], "phrase", str, where).strip()
    number = field_of({"image_id": regions[0].get("image_id", image_id)}, "image_id", int, where)
    folders = ("VG_100K/", "VG_100K_2/", "")
    image = first_there(options.root, [f"{folder}{number}.jpg" for folder in folders])
    size = size_of(image, options.root, where)
    frame, places, moved = Frame(*size, options.overhang, where), [], 0
    for region in regions:
        values = [region.get(name) for name in ("x", "y", "width", "height")]
        box, cut = frame.box(values, "region", order="xywh")
        places.append({"box": box})
        moved += len(cut)
    sample = options.phrasing(PHRASING[0]).sample(
        "visual_genome",
        image,
        {"label": phrase},
        places,
        size=size,
        writer=options.writer,
        where=where,
    )
    return Made([sample], {}, {"regions": len(places), "boxes_cut": moved})
