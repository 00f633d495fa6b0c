"""What works with one family of the zoo: `groundkern.hf.examine` on its tiny model."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw
from torch import nn

from benchmarks.families.zoo.making import Family
from groundkern.hf import Examination, MeasuredGeometry, examine
from groundkern.hf.data.geometry import NO_PLACE, Geometry, check_family

SIZES = ((150, 97), (61, 170))  # of the two images, in pixels


def examined(family: Family) -> tuple[str, str, Examination]:
    """Build a family and try everything on it.

    Args:
        family: of the zoo.

    Returns:
        "ok", or why the model or its processor cannot be built; "table", "measured" or why its
        visual tokens have no known places; and what was found.
    """
    try:
        model = family.model()
        processor = None if family.processor is None else family.processor()
    except Exception as error:  # whatever a family's code raises is a finding
        return f"{type(error).__name__}: {error}".split("\n")[0], "", Examination()
    geometry, kind = _geometry(model, processor)
    found = examine(model, processor, images(), geometry=geometry, gradients=True)
    return "ok", kind, found


def _geometry(model: nn.Module, processor: Any | None) -> tuple[Geometry | None, str]:
    """The geometry for `examine`, and its kind or why there is none."""
    try:
        check_family(model.config.model_type)
        return None, "table"
    except ValueError as error:
        reason = str(error)
    if processor is None or model.config.model_type in NO_PLACE:
        return None, reason
    try:
        measured = MeasuredGeometry(model, processor)
        measured.measure([[size] for size in SIZES])
        return measured, "measured"
    except Exception as error:  # whatever a family's code raises is a finding
        return None, str(error).split("\n")[0]


def images() -> list[Image.Image]:
    """White images with a red patch, wide and tall."""
    made = [Image.new("RGB", size, "white") for size in SIZES]
    for image in made:
        half = (image.width // 2, image.height // 2)
        ImageDraw.Draw(image).rectangle((8, 8, *half), fill="red")
    return made
