"""Where visual tokens are in families that cut an image into tiles or crops beside a global view.

Each function returns the rectangles of one image's visual tokens in sequence order, as `geometry`
describes them. What a processor decides from an image's size is computed by the processor's own
rule; `tests/hf/painting.py` paints pixels and sees which tokens change.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import ceil, isqrt, sqrt
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from groundkern.checks import fail, require
from groundkern.hf.data.geometry.views import Size, Views, option
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
    side = _side("image_seq_length", processor.image_seq_length)
    views = [patch_grid(side, side)]
    if option(processor, "do_pan_and_scan"):
        width, height = size
        blank = torch.zeros(1).expand(1, height, width).numpy()  # only its shape is used
        names = ("min_crop_size", "max_num_crops", "min_ratio_to_activate")
        names = [f"pan_and_scan_{name}" for name in names]
        how = {name: option(processor, name) for name in names}
        crops = processor.image_processor.pan_and_scan(blank, **how)
        for index, crop in enumerate(crops):  # all in one row, or all in one column
            along = index * crops[0].shape[2 if width >= height else 1]
            x0, y0 = (along, 0) if width >= height else (0, along)
            x1, y1 = x0 + crop.shape[2], y0 + crop.shape[1]
            views.append(_placed(side, (x0 / width, y0 / height, x1 / width, y1 / height)))
    return torch.cat(views)


def split_tiles(processor: Any, size: Size) -> Tensor:
    """Idefics3, SmolVLM: the image stretched to whole tiles, row by row, then the whole image.

    Args, Returns: as `pan_and_scan`.

    Source: transformers' `Idefics3ImageProcessor`.
    """
    settings = processor.image_processor
    side = _side("image_seq_len", processor.image_seq_len)
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
    return _tiles_and_whole(side, rows, columns)


def closest_canvas(processor: Any, size: Size, side: int) -> Tensor:
    """InternVL, Aya Vision: stretched to the tiling of the closest ratio, then the whole image.

    Args:
        processor: with a GOT-OCR image processor.
        size: (width, height) of the original image, in pixels.
        side: visual tokens along a tile.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Raises:
        ValueError: another image processor.

    Source: transformers' `GotOcr2ImageProcessor`.
    """
    settings = processor.image_processor
    canvas = next(
        (
            sys.modules[kind.__module__].get_optimal_tiled_canvas
            for kind in type(settings).__mro__
            if hasattr(sys.modules[kind.__module__], "get_optimal_tiled_canvas")
        ),
        None,
    )
    if canvas is None:
        fail("processor.image_processor", "GOT-OCR's tiling", type(settings).__name__)
    most = option(processor, "max_patches")
    if not option(processor, "crop_to_patches") or most <= 1:
        return patch_grid(side, side)
    tile = (settings.size["height"], settings.size["width"])
    columns, rows = canvas(size[::-1], tile, option(processor, "min_patches"), most)
    return _tiles_and_whole(side, rows, columns)


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
    side = tile // patch
    extra = getattr(processor, "num_additional_image_tokens", 0)
    if extra - (processor.vision_feature_select_strategy == "default" and extra > 0):
        fail("vision_feature_select_strategy", "'default', no class tokens", "'full'")
    newline = torch.full((1, 4), -1.0, dtype=torch.float64)
    covered = side * patch / tile  # of a view: what is left of less than a patch is not seen
    whole = patch_grid(side, side) * covered
    onevision = config.model_type == "llava_onevision"
    if onevision and not alone:
        return torch.cat([_on_padded_square(whole, size), newline])
    pinpoints = processor.image_processor.image_grid_pinpoints
    wanted = f"config.json's {config.image_grid_pinpoints}"
    same = sorted(map(tuple, pinpoints)) == sorted(map(tuple, config.image_grid_pinpoints))
    require(same, "image_grid_pinpoints of the processor", wanted, pinpoints)
    height, width = select_best_resolution(size[::-1], pinpoints)
    grid = _grid_of_tiles(whole, side, height // tile, width // tile)
    grid = _in_original(grid, (width, height), size)
    grid = _without_padding(grid, size)
    if onevision:
        grid = _at_most(
            int(processor.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2, grid
        )
    ends = newline.expand(len(grid), 1, 4)
    return torch.cat([whole, torch.cat([grid, ends], 1).flatten(0, 1)])


def _side(name: str, tokens: int) -> int:
    require(isqrt(tokens) ** 2 == tokens, f"processor.{name}", "a square number", tokens)
    return isqrt(tokens)


def _placed(side: int, view: tuple[float, float, float, float]) -> Tensor:
    """The tokens of a square view that shows the rectangle `view` of the image."""
    x0, y0, x1, y1 = view
    size = torch.tensor([x1 - x0, y1 - y0] * 2, dtype=torch.float64)
    return patch_grid(side, side) * size + torch.tensor([x0, y0] * 2, dtype=torch.float64)


def _tiles_and_whole(side: int, rows: int, columns: int) -> Tensor:
    whole = [patch_grid(side, side)]
    if rows * columns == 1:
        return whole[0]
    tiles = [_placed(side, tuple(view)) for view in patch_grid(rows, columns).tolist()]
    return torch.cat(tiles + whole)


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


def _grid_of_tiles(tile: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """[rows * side, columns * side, 4]: tiles beside one another, as fractions of all of them.

    Args:
        tile: [side * side, 4], a tile's tokens as fractions of it.
        side: tokens along a tile.
        rows, columns: of tiles.
    """
    across = torch.tensor([columns, rows, columns, rows], dtype=torch.float64)
    at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    at = at.flip(-1).repeat(1, 1, 2)[:, None, :, None]  # [rows, 1, columns, 1, 4]: x, y, x, y
    placed = (at + tile.view(1, side, 1, side, 4)) / across
    return placed.flatten(2, 3).flatten(0, 1)


def _in_original(rects: Tensor, canvas: Size, size: Size) -> Tensor:
    """Fractions of a canvas with the image resized to fit in its middle -> of the image."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    if canvas[0] / size[0] < canvas[1] / size[1]:
        resized = (canvas[0], min(ceil(size[1] * scale), canvas[1]))
    else:
        resized = (min(ceil(size[0] * scale), canvas[0]), canvas[1])
    before = [(whole - part) // 2 for whole, part in zip(canvas, resized)]
    whole, offset, part = (
        torch.tensor([*pair, *pair], dtype=torch.float64) for pair in (canvas, before, resized)
    )
    return (rects * whole - offset) / part


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


def _on_padded_square(rects: Tensor, size: Size) -> Tensor:
    """Fractions of a square with the image in its middle -> of the image."""
    width, height = size
    side = max(size)
    offset = torch.tensor([(side - width) // 2, (side - height) // 2] * 2, dtype=torch.float64)
    return (rects * side - offset) / torch.tensor([width, height] * 2, dtype=torch.float64)
