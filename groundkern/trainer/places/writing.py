"""Writes boxes of an image of some size in a style, whatever that style's numbers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from groundkern.trainer.config import ConfigError
from groundkern.trainer.places.layouts import Part, Place, Written
from groundkern.trainer.places.of_model import style_named
from groundkern.trainer.places.styles import STYLES, Style
from groundkern.trainer.places.units import Resized, Size, extent


@dataclass(frozen=True)
class Writer:
    """Writes places in a style.

    Args:
        style: by its name in `STYLES`, so that a worker process can be sent this.
        resized: of the model whose processor decides the pixels; None: the style needs none.
    """

    style: str = "per_mille"
    resized: Resized | None = None

    @classmethod
    def of(cls, name: str, model: str | Path | None) -> Writer:
        """The writer of `--box-style` and `--model`.

        Raises:
            ConfigError: an unknown style or model, or a style that needs a model and has none.
        """
        style = style_named(name, model)
        return cls(style.name, resized_of(style.unit, model, f"--box-style {style.name}"))

    @property
    def rules(self) -> Style:
        """The style itself."""
        return STYLES[self.style]

    def write(self, places: Sequence[Place], size: Size) -> Written:
        """Places in fractions of an image of (width, height) as the style writes them.

        Raises:
            ValueError: the style has no such places or cannot hold a label, or the processor
                refuses an image of this size.
        """
        counted = [self._counted(place, size) for place in places]
        return self.rules.write(counted, self._pixels(size))

    def spoken(self, places: Sequence[Place], size: Size) -> Written:
        """As `write`, within a text: if the style has no labels they stand before the numbers."""
        if self.rules.has_labels:
            return self.write(places, size)
        text, parts = "", []
        for label, group in groupby(places, key=lambda place: place.label):
            text += ", " if text else ""
            span = None
            if label is not None:
                span = len(text), len(text) + len(label)
                text += f"{label} "
            made = self.write(list(group), size)
            for part in made.parts:
                parts.append(Part((part.numbers[0] + len(text), part.numbers[1] + len(text)), span))
            text += made.text
        return Written(text, tuple(parts))

    def numbers(self, place: Place, size: Size) -> str:
        """The numbers alone of a place in fractions of an image; raises as `write`."""
        return self.rules.numbers(self._counted(place, size), self._pixels(size))

    def _counted(self, place: Place, size: Size) -> Place:
        """In fractions of what the style's grid divides."""
        if self.rules.unit != "square":
            return place
        return place._replace(numbers=extent("square", size, None).numbers(place.numbers))

    def _pixels(self, size: Size) -> Size:
        return size if self.resized is None else self.resized(size)


def resized_of(unit: str | None, model: str | Path | None, option: str) -> Resized | None:
    """The resize that a unit needs; None for all but "resized".

    Raises:
        ConfigError: the unit needs a model and there is none, or one without such a processor.
    """
    if unit != "resized":
        return None
    if model is None:
        raise ConfigError(f"`{option}`: expected --model, whose processor decides the pixels")
    return Resized.of(model)


PER_MILLE = Writer()
"""What is written if nothing else is asked for: lists in thousandths."""
