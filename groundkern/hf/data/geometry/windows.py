"""Families that see an image through windows: of a size that follows the image, or overlapping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groundkern.hf.data.geometry.cells import grid, placed, pooled, strided
from groundkern.hf.data.geometry.views import Size, option, own


def step3p7(processor: Any, size: Size) -> Tensor:
    """Step-3.7: windows row by row, then the whole image; tokens of every fourth patch.

    A very narrow image stands in the upper left corner of a padded square.

    Args:
        processor: the family's.
        size: (width, height) of the original image, in pixels.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Source: transformers' `Step3p7ImageProcessor`.
    """
    settings = processor.image_processor
    side, window_side = settings.size["height"], option(processor, "patch_size")
    plan = settings._plan_patches(*size, side, window_side)
    _, canvas, window, columns, rows, square = plan
    right, bottom = (max(size) / n if square else 1.0 for n in size)
    stride = settings.downsampler_stride

    def cells(pixels: int) -> Tensor:
        patches = pixels // settings.vision_patch_size
        along = strided(patches // stride, stride, patches)
        return grid(along, along)

    views = []
    for row in range(rows if window else 0):
        for column in range(columns):
            corner = column * window, row * window
            end = (min(a + window, whole) for a, whole in zip(corner, canvas))
            edges = (*corner, *end)
            x0, y0, x1, y1 = (edge / canvas[axis % 2] for axis, edge in enumerate(edges))
            views.append(placed(cells(window_side), (x0, y0, x1, y1)))
    return placed(torch.cat([*views, cells(side)]), (0.0, 0.0, right, bottom))


def molmo2(processor: Any, size: Size) -> Tensor:
    """Molmo2: the squashed image, then a grid over overlapping crops, without what they share.

    A token is pooled from a window of patches; the padded windows at the sides are cut off.

    Args, Returns: as `step3p7`.

    Source: transformers' `Molmo2ImageProcessor`.
    """
    settings = processor.image_processor
    side, patch = settings.size["height"], option(processor, "patch_size")
    high, wide = option(processor, "pooling_size")
    most, margins = option(processor, "max_crops"), option(processor, "overlap_margins")
    crops = own(settings, "compute_crop_geometry")
    *_, height, width = crops(size[1], size[0], most, margins, side, patch)
    views = [
        grid(pooled(columns // patch, wide), pooled(rows // patch, high))
        for rows, columns in ((side, side), (height, width))
    ]
    return torch.cat(views)
