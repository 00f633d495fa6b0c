"""Where visual tokens are in families that cut an image into tiles or crops beside a global view.

Each function returns the rectangles of one image's visual tokens in sequence order, as `geometry`
describes them. What a processor decides from an image's size is computed by the processor's own
rule; `tests/hf/painting.py` paints pixels and sees which tokens change.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil, isqrt, sqrt
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from groundkern.checks import fail, require
from groundkern.hf.data.geometry.cells import (
    centred,
    even,
    grid,
    placed,
    repeated,
    with_newlines,
    without_place,
)
from groundkern.hf.data.geometry.views import Size, Views, option, own, square_side
from groundkern.maps import patch_grid


def pan_and_scan(processor: Any, size: Size) -> Tensor:
    """Gemma3: the image squashed to a square, then the crops of pan-and-scan if it is on.

    Args:
        processor: the family's.
        size: (width, height) of the original image, in pixels.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Source: transformers' `Gemma3ImageProcessor`.
    """
    side = square_side("image_seq_length", processor.image_seq_length)
    views = [patch_grid(side, side)]
    if option(processor, "do_pan_and_scan"):
        width, height = size
        blank = torch.zeros(1).expand(1, height, width).numpy()  # only its shape is used
        pan = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        names = [f"pan_and_scan_{name}" for name in pan]
        how = {name: option(processor, name) for name in names}
        crops = processor.image_processor.pan_and_scan(blank, **how)
        for index, crop in enumerate(crops):  # all in one row, or all in one column
            along = index * crops[0].shape[2 if width >= height else 1]
            x0, y0 = (along, 0) if width >= height else (0, along)
            x1, y1 = x0 + crop.shape[2], y0 + crop.shape[1]
            view = (x0 / width, y0 / height, x1 / width, y1 / height)
            views.append(placed(patch_grid(side, side), view))
    return torch.cat(views)


def split_tiles(processor: Any, size: Size) -> Tensor:
    """Idefics3, SmolVLM: the image stretched to whole tiles, row by row, then the whole image.

    Args, Returns: as `pan_and_scan`.

    Source: transformers' `Idefics3ImageProcessor`.
    """
    settings = processor.image_processor
    side = square_side("image_seq_len", processor.image_seq_len)
    if not option(processor, "do_image_splitting"):
        return patch_grid(side, side)
    tile = settings.max_image_size["longest_edge"]
    width, height = _longest_edge(settings.size, size) if settings.do_resize else size
    if width >= height:  # the longer side first, the other one by the ratio it had before
        columns = ceil(width / tile)
        rows = ceil(int(columns * tile / (width / height)) / tile)
    else:
        rows = ceil(height / tile)
        columns = ceil(int(rows * tile * (width / height)) / tile)
    return tiles_and_whole(patch_grid(side, side), rows, columns)


def closest_canvas(processor: Any, size: Size, side: int, cells: Tensor | None = None) -> Tensor:
    """InternVL, Aya Vision: stretched to the tiling of the closest ratio, then the whole image.

    Args:
        processor: with a GOT-OCR image processor.
        size: (width, height) of the original image, in pixels.
        side: visual tokens along a tile.
        cells: [side², 4] of a tile's tokens in fractions of it; None: an even grid.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Raises:
        ValueError: another image processor.

    Source: transformers' `GotOcr2ImageProcessor`.
    """
    cells = patch_grid(side, side) if cells is None else cells
    settings = processor.image_processor
    canvas = own(settings, "get_optimal_tiled_canvas")
    most = option(processor, "max_patches")
    if not option(processor, "crop_to_patches") or most <= 1:
        return cells
    tile = (settings.size["height"], settings.size["width"])
    columns, rows = canvas(size[::-1], tile, option(processor, "min_patches"), most)
    return tiles_and_whole(cells, rows, columns)


def internvl(processor: Any, size: Size) -> Tensor:
    """InternVL: `closest_canvas` with tiles of `image_seq_length` tokens."""
    return closest_canvas(processor, size, isqrt(processor.image_seq_length))


def aya_vision(processor: Any, size: Size) -> Tensor:
    """Aya Vision: `closest_canvas` with tiles of whole patches."""
    return closest_canvas(processor, size, processor.img_size // processor.patch_size)


def padded(views: Views) -> list[Tensor]:
    """LLaVA-NeXT, LLaVA-OneVision: `padded_tiles` of every image."""
    return [
        padded_tiles(views.processor, views.config, image.size, alone=len(sample) == 1)
        for sample in views.images
        for image in sample
    ]


def padded_tiles(processor: Any, config: Any, size: Size, *, alone: bool) -> Tensor:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image, then a grid of tiles without its padding.

    Every row of the grid ends in a newline token, which has no place.

    Args:
        processor: the family's.
        config: the model's; its vision tower fixes the patches of a tile.
        size: (width, height) of the original image, in pixels.
        alone: the only image of its sample; in OneVision, one of several is a padded square and
            one newline.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Raises:
        ValueError: a class token in every tile (`vision_feature_select_strategy` "full" on CLIP).

    Source: transformers' `LlavaNextModel.pack_image_features`.
    """
    vision = config.vision_config
    patch, tile = vision.patch_size, vision.image_size
    rate = Fraction(getattr(processor, "downsample_rate", None) or 1)  # Granite 4 Vision's
    side = int(tile // patch * rate)
    extra = getattr(processor, "num_additional_image_tokens", 0)
    if extra - (processor.vision_feature_select_strategy == "default" and extra > 0):
        fail("vision_feature_select_strategy", "'default', no class tokens", "'full'")
    # patches that do not fill a tile leave its right and lower edge to nobody
    along = even(side) * side * patch / float(tile * rate)
    base = grid(along, along)
    onevision = config.model_type == "llava_onevision"
    if onevision and not alone:
        return torch.cat([centred(base, (max(size),) * 2, size), without_place(1)])
    pinpoints = processor.image_processor.image_grid_pinpoints
    wanted = f"config.json's {config.image_grid_pinpoints}"
    same = sorted(map(tuple, pinpoints)) == sorted(map(tuple, config.image_grid_pinpoints))
    require(same, "image_grid_pinpoints of the processor", wanted, pinpoints)
    height, width = select_best_resolution(size[::-1], pinpoints)
    x, y = repeated(along, width // tile), repeated(along, height // tile)
    cells = grid(x, y).view(len(y), len(x), 4)
    cells = _in_original(cells, (width, height), size)
    cells = _without_padding(cells, size)
    if onevision:
        most = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        cells = _at_most(most * side**2, cells)
    return torch.cat([base, with_newlines(cells)])


def tiles_of(cells: Tensor, rows: int, columns: int) -> Tensor:
    """The tokens of tiles of one size over the image, row by row.

    Args:
        cells: [n, 4] of a tile, in fractions of it.
        rows, columns: of tiles.

    Returns:
        fp64 [rows columns n, 4].
    """
    return torch.cat([placed(cells, tuple(view)) for view in patch_grid(rows, columns).tolist()])


def tiles_and_whole(cells: Tensor, rows: int, columns: int, *, first: bool = False) -> Tensor:
    """The tokens of tiles and of the whole image; of the latter alone if one tile would do.

    Args:
        cells: [n, 4] of a tile, in fractions of it, and of the view of the whole image.
        rows, columns: of tiles.
        first: the whole image comes before the tiles.

    Returns:
        fp64 [n or (rows columns + 1) n, 4].
    """
    if rows * columns == 1:
        return cells
    tiles = tiles_of(cells, rows, columns)
    return torch.cat([cells, tiles] if first else [tiles, cells])


def _longest_edge(size: Mapping[str, int], image: Size) -> Size:
    """(width, height) after Idefics3's resize: the shorter side is rounded up to an even number."""
    longest = size.get("longest_edge")
    if longest is None:
        return size["width"], size["height"]
    width, height = image
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    limit = 4096  # transformers' MAX_IMAGE_SIZE
    if max(width, height) > limit:
        ratio = width / height
        wide = width >= height
        width, height = (limit, int(limit / ratio)) if wide else (int(limit * ratio), limit)
    return max(width, 1), max(height, 1)


def _in_original(rects: Tensor, canvas: Size, size: Size) -> Tensor:
    """Fractions of a canvas with the image resized to fit in its middle -> of the image."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    if canvas[0] / size[0] < canvas[1] / size[1]:
        resized = (canvas[0], min(ceil(size[1] * scale), canvas[1]))
    else:
        resized = (min(ceil(size[0] * scale), canvas[0]), canvas[1])
    return centred(rects, canvas, resized)


def _without_padding(grid: Tensor, size: Size) -> Tensor:
    """Drop the rows or columns of a grid [rows, columns, 4] that the model drops as padding."""
    rows, columns = grid.shape[:2]
    width, height = size
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, cut : columns - cut]


def _at_most(tokens: int, grid: Tensor) -> Tensor:
    """The coarser grid over the same area if there are more than 1.21 times `tokens`."""
    rows, columns = grid.shape[:2]
    ratio = sqrt(rows * columns / tokens)
    if ratio <= 1.1:
        return grid
    rows, columns = int(rows // ratio), int(columns // ratio)
    low, high = grid[0, 0, :2], grid[-1, -1, 2:]
    spread = patch_grid(rows, columns) * (high - low).repeat(2) + low.repeat(2)
    return spread.view(rows, columns, 4)
