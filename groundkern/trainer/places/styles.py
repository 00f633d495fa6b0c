"""How each family of models writes boxes and points: a row of `STYLES` for each.

A style has a grid, on which a box is rounded, and a layout, which puts numbers, labels and tags
together. What is written is read again before it is handed out, so that a label that a style cannot
hold (one with its closing tag in it) is an error and never another label.

Sources: the model cards and processors of the families; docs/data/boxes.md has an example of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Literal

from groundkern.trainer.places.layouts import (
    Layout,
    Place,
    Written,
    coords,
    json_list,
    label_behind,
    lists,
    points,
    tags,
)
from groundkern.trainer.places.notations import Mark, marks_in
from groundkern.trainer.places.patterns import CELLS, Numbers

Size = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The whole numbers that a style has for a side of an image.

    Args:
        steps: into which a side is divided; None: its pixels.
        last: the largest number; None: `steps`.
        rounding: "nearest" edge of a step; the step that an edge is in ("inside"); the first and
            the last step that a box touches ("cells").
    """

    steps: int | None
    last: int | None = None
    rounding: Literal["nearest", "inside", "cells"] = "nearest"

    def ticks(self, numbers: Numbers, size: Size | None) -> tuple[int, ...]:
        """The numbers on the grid; a box keeps a step of width and height."""
        found = [0] * len(numbers)
        for axis in (0, 1):
            steps = self.steps or size[axis]
            last = steps if self.last is None else self.last
            low = self._tick(numbers[axis] * steps, last)
            found[axis] = low
            if len(numbers) == 4 and self.rounding == "cells":
                high = ceil(numbers[axis + 2] * steps - 1)
                found[axis + 2] = min(max(high, low), last)
            elif len(numbers) == 4:
                high = max(self._tick(numbers[axis + 2] * steps, last), min(low + 1, last))
                found[axis], found[axis + 2] = min(low, high - 1), high
        return tuple(found)

    def _tick(self, value: float, last: int) -> int:
        whole = round(value) if self.rounding == "nearest" else floor(value)
        return min(max(whole, 0), last)


@dataclass(frozen=True)
class Style:
    """How a family writes places.

    Args:
        name: on the command line.
        notations: the names of those that it is read as.
        grid: of its numbers.
        box, point: the numbers of a place with `{0}` for x0 or x, `{1}` for y0 or y, `{2}` for x1
            and `{3}` for y1 (`#`: the number of the place); None: the style has none.
        layout: what is written around them.
        unit: what its numbers count (`units.UNITS`), if the notation does not say so.
        number: a tick as it is written.
        families: values of `model_type` in config.json of the models that write so.
        has_labels: whether a label is a part of what is written.
        ref: tags around words that are spoken of without a box; none in most families.
    """

    name: str
    notations: tuple[str, ...]
    grid: Grid
    box: str | None
    point: str | None
    layout: Layout
    unit: str | None = None
    number: Callable[[int], object] = int
    families: tuple[str, ...] = ()
    has_labels: bool = True
    ref: tuple[str, str] = ("", "")

    @property
    def in_pixels(self) -> bool:
        """Whether its numbers depend on the size of the image."""
        return self.grid.steps is None

    def can(self, place: Place) -> bool:
        """Whether the style has boxes, or points."""
        return (self.box if len(place.numbers) == 4 else self.point) is not None

    def write(self, places: Sequence[Place], size: Size | None = None) -> Written:
        """Places as the family writes them, with their labels.

        Args:
            places: at least one; those with the same label stand together if they follow each
                other.
            size: (width, height) that the pixels of `unit` are those of; None: it has no pixels.

        Returns:
            The text, and where in it each place stands.

        Raises:
            ValueError: the style has no boxes, no points, or cannot hold a label.
        """
        named = [
            Place(place.numbers, (place.label or "").strip() or None)
            if self.has_labels
            else Place(place.numbers)
            for place in places
        ]
        written = self.layout([(self.numbers(place, size), place) for place in named])
        read = [(mark.span, mark.label and mark.label.text) for mark in self.read(written.text)]
        for i, (place, part) in enumerate(zip(named, written.parts, strict=True)):
            if read[i : i + 1] != [(part.numbers, place.label)] or len(read) != len(named):
                raise ValueError(
                    f"expected a label that {self.name} can hold, got {place.label!r:.80}"
                )
        return written

    def read(self, text: str) -> list[Mark]:
        """The places of a text in this style's notation."""
        return marks_in(text, only=self.notations)

    def numbers(self, place: Place, size: Size | None = None) -> str:
        """The numbers of a place alone, as they stand between the tags.

        Raises:
            ValueError: the style has no boxes, or no points.
        """
        form = self.box if len(place.numbers) == 4 else self.point
        if form is None:
            what = "points" if self.box is None else "boxes"
            raise ValueError(f"expected {what}, which are all that {self.name} has")
        ticks = self.grid.ticks(place.numbers, size)
        if self.grid.rounding == "cells":
            x0, y0, x1, y1 = ticks
            ticks = y0 * CELLS + x0, y1 * CELLS + x1
        return form.format(*map(self.number, ticks))


_MILLE = Grid(1000)
_REF, _OBJECT = ("<ref>", "</ref>"), ("<|object_ref_start|>", "<|object_ref_end|>")
_PHRASE, _DET_REF = ("<phrase>", "</phrase>"), ("<|ref|>", "<|/ref|>")
_LIST, _PAIR = "[{0}, {1}, {2}, {3}]", "[{0}, {1}]"
_CORNERS, _POINT = "({0},{1}),({2},{3})", "({0},{1})"
_QWEN_JSON = json_list("bbox_2d", "point_2d")
_BBOX = ("bbox_2d", "point_2d")
_ROWS = (
    Style("per_mille", ("list",), _MILLE, _LIST, _PAIR, lists, unit="per_mille", has_labels=False),
    Style(
        "unit",
        ("list",),
        _MILLE,
        _LIST,
        _PAIR,
        lists,
        unit="unit",
        has_labels=False,
        number=lambda tick: tick / 1000,
    ),
    Style(
        "llava",
        ("list",),
        Grid(100),
        _LIST,
        _PAIR,
        lists,
        unit="square",
        has_labels=False,
        number=lambda tick: tick / 100,
        families=("llava",),
    ),
    Style("pixel", ("list",), Grid(None), _LIST, _PAIR, lists, unit="pixel", has_labels=False),
    Style(
        "qwen",
        ("box",),
        _MILLE,
        _CORNERS,
        _POINT,
        tags(_REF, ("<box>", "</box>")),
        families=("qwen",),
        ref=_REF,
    ),
    Style(
        "qwen2",
        ("box",),
        _MILLE,
        _CORNERS,
        _POINT,
        tags(_OBJECT, ("<|box_start|>", "<|box_end|>")),
        families=("qwen2_vl",),
        ref=_OBJECT,
    ),
    Style(
        "qwen2.5",
        _BBOX,
        Grid(None),
        _LIST,
        _PAIR,
        _QWEN_JSON,
        unit="resized",
        families=("qwen2_5_vl", "qwen2_5_omni"),
    ),
    Style(
        "qwen3",
        _BBOX,
        _MILLE,
        _LIST,
        _PAIR,
        _QWEN_JSON,
        unit="per_mille",
        families=("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_5", "qwen3_5_moe"),
    ),
    Style(
        "internvl",
        ("box",),
        _MILLE,
        _LIST,
        None,
        tags(_REF, ("<box>[", "]</box>"), ", "),
        families=("internvl", "internvl_chat"),
        ref=_REF,
    ),
    Style(
        "minicpm",
        ("box",),
        _MILLE,
        "{0} {1} {2} {3}",
        None,
        tags(_REF, ("<box>", "</box>")),
        families=("minicpmv",),
        ref=_REF,
    ),
    Style(
        "paligemma",
        ("paligemma",),
        Grid(1024, 1023),
        "<loc{1:04}><loc{0:04}><loc{3:04}><loc{2:04}>",
        None,
        label_behind,
        families=("paligemma",),
    ),
    Style(
        "florence2",
        ("florence2",),
        Grid(1000, 999, "inside"),
        "<loc_{0}><loc_{1}><loc_{2}><loc_{3}>",
        None,
        tags(("", ""), ("", ""), "", ""),
        families=("florence2",),
    ),
    Style(
        "kosmos2",
        ("kosmos2",),
        Grid(CELLS, CELLS - 1, "cells"),
        "<patch_index_{0:04}><patch_index_{1:04}>",
        None,
        tags(
            ("<phrase>", "</phrase>"), ("<object>", "</object>"), "</delimiter_of_multi_objects/>"
        ),
        families=("kosmos-2", "kosmos-2.5"),
        ref=_PHRASE,
    ),
    Style(
        "deepseek",
        ("deepseek",),
        Grid(999),
        _LIST,
        None,
        tags(_DET_REF, ("<|det|>[", "]<|/det|>"), ", "),
        families=("deepseek_vl_v2", "deepseek_ocr2"),
        ref=_DET_REF,
    ),
    Style(
        "gemini",
        ("box_2d", "point"),
        _MILLE,
        "[{1}, {0}, {3}, {2}]",
        "[{1}, {0}]",
        json_list("box_2d", "point"),
        families=("gemma3", "gemma3n", "gemma4"),
    ),
    Style(
        "molmo",
        ("molmo",),
        _MILLE,
        None,
        'x#="{0}" y#="{1}',
        points,
        number=lambda tick: tick / 10,
        families=("molmo",),
    ),
    Style("molmo2", ("molmo2",), _MILLE, None, "# {0:03} {1:03}", coords, families=("molmo2",)),
)
STYLES = {style.name: style for style in _ROWS}
"""Every style by its name; the first is the default of templates."""
