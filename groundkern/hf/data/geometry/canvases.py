"""Families whose tiles lie on a canvas that the processor chooses by an image's size.

The choice is the processor's own function, wherever it has one.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import SizeDict

from groundkern.checks import require
from groundkern.hf.data.geometry.cells import (
    centred,
    grid,
    placed,
    repeated,
    strided,
    with_newlines,
    without_place,
)
from groundkern.hf.data.geometry.tiling import (
    closest_canvas,
    tiles_and_whole,
    tiles_of,
)
from groundkern.hf.data.geometry.views import Size, Views, option, own, square_side
from groundkern.maps import patch_grid


def cohere2_vision(processor: Any, size: Size) -> Tensor:
    """Cohere2-Vision: `closest_canvas`, with the processor's `patch_size` as tokens along a tile.

    Args:
        processor: the family's.
        size: (width, height) of the original image, in pixels.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Source: transformers' `Cohere2VisionProcessor`.
    """
    return closest_canvas(processor, size, processor.patch_size)


def got_ocr2(views: Views) -> list[Tensor]:
    """GOT-OCR2: `closest_canvas`; two convolutions make a token of every fourth patch.

    Args:
        views: the images, and how they were processed.

    Returns:
        As `cohere2_vision`, for every image.

    Raises:
        ValueError: a number of tokens that the model does not make of a tile.

    Source: transformers' `GotOcr2MultiModalProjector`.
    """
    processor = views.processor
    tokens = getattr(processor, "num_image_tokens", None) or option(processor, "num_image_tokens")
    side = square_side("num_image_tokens", tokens)
    patches = processor.image_processor.size["height"] // views.config.vision_config.patch_size
    wanted = f"{ceil(patches / 4)} along a tile of {patches} patches"
    require(side == ceil(patches / 4), "num_image_tokens", wanted, side)
    cells = strided(side, 4, patches)
    return [closest_canvas(processor, size, side, grid(cells, cells)) for size in views.sizes]


def granite_docling(processor: Any, size: Size) -> Tensor:
    """Granite-Docling: tiles row by row, then the whole page; four times the tokens by option.

    Args, Returns: as `cohere2_vision`.

    Source: transformers' `GraniteDoclingImageProcessor`.
    """
    settings = processor.image_processor
    side = square_side("image_seq_len", processor.image_seq_len)
    side *= 2 if option(processor, "fine_route") else 1
    names = ["size", "crop_to_patches", "min_patches", "max_patches", "dense_max_patches"]
    names += ["dense_max_scale", "dense_min_aspect", "dense_max_aspect"]
    options = {name: option(processor, name) for name in names}
    rows, columns = settings.get_tile_grid(size[1], size[0], options)
    return tiles_and_whole(patch_grid(side, side), rows, columns)


def ovis2(processor: Any, size: Size) -> Tensor:
    """Ovis2: the whole image, then the tiles row by row if there are several.

    Args, Returns: as `cohere2_vision`.

    Source: transformers' `Ovis2ImageProcessor`.
    """
    settings = processor.image_processor
    side = square_side("image_seq_length", processor.image_seq_length)
    most = option(processor, "max_patches")
    if not option(processor, "crop_to_patches") or most <= 1:
        return patch_grid(side, side)
    tile = (settings.size["height"], settings.size["width"])
    if option(processor, "use_covering_area_grid"):
        choose = own(settings, "get_min_tile_covering_grid")
        columns, rows = choose(size[::-1], tile[0], most, 0.9)
    else:
        choose = own(settings, "get_optimal_tiled_canvas")
        columns, rows = choose(size[::-1], tile, option(processor, "min_patches"), most)
    return tiles_and_whole(patch_grid(side, side), rows, columns, first=True)


def perception_lm(processor: Any, size: Size) -> Tensor:
    """PerceptionLM: the whole image, then tiles row by row, even a single one.

    Args, Returns: as `cohere2_vision`.

    Source: transformers' `PerceptionLMImageProcessor`.
    """
    settings = processor.image_processor
    tile = option(processor, "tile_size")
    side = tile // processor.patch_size // processor.pooling_ratio
    whole = patch_grid(side, side)
    if option(processor, "vision_input_type") != "thumb+tile":
        return whole
    of = {"img_width": size[0], "img_height": size[1], "tile_size": tile}
    columns, rows = 1, 1
    if option(processor, "max_num_tiles") > 1:
        columns, rows = settings._fit_image_to_canvas(**of) or settings._find_closest_aspect_ratio(
            **of
        )
    return torch.cat([whole, tiles_of(whole, rows, columns)])


def llama4(processor: Any, size: Size) -> Tensor:
    """Llama 4: tiles of a canvas with the image in its upper left corner, then the whole image.

    Args, Returns: as `cohere2_vision`.

    Source: transformers' `Llama4ImageProcessor`.
    """
    settings = processor.image_processor
    tile, patch = settings.size["height"], processor.patch_size
    side = isqrt((tile // patch) ** 2 // processor.downsample_ratio)
    whole = patch_grid(side, side)
    largest, most = option(processor, "resize_to_max_canvas"), option(processor, "max_patches")
    square = SizeDict(height=tile, width=tile)
    shapes = own(settings, "find_supported_resolutions")(most, square)
    canvas = own(settings, "get_best_fit")(size[::-1], torch.tensor(shapes), largest).tolist()
    room = canvas if largest else [min(max(n, tile), c) for n, c in zip(size[::-1], canvas)]
    height, width = own(settings, "get_max_res_without_distortion")(size[::-1], tuple(room))
    shown = (0.0, 0.0, canvas[1] / max(width, 1), canvas[0] / max(height, 1))
    rows, columns = canvas[0] // tile, canvas[1] // tile
    tiles = placed(tiles_of(whole, rows, columns), shown)
    return tiles if rows * columns == 1 else torch.cat([tiles, whole])


def unlimited_ocr(processor: Any, size: Size) -> Tensor:
    """Unlimited-OCR: a grid of tiles, the whole image in a padded square, and a separator.

    Every row of either ends in a newline token; two convolutions make a token of every fourth
    patch.

    Args, Returns: as `cohere2_vision`.

    Source: transformers' `UnlimitedOcrModel.get_image_features`.
    """
    settings = processor.image_processor
    side, tile = (
        max(settings.size["height"], settings.size["width"]),
        option(processor, "tile_size"),
    )
    crops = option(processor, "crop_to_patches")
    patch, stride = processor.patch_size, processor.downsample_ratio

    def cells(pixels: int) -> Tensor:
        patches = pixels // patch
        return strided(ceil(patches / stride), stride, patches)

    views = []
    if crops and max(size) > tile:
        choose = own(settings, "get_optimal_tiled_canvas")
        least, most = option(processor, "min_patches"), option(processor, "max_patches")
        columns, rows = choose(size[::-1], (tile, tile), least, most)
        along = cells(tile)
        x, y = (repeated(along, n) for n in (columns, rows))
        views.append(with_newlines(grid(x, y).view(len(y), len(x), 4)))
    along = cells(side)
    whole = grid(along, along)
    if crops or side > option(processor, "maximum_pad_value"):
        width, height = (round(n * side / max(size)) for n in size)
        whole = centred(whole, (side, side), (width, height))
    whole = whole.view(len(along), len(along), 4)
    return torch.cat([*views, with_newlines(whole), without_place(1)])
