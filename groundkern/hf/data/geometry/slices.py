"""Families that show slices of a large image and the whole of it, each in a grid of its own shape.

How an image is sliced is asked of the family's own image processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.geometry.cells import placed
from groundkern.hf.data.geometry.tiling import tiles_of
from groundkern.hf.data.geometry.views import Size, Views, option
from groundkern.maps import patch_grid


def lfm2_vl(processor: Any, size: Size) -> Tensor:
    """LFM2-VL: square tiles of a large image row by row, then the whole; of a small one the whole.

    Args:
        processor: the family's.
        size: (width, height) of the original image, in pixels.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Raises:
        ValueError: tiles that are not whole cells.

    Source: transformers' `Lfm2VlImageProcessor`.
    """
    settings = processor.image_processor

    def options(*names: str) -> dict[str, Any]:
        return {name: option(processor, name) for name in names}

    width, height = size
    patches = options("max_image_tokens", "encoder_patch_size", "downsample_factor")
    cell = patches["encoder_patch_size"] * patches["downsample_factor"]
    resized = settings.smart_resize(height, width, **patches, **options("min_image_tokens"))
    whole = patch_grid(resized[1] // cell, resized[0] // cell)
    large = settings._is_image_too_large(
        height, width, **patches, **options("max_pixels_tolerance")
    )
    limits = options("min_tiles", "max_tiles", "tile_size")
    splits = option(processor, "do_image_splitting")
    if not (large and splits) or limits["min_tiles"] == limits["max_tiles"] == 1:
        return whole
    columns, rows, *_ = settings._get_grid_layout(height, width, **limits)
    tile = limits["tile_size"]
    require(tile % cell == 0, "processor.tile_size", f"a multiple of {cell}", tile)
    tiles = tiles_of(patch_grid(tile // cell, tile // cell), rows, columns)
    return torch.cat([tiles, whole]) if option(processor, "use_thumbnail") else tiles


def whole_and_slices(views: Views) -> list[Tensor]:
    """MiniCPM-V, MiniCPM-OCR: the whole image, then its slices row by row if it is large.

    A slice may be processed in a resolution of its own ("adaptive"), cut at whole pixels of the
    image; that moves its place by half a pixel at most, which is neglected.

    Returns:
        fp64 [n, 4] of every image.

    Raises:
        ValueError: views in the batch that are not those of the images.

    Source: transformers' `MiniCPMV4_6ImageProcessor` and `MiniCPMOcrImageProcessor`.
    """
    processor = views.processor
    cell = 2 if option(processor, "downsample_mode") == "4x" else 4  # patches along a token
    limits = option(processor, "max_slice_nums"), option(processor, "scale_resolution")
    found = np.asarray(views.batch.get("target_sizes", ())).reshape(-1, 2)
    sizes = iter(found.tolist())
    tables, used = [], 0
    for width, height in views.sizes:
        grid = None
        if option(processor, "slice_mode"):
            grid = processor.image_processor.get_sliced_grid((height, width), *limits)
        places = patch_grid(*grid).tolist() if grid is not None else []
        used += 1 + len(places)
        require(used <= len(found), "target_sizes", f"{used} views or more", len(found))
        whole = _patches(sizes, cell)
        parts = (placed(_patches(sizes, cell), tuple(place)) for place in places)
        tables.append(torch.cat([whole, *parts]))
    require(used == len(found), "target_sizes", f"the {used} views of the images", len(found))
    return tables


def _patches(sizes: Iterator[list[int]], cell: int) -> Tensor:
    """The tokens of the next view, of which each covers `cell` x `cell` patches."""
    height, width = next(sizes)
    whole = height % cell == 0 and width % cell == 0
    require(whole, "target_sizes", f"multiples of {cell} patches", f"{height} x {width}")
    return patch_grid(height // cell, width // cell)
