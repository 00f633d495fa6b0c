"""The edges of a mask or a heat as closed lines, for pictures."""

from __future__ import annotations

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import Image

from groundkern.rasters import HOT, Raster

FINE = 512  # pixels of the longer side that edges are followed on, of the part that has any

Line = list[tuple[float, float]]


def outlines(raster: Raster) -> list[Line]:
    """Closed lines around what is inside, holes too; of a heat, where it is half as hot as ever.

    Args:
        raster: a mask or a heat.

    Returns:
        Lines of points (x, y) in fractions of the image, the first point once more at the end.
    """
    box, values = cropped(raster)
    height, width = values.shape
    ringed = np.pad(values, 1)  # what is inside at the image's edge ends there
    left, top = box[0], box[1]
    step = (box[2] - left) / width, (box[3] - top) / height
    found = []
    for line in contour_generator(z=ringed).lines(HOT):
        x, y = (line - 0.5).T  # pixel 1 of the ringed picture has its middle half a pixel inside
        x, y = left + x.clip(0, width) * step[0], top + y.clip(0, height) * step[1]
        found.append(list(zip(x.round(5).tolist(), y.round(5).tolist())))
    return found


def cropped(
    raster: Raster, most: int = FINE
) -> tuple[tuple[float, float, float, float], NDArray[np.float32]]:
    """The part of a raster that is not 0: its box in fractions, and its values up to 1.

    Args:
        raster: a mask or a heat.
        most: pixels of the longer side; a larger part is made smaller: of a mask whatever holds any
            of it stays inside, so that thin things do not vanish, a heat is averaged.
    """
    height, width = raster.values.shape
    box = raster.bounds()
    x0, y0, x1, y1 = (round(v * side) for v, side in zip(box, (width, height) * 2, strict=True))
    part = raster.values[y0:y1, x0:x1].float().numpy()
    scale = most / max(part.shape)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in (x1 - x0, y1 - y0))
        part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BOX))
        part = part if raster.heat else np.float32(part > 0)
    return box, part / part.max()
