"""What the numbers of a box count, and the size that an image has after its processor's resize."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from groundkern.trainer.config import ConfigError
from groundkern.trainer.places.patterns import Numbers
from groundkern.trainer.wording import cut

Size = tuple[int, int]

UNITS: dict[str, str] = {
    "pixel": "pixels of the image",
    "resized": "pixels of what the model's processor makes of the image, as Qwen2.5-VL counts",
    "unit": "fractions of the image, 0 to 1",
    "per_mille": "thousandths of the image, 0 to 1000",
    "percent": "percent of the image, 0 to 100",
    "square": "fractions of the image padded to a square, as LLaVA-1.5's data count",
}
"""What numbers may count, in words."""
_SCALES = {"unit": 1.0, "per_mille": 1000.0, "percent": 100.0}


@dataclass(frozen=True)
class Resized:
    """The size that an image has after a processor's smart resize: `Resized.of(path)(size)`.

    Args:
        resize: transformers' own `smart_resize` of the family.
        factor: pixels that both sides become a multiple of.
        least, most: pixels that the image has afterwards.
    """

    resize: Callable[..., tuple[int, int]]
    factor: int
    least: int
    most: int

    @classmethod
    def of(cls, model: str | Path) -> Resized:
        """That of a model folder.

        `evaluate --coord resized` looks at what the processor returned instead; here no image is
        decoded, since its size is enough.

        Raises:
            ConfigError: no processor is there, or one that does not resize the whole image so.
        """
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(str(model), local_files_only=True)
        except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
            why = cut(" ".join(str(error).split()), 300)
            raise ConfigError(f"`--model`: {model} has no image processor: {why}") from None
        modules = [sys.modules[kind.__module__] for kind in type(processor).__mro__]
        resize = next((m.smart_resize for m in modules if hasattr(m, "smart_resize")), None)
        sides = [getattr(processor, name, None) for name in ("patch_size", "merge_size")]
        bounds = [getattr(processor.size, name, None) for name in ("shortest_edge", "longest_edge")]
        if resize is None or not all(type(value) is int for value in (*sides, *bounds)):
            kind = type(processor).__name__
            wanted = "a model whose processor resizes the whole image to whole cells (Qwen's)"
            raise ConfigError(f"`--model`: expected {wanted}, got {kind} of {model}")
        return cls(resize, sides[0] * sides[1], *bounds)

    def __call__(self, size: Size) -> Size:
        """(width, height) of an image of this (width, height).

        Raises:
            ValueError: the processor refuses such an image.
        """
        height, width = self.resize(size[1], size[0], self.factor, self.least, self.most)
        return width, height


def resized_if_any(model: str | Path) -> Resized | None:
    """`Resized.of` a model; None for one whose processor does not resize images so."""
    try:
        return Resized.of(model)
    except ConfigError:
        return None


class Extent(NamedTuple):
    """Where an image is in the numbers of its boxes: its left top corner, and its sides."""

    origin: tuple[float, float]
    sides: tuple[float, float]

    def fractions(self, numbers: Numbers) -> Numbers:
        """Numbers to fractions of the image."""
        return tuple((n - self.origin[i % 2]) / self.sides[i % 2] for i, n in enumerate(numbers))

    def numbers(self, fractions: Numbers) -> Numbers:
        """Fractions of the image to numbers."""
        return tuple(self.origin[i % 2] + f * self.sides[i % 2] for i, f in enumerate(fractions))


def extent(unit: str, size: Size, resized: Resized | None) -> Extent:
    """The extent of an image in a unit.

    Args:
        unit: of `UNITS`.
        size: (width, height) of the image in pixels.
        resized: of the model; "resized" needs it.

    Raises:
        ValueError: the processor refuses such an image.
    """
    if unit in _SCALES:
        return Extent((0.0, 0.0), (_SCALES[unit],) * 2)
    if unit == "square":  # LLaVA's expand2square puts the odd pixel behind
        side = max(size)
        origin = tuple((side - each) // 2 / side for each in size)
        return Extent(origin, (size[0] / side, size[1] / side))
    found = size if unit == "pixel" or resized is None else resized(size)
    return Extent((0.0, 0.0), (float(found[0]), float(found[1])))
