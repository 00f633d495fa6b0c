"""Outside annotations to samples: an image and a label become a question and its places.

All places of one label in one image belong to one sample (their union), because the question names
the label alone. What each format holds is said at its reader; docs/prepare-maps.md has examples.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from groundkern.rasters import Raster
from trainer.config import ConfigError
from trainer.data.images import MAX_PIXELS, wrong
from trainer.data.rasters import RasterField, find_heat, find_mask
from trainer.prepare.maps.grid import Grid
from trainer.prepare.maps.readers import READERS
from trainer.prepare.pipeline import Made
from trainer.prepare.placing import Frame, Phrasing, field_of, per_mille, size_of
from trainer.prepare.sources import Item, Source, listed, open_source

KNOWN = ("label", "count", "box")
RASTERS = ("mask", "heat")
PLACES = {"box": 1, "points": 1, "polygon": 3, "polyline": 2}  # least points, of lists
UNITS = {"pixel": None, "unit": (1, 1), "percent": (100, 100), "per_mille": (1000, 1000)}


@dataclass(frozen=True)
class Annotate:
    """Makes a sample of `{"image", "label", "places": [...]}`.

    A place is one of box, points, polygon and polyline, with `coord` (pixel, unit, percent,
    per_mille) and, for boxes, `order` (xyxy, xywh, cxcywh), or a mask (with `mask_value`) or heat
    as docs/data-format.md has them; and `field`, what errors call it.
    """

    phrasing: Phrasing
    overhang: float
    root: Path
    grid: Grid | None

    def __call__(self, item: Item) -> Made:
        where = item.where
        image = field_of(item.value, "image", str, where)
        label = field_of(item.value, "label", str, where).strip()
        places = field_of(item.value, "places", list, where)
        if not places:
            raise wrong(where, "places", "at least one", "none")
        size = size_of(image, self.root, where)
        made, rasters, counts = [], [], {"regions": len(places), "boxes_cut": 0}
        for i, place in enumerate(places):
            part, cut = self._place(place, f"places[{i}]", size, where)
            made.append(part)
            rasters += self._rasters(part, place.get("field", f"places[{i}]"), size, where)
            counts["boxes_cut"] += cut
        values = {"label": label, "count": str(_things(made)), "box": _boxes(made, size)}
        if "{box}" in self.phrasing.question + self.phrasing.answer and not values["box"]:
            raise wrong(where, "places", "a box, for {box}", "none")
        sample = self.phrasing.sample("places", image, values, made)
        if self.grid is not None:
            counts.update(self.grid.counts(sample, size, rasters))
        return Made([sample], {}, counts)

    def _place(
        self, place: Any, field: str, size: tuple[int, int], where: str
    ) -> tuple[dict[str, Any], int]:
        """(the place in pixel edges, how many of its corners were moved to the image's edge)."""
        if not isinstance(place, dict):
            raise wrong(where, field, "an object", repr(place)[:80])
        field = place.get("field", field)
        known = (*PLACES, *RASTERS)
        given = [kind for kind in known if place.get(kind) is not None]
        if len(given) != 1:
            raise wrong(where, field, f"one of {', '.join(known)}", " and ".join(given) or "none")
        coord, kind = place.get("coord", "pixel"), given[0]
        if kind in RASTERS:
            return {name: place[name] for name in (kind, "mask_value") if name in place}, 0
        if coord not in list(UNITS):
            raise wrong(where, f"{field}.coord", f"one of {', '.join(UNITS)}", repr(coord)[:80])
        frame = Frame(*(UNITS[coord] or size), self.overhang, where)
        scale = (size[0] / frame.width, size[1] / frame.height)
        values = place[kind]
        if kind == "box":
            order = place.get("order", "xyxy")
            if order not in ("xyxy", "xywh", "cxcywh"):
                raise wrong(where, f"{field}.order", "xyxy, xywh or cxcywh", repr(order)[:80])
            box, cut = frame.box(values, f"{field}.box", order=order)
            return {"box": [v * s for v, s in zip(box, scale * 2, strict=True)]}, len(cut)
        if not isinstance(values, list) or len(values) < PLACES[kind]:
            wanted = f"a list of {PLACES[kind]} points or more"
            raise wrong(where, f"{field}.{kind}", wanted, repr(values)[:80])
        points, moved = [], 0
        for i, value in enumerate(values):
            (x, y), cut = frame.point(value, f"{field}.{kind}[{i}]")
            points.append([x * scale[0], y * scale[1]])
            moved += cut
        return {kind: points}, moved

    def _rasters(
        self, part: dict[str, Any], field: str, size: tuple[int, int], where: str
    ) -> list[Raster]:
        """The mask or heat of a part of a region, decoded: one with nothing inside is an error."""
        kind = next((name for name in RASTERS if name in part), None)
        if kind is None:
            return []
        value = part.get("mask_value")
        if value is not None and (type(value) is not int or kind == "heat"):
            wanted = "a number of a label image, of a mask"
            raise wrong(where, f"{field}.mask_value", wanted, repr(value)[:80])
        place = RasterField(size, self.root, MAX_PIXELS, where, f"{field}.{kind}")
        if kind == "heat" and not isinstance(part["heat"], str):
            raise place.wrong("the path of a grey PNG or a .npy", repr(part["heat"])[:80])
        find = partial(find_mask, value=value) if kind == "mask" else find_heat
        return [find(part[kind], place=place).load({})]


def _things(places: list[dict]) -> int:
    """How many things there are: each point is one, and each box, polygon and line."""
    return sum(len(place.get("points", [None])) for place in places)


def _boxes(places: list[dict], size: tuple[int, int]) -> str:
    return " ".join(per_mille(place["box"], size) for place in places if "box" in place)


def prepared(arguments: argparse.Namespace, grid: Grid | None) -> tuple[Source, Annotate, Path]:
    """The inputs, the work and the data root of `prepare maps DATA`.

    Raises:
        ConfigError: not there, not of the format, or an option that does not fit.
    """
    data = arguments.data
    if not data.exists():
        raise ConfigError(f"{data}: expected annotations, which are not there")
    if not arguments.overhang >= 0:
        raise ConfigError(f"maps: `--overhang`: expected at least 0, got {arguments.overhang}")
    root = arguments.images or (data if data.is_dir() else data.parent)
    if not root.is_dir():
        raise ConfigError(f"maps: `--images`: expected a folder, got {root}")
    phrasing = Phrasing(arguments.question, arguments.answer).check(KNOWN)
    if arguments.format == "lines":
        source = open_source(data, unique=None)
    else:
        source = listed(*READERS[arguments.format](data, root))
    return source, Annotate(phrasing, arguments.overhang, root, grid), root
