"""What a rule of geometry is given, and settings of processors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.processor import fixed_image_options

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # width, height in pixels


class Views(NamedTuple):
    """The images of a batch, and how they were processed.

    Args:
        processor: the model's processor.
        config: the model's config.
        images: the original images of each sample.
        batch: what the processor returned for all of them.
    """

    processor: Any
    config: Any
    images: Sequence[Sequence[Image.Image]]
    batch: Mapping[str, Any]

    @property
    def sizes(self) -> list[Size]:
        """(width, height) of every image, in their order."""
        return [image.size for sample in self.images for image in sample]


Rule = Callable[[Views], list[Tensor]]
"""Returns fp64 [n, 4] (x0, y0, x1, y1) of every image, in their order."""


def of_each(place: Callable[[Any, Size], Tensor]) -> Rule:
    """The rule of a family whose visual tokens follow from each image's size alone.

    Args:
        place: of (processor, size) [n, 4].
    """

    def rule(views: Views) -> list[Tensor]:
        return [place(views.processor, size) for size in views.sizes]

    return rule


def option(processor: Any, name: str) -> Any:
    """Look up a setting of image processing; the processor class's own default comes first.

    Args:
        processor: the family's.
        name: the setting.

    Returns:
        Its value; None if neither the processor nor its image processor has it.
    """
    found = getattr(processor.image_processor, name, None)
    return fixed_image_options(processor).get(name, found)


def own(settings: Any, name: str) -> Any:
    """A function of the module in which an image processor's class stands.

    Args:
        settings: the image processor.
        name: of the function.

    Raises:
        ValueError: none of its classes' modules has it.
    """
    modules = [sys.modules[kind.__module__] for kind in type(settings).__mro__]
    found = [getattr(module, name) for module in modules if hasattr(module, name)]
    if not found:
        fail("processor.image_processor", f"one with `{name}`", type(settings).__name__)
    return found[0]


def square_side(name: str, tokens: int) -> int:
    """Tokens along a square of them.

    Args:
        name: the processor's setting that counts them.
        tokens: how many there are.

    Returns:
        The square root.

    Raises:
        ValueError: they make no square.
    """
    require(isqrt(tokens) ** 2 == tokens, f"processor.{name}", "a square number", tokens)
    return isqrt(tokens)
