"""Outside annotations to samples: an image and a label become a question and its places.

All places of one label in one image belong to one sample (their union), because the question names
the label alone. What each format holds is said at its reader; docs/prepare-maps.md has examples.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config import ConfigError
from trainer.data.images import SampleError, wrong
from trainer.places.kinds import LOOKED_AT, Kinds
from trainer.places.units import Resized, extent, resized_if_any
from trainer.places.writing import PER_MILLE, Writer
from trainer.prepare.maps.grid import Grid
from trainer.prepare.maps.readers import READERS
from trainer.prepare.pipeline import Made
from trainer.prepare.placing import Frame, Phrasing, field_of, numbers, size_of
from trainer.prepare.sources import Item, Source, listed, open_source

KNOWN = ("label", "count", "box", "point")
PLACES = {"box": 1, "points": 1, "polygon": 3, "polyline": 2}  # least points, of lists
UNITS = ("pixel", "unit", "percent", "per_mille", "resized")


@dataclass(frozen=True)
class Annotate:
    """Makes a sample of `{"image", "label", "places": [...]}`.

    A place is one of box, points, polygon and polyline, with `coord` (of `UNITS`) and, for boxes,
    `order` (xyxy, xywh, cxcywh), and `field`, what errors call it.
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
        made, counts = [], {"regions": len(places), "boxes_cut": 0}
        for i, place in enumerate(places):
            part, cut = self._place(place, f"places[{i}]", size, where)
            made.append(part)
            counts["boxes_cut"] += cut
        values = {"label": label, "count": str(_things(made))}
        sample = self.phrasing.sample(
            "places", image, values, made, size=size, writer=self.writer, where=where
        )
        if self.grid is not None:
            counts.update(self.grid.counts(sample, size))
        return Made([sample], {}, counts)

    def _place(
        self, place: Any, field: str, size: tuple[int, int], where: str
    ) -> tuple[dict[str, Any], int]:
        """(the place in pixel edges, how many of its corners were moved to the image's edge)."""
        if not isinstance(place, dict):
            raise wrong(where, field, "an object", repr(place)[:80])
        field = place.get("field", field)
        given = [kind for kind in PLACES if place.get(kind) is not None]
        if len(given) != 1:
            raise wrong(where, field, f"one of {', '.join(PLACES)}", " and ".join(given) or "none")
        coord, kind = place.get("coord", "pixel"), given[0]
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
        for i, value in enumerate(values):
            (x, y), cut = frame.point(value, f"{field}.{kind}[{i}]")
            points.append([x * scale[0], y * scale[1]])
            moved += cut
        return {kind: points}, moved


def _things(places: list[dict]) -> int:
    """How many things there are: each point is one, and each box, polygon and line."""
    return sum(len(place.get("points", [None])) for place in places)


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
    writer = Writer.of(arguments.box_style or PER_MILLE.style, arguments.model)
    phrasing = Phrasing(arguments.question, arguments.answer).check(KNOWN, writer)
    work = Annotate(phrasing, arguments.overhang, root, grid, writer)
    if arguments.format == "lines":
        source = open_source(data, unique=None)
        if arguments.model is not None:
            work = replace(work, resized=resized_if_any(arguments.model))
        show_kinds(source, root)
    else:
        source = listed(*READERS[arguments.format](data, root))
    return source, work, root


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
