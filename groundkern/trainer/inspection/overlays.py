"""A mask or a heat as a picture to lay over an image: translucent, with its edge drawn."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from groundkern.rasters import Raster
from groundkern.trainer.inspection.views import data_uri
from groundkern.trainer.outlines import cropped, outlines

LEAST, MOST = 240, 800  # pixels of the longer side
COVER, HEAT = 0.45, 0.8  # how much of the image a mask hides, and a heat where it is highest


def overlay(raster: Raster, color: str) -> str:
    """The part of a raster that is not 0, in one colour that covers the more, the hotter it is.

    Args:
        raster: a mask or a heat.
        color: of the page, as `#e8590c`.

    Returns:
        A data URI, to be stretched over `raster.bounds()`.
    """
    (x0, y0, x1, y1), values = cropped(raster, MOST)
    times = max(1, LEAST // max(values.shape))
    values = values.repeat(times, 0).repeat(times, 1)
    hidden = HEAT * values**0.75 if raster.heat else COVER * values
    alpha = Image.fromarray(np.uint8(np.rint(hidden * 255)))
    draw, (width, height) = ImageDraw.Draw(alpha), alpha.size
    for line in outlines(raster):
        corners = [
            ((x - x0) / (x1 - x0) * (width - 1), (y - y0) / (y1 - y0) * (height - 1))
            for x, y in line
        ]
        draw.line(corners, fill=255, width=2, joint="curve")
    picture = Image.new("RGB", alpha.size, ImageColor.getrgb(color))
    picture.putalpha(alpha)
    return data_uri(picture)
