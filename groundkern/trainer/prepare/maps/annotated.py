"""Outside annotations to samples: an image and a label become a question and its places.

All places of one label in one image belong to one sample (their union), because the question names
the label alone. What each format holds is said in its module of `formats`;
docs/data/prepare-maps.md has examples.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from groundkern.rasters import Raster
from groundkern.trainer.config import ConfigError
from groundkern.trainer.data.images import MAX_PIXELS, SampleError, wrong
from groundkern.trainer.data.rasters import RasterField, find_heat, find_mask
from groundkern.trainer.places.kinds import LOOKED_AT, Kinds
from groundkern.trainer.places.units import Resized, extent, resized_if_any
from groundkern.trainer.places.writing import PER_MILLE, Writer
from groundkern.trainer.prepare.arguments import named
from groundkern.trainer.prepare.maps.formats.common import Options
from groundkern.trainer.prepare.maps.formats.shapes import clipped
from groundkern.trainer.prepare.maps.grid import Grid
from groundkern.trainer.prepare.pipeline import Made
from groundkern.trainer.prepare.placing import Frame, Phrasing, field_of, numbers, size_of
from groundkern.trainer.prepare.sources import Item, Source, listed, open_source

KNOWN = ("label", "count", "box", "point")
RASTERS = ("mask", "heat")
PLACES = {"box": 1, "points": 1, "polygon": 3, "polyline": 2}  # least points, of lists
UNITS = ("pixel", "unit", "percent", "per_mille", "resized")


@dataclass(frozen=True)
class Annotate:
    """Makes a sample of `{"image", "label", "places": [...]}`.

    A place is one of box, points, polygon and polyline, with `coord` (of `UNITS`) and, for boxes,
    `order` (xyxy, xywh, cxcywh), or a mask (with `mask_value`) or heat as docs/data/data-format.md
    has them. Points may have a `spread` in that unit, and every place a `share`. It may have
    `field` (what errors call it), `group` (places of one group count as one thing), `clip` (a
    convex polygon may stick out of the image, and is cut at its edge) and `notes` (texts that are
    counted). `size` of a record is the (width, height) that was annotated: an image
    of another means other pixels.
    """

    phrasing: Phrasing
    overhang: float
    root: Path
    grid: Grid | None
    writer: Writer = PER_MILLE
    resized: Resized | None = None

    def __call__(self, item: Item) -> Made:
        where = item.where
        image = field_of(item.value, "image", str, where)
        label = field_of(item.value, "label", str, where).strip()
        places = field_of(item.value, "places", list, where)
        if not places:
            raise wrong(where, "places", "at least one", "none")
        size = size_of(image, self.root, where)
        if (given := item.value.get("size")) is not None:
            across, down = numbers(given, 2, where, "size")
            if (across, down) != size:
                wanted = f"an image of {across} x {down}, as annotated"
                raise wrong(where, "size", wanted, f"{size[0]} x {size[1]}")
        made, rasters, counts = [], [], Counter({"regions": len(places), "boxes_cut": 0})
        for i, place in enumerate(places):
            part, cut = self._place(place, f"places[{i}]", size, where)
            if "share" in place:
                part["share"] = place["share"]
            made.append(part)
            rasters += self._rasters(part, place.get("field", f"places[{i}]"), size, where)
            counts["boxes_cut"] += cut
            counts.update(f"noted: {note}" for note in _notes(place))
        count = _things(made, [place.get("group") for place in places])
        values = {"label": label, "count": str(count)}
        sample = self.phrasing.sample(
            "places", image, values, made, size=size, writer=self.writer, where=where
        )
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
        if coord not in UNITS:
            raise wrong(where, f"{field}.coord", f"one of {', '.join(UNITS)}", repr(coord)[:80])
        if coord == "resized" and self.resized is None:
            wanted = "a unit, or --model, whose processor resizes images"
            raise wrong(where, f"{field}.coord", wanted, "resized without one")
        try:
            sides = extent(coord, size, self.resized).sides
        except ValueError as error:
            raise SampleError(f"{where}: {error}") from None
        frame = Frame(*sides, self.overhang, where)
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
        if place.get("clip"):
            values, moved = self._clipped(values, frame, f"{field}.{kind}")
        for i, value in enumerate(values):
            (x, y), cut = frame.point(value, f"{field}.{kind}[{i}]")
            points.append([x * scale[0], y * scale[1]])
            moved += cut
        if kind == "points" and place.get("spread") is not None:
            spread = _spread(place["spread"], scale, where, f"{field}.spread")
            return {kind: points, "spread": spread}, moved
        return {kind: points}, moved

    def _clipped(self, points: list, frame: Frame, field: str) -> tuple[list, int]:
        """(the part within the image, whether anything was cut off) of a convex polygon."""
        points = [numbers(point, 2, frame.where, field) for point in points]
        inside = clipped(points, frame.width, frame.height)
        if len(inside) < 3:
            raise wrong(frame.where, field, "a shape that overlaps the image", repr(points)[:80])
        return inside, int(inside != points)

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


def _spread(value: Any, scale: tuple[float, float], where: str, field: str) -> float | list[float]:
    """A spread in pixels; a number alone is one of x."""
    several = isinstance(value, list)
    given = numbers(value if several else [value], 2 if several else 1, where, field)
    if min(given) <= 0:
        raise wrong(where, field, "numbers above 0", repr(value)[:80])
    found = [each * s for each, s in zip(given, scale)]
    return found if several else found[0]


def _things(places: list[dict], groups: list) -> int:
    """How many things there are: each point is one, each group, and each other place."""
    alone = [place for place, group in zip(places, groups, strict=True) if group is None]
    several = {str(group) for group in groups if group is not None}
    return len(several) + sum(len(place.get("points", [None])) for place in alone)


def _notes(place: dict) -> list[str]:
    """The texts that a format counts; lines of a user have none."""
    notes = place.get("notes")
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


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
    options = Options(data, **named(arguments, "images", "prefer", "split", "names", "output"))
    if not options.root.is_dir():
        raise ConfigError(f"maps: `--images`: expected a folder, got {options.root}")
    if options.names is not None and not options.names.is_file():
        raise ConfigError(f"maps: `--names`: expected a file, got {options.names}")
    writer = Writer.of(arguments.box_style or PER_MILLE.style, arguments.model)
    phrasing = Phrasing(arguments.question, arguments.answer).check(KNOWN, writer)
    source, root = sourced(arguments.format, options)
    resized = None
    if arguments.format == "lines":
        resized = None if arguments.model is None else resized_if_any(arguments.model)
        show_kinds(source, root)
    return source, Annotate(phrasing, arguments.overhang, root, grid, writer, resized), root


def sourced(format: str, options: Options) -> tuple[Source, Path]:
    """The records of annotations, and the folder that their image paths start from.

    Raises:
        ConfigError: what is there is not of the format.
    """
    if format == "lines":
        return open_source(options.data, unique=None), options.root
    found = import_module(f"groundkern.trainer.prepare.maps.formats.{format}").opened(options)
    return listed(found.read, found.files), found.root


def show_kinds(source: Source, root: Path) -> None:
    """Says so if the first places of a file do not look like what their `coord` says they count."""
    kinds: dict[str, Kinds] = {}
    for item in islice(source.read(), LOOKED_AT):
        record = item.value if isinstance(item.value, dict) else {}
        places = record.get("places")
        for place in places if isinstance(places, list) else ():
            try:
                coord, numbers = _numbers(place, item.where)
                size = size_of(field_of(record, "image", str, item.where), root, item.where)
            except SampleError:
                continue  # the work says so
            kinds.setdefault(coord, Kinds(coord)).add(numbers, size, item.where)
    for each in kinds.values():
        if (sentence := each.warning("`coord`")) is not None:
            print(f"warning: {sentence}", file=sys.stderr)


def _numbers(place: Any, where: str) -> tuple[str, tuple[float, ...]]:
    """(unit, edges) of a place whose box has edges; others say less.

    Raises:
        SampleError: no such place.
    """
    box = place.get("box") if isinstance(place, dict) else None
    if (
        box is None
        or place.get("order", "xyxy") != "xyxy"
        or place.get("coord") not in (None, *UNITS)
    ):
        raise SampleError(where)
    return place.get("coord") or "pixel", tuple(numbers(box, 4, where, "box"))
