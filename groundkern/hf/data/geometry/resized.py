"""Families that show an image once, resized or padded to whole cells.

Pixtral's processor puts a break token after each row of cells, which is no visual token
(`config.image_token_id`) and therefore not in the table.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.calling import REPORTS
from groundkern.hf.data.geometry.crops import cropped
from groundkern.hf.data.geometry.views import Size, Views, of_each, option, square_side
from groundkern.maps import patch_grid


def square(processor: Any, size: Size) -> Tensor:
    """PaliGemma, Gemma3n: every image squashed to a square of `image_seq_length` tokens.

    Args:
        processor: the family's.
        size: (width, height) of the original image, in pixels.

    Returns:
        fp64 [n, 4] (x0, y0, x1, y1), in fractions of the image.

    Raises:
        ValueError: an image processor that crops, or a number of tokens that makes no square.
    """
    _check_uncropped(processor)
    side = square_side("image_seq_length", processor.image_seq_length)
    return patch_grid(side, side)


def gemma4(views: Views) -> list[Tensor]:
    """Gemma4: pools of patches over the image, whose positions the processor tells.

    Returns:
        fp64 [n, 4] of every image.

    Raises:
        ValueError: patches that do not fill whole pools.
    """
    return _positioned(views, option(views.processor, "pooling_kernel_size"))


def gemma4_unified(views: Views) -> list[Tensor]:
    """Gemma4 unified: as `gemma4`, but the processor has merged the patches of a pool."""
    return _positioned(views, 1)


def rows(views: Views) -> list[Tensor]:
    """Pixtral, Mistral3, LightOnOCR: cells of merged patches over the resized image.

    What is no whole cell at the right and at the bottom is not seen by the model; only processors
    that do not resize to whole cells leave such a rest.

    Returns:
        fp64 [n, 4] of every image.

    Raises:
        ValueError: an image processor that crops.

    Source: transformers' `PixtralProcessor` and `LightOnOcrProcessor`.
    """
    processor = views.processor
    _check_uncropped(processor)
    cell = processor.patch_size * processor.spatial_merge_size
    sizes = np.asarray(views.batch.get("image_sizes", ())).reshape(-1, 2).tolist()
    return [_cells(height // cell, width // cell, cell, (width, height)) for height, width in sizes]


def llava(views: Views) -> list[Tensor]:
    """LLaVA: `rows` if its processor is Pixtral's, else `crops.cropped`.

    Raises:
        ValueError: Pixtral's in a transformers that does not tell where its break tokens are.
    """
    pixtral = hasattr(views.processor, "image_break_token")
    if pixtral and not REPORTS:
        wanted = "transformers >= 5.20, whose processor tells what an image became"
        fail("processor", wanted, f"{type(views.processor).__name__} in an older one")
    return (rows if pixtral else of_each(cropped))(views)


def inkling2(processor: Any, size: Size) -> Tensor:
    """Inkling2: the image in its own resolution, padded at the right and bottom to whole cells.

    Args, Returns: as `square`.
    """
    cell = processor.image_processor.size["height"]
    width, height = size
    return _cells(ceil(height / cell), ceil(width / cell), cell, size)


def inkling(processor: Any, size: Size) -> Tensor:
    """Inkling: `inkling2` of the image scaled by a setting; a row always has padding.

    Where the image's width is a whole number of cells, its rows end in a cell of padding alone,
    which lies beside the image.

    Args, Returns: as `square`.

    Source: transformers' `InklingImageProcessor`.
    """
    cell = processor.image_processor.size["height"]
    width, height = _scaled(processor, size)
    return _cells(ceil(height / cell), width // cell + 1, cell, (width, height))


def _check_uncropped(processor: Any) -> None:
    if option(processor, "do_center_crop"):
        fail("processor.image_processor.do_center_crop", "False in this family", True)


def _cells(rows: int, columns: int, cell: int, size: Size) -> Tensor:
    """Square cells from the upper left corner of an image of `size`, in fractions of it."""
    width, height = size
    reach = [columns * cell / width, rows * cell / height] * 2
    return patch_grid(rows, columns) * torch.tensor(reach, dtype=torch.float64)


def _positioned(views: Views, pool: int) -> list[Tensor]:
    """Grids from `image_position_ids`, (x, y) of every patch and -1 behind the last one."""
    tables = []
    for positions in views.batch.get("image_position_ids", ()):
        columns, rows = (int(n) + 1 for n in np.asarray(positions).max(0))
        whole = columns % pool == 0 and rows % pool == 0
        wanted = f"a grid of patches in pools of {pool} x {pool}"
        require(whole, "image_position_ids", wanted, f"{rows} x {columns}")
        tables.append(patch_grid(rows // pool, columns // pool))
    return tables


def _scaled(processor: Any, size: Size) -> Size:
    """(width, height) after Inkling's optional scaling of the longer edge."""
    factor, cap = option(processor, "rescale_image_frac"), "rescale_image_max_upscaled_long_edge"
    if factor is None:
        return size
    longest, limit = max(size), option(processor, cap)
    target = longest * factor
    if limit is not None:
        target = min(target, max(limit, longest))
    width, height = (floor(side * (target / longest) + 0.5) for side in size)
    return width, height
