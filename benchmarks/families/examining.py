"""What works with one family of the zoo: `groundkern.hf.examine` on its tiny model."""

from __future__ import annotations

from PIL import Image, ImageDraw

from benchmarks.families.zoo.making import Family
from groundkern.hf import Examination, examine

SIZES = ((150, 97), (61, 170))  # of the two images, in pixels


def examined(family: Family) -> tuple[str, Examination]:
    """Build a family and try everything on it.

    Args:
        family: of the zoo.

    Returns:
        "ok", or why the model or its processor cannot be built; and what was found.
    """
    try:
        model = family.model()
        processor = None if family.processor is None else family.processor()
    except Exception as error:  # whatever a family's code raises is a finding
        return f"{type(error).__name__}: {error}".split("\n")[0], Examination()
    return "ok", examine(model, processor, images(), gradients=True)


def images() -> list[Image.Image]:
    """White images with a red patch, wide and tall."""
    made = [Image.new("RGB", size, "white") for size in SIZES]
    for image in made:
        half = (image.width // 2, image.height // 2)
        ImageDraw.Draw(image).rectangle((8, 8, *half), fill="red")
    return made
