"""Families whose processor tells the grid that it laid over each image.

Most stretch the image until it fills whole cells of the grid (`stretched`); some keep its shape,
and fill up the grid at the right and below (`cornered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import floor
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.geometry.cells import with_newlines, without_place
from groundkern.hf.data.geometry.views import Rule, Size, Views, option, own
from groundkern.maps import patch_grid


def stretched(views: Views) -> list[Tensor]:
    """Qwen and many more: a grid of merged patches, its size from `image_grid_thw`."""
    return [patch_grid(rows, columns) for rows, columns in _grids(views)]


def hunyuan_vl(views: Views) -> list[Tensor]:
    """HunYuan: as `stretched`, with a token at the end of each row and one before and after all."""
    around = int(views.processor.cat_extra_token)
    tables = []
    for rows, columns in _grids(views):
        table = patch_grid(rows, columns).unflatten(0, (rows, columns))
        beside = without_place(around)
        tables.append(torch.cat([beside, with_newlines(table), beside]))
    return tables


def cornered(content: Callable[[Any, Size, Size], Size]) -> Rule:
    """The rule of a family that keeps the image's shape, in the upper left corner of the grid.

    Args:
        content: of (processor, size, size of the grid in pixels) the pixels that the image fills.
    """

    def rule(views: Views) -> list[Tensor]:
        side = option(views.processor, "patch_size") * views.processor.image_processor.merge_size
        sizes, grids = views.sizes, list(_grids(views))
        require(len(grids) == len(sizes), "image_grid_thw", f"{len(sizes)} images", len(grids))
        tables = []
        for size, (rows, columns) in zip(sizes, grids):
            canvas = (columns * side, rows * side)
            filled = canvas
            if option(views.processor, "do_resize"):
                filled = content(views.processor, size, canvas)
            scale = [whole / part for whole, part in zip(canvas, filled)]
            tables.append(patch_grid(rows, columns) * torch.tensor([*scale, *scale]).double())
        return tables

    return rule


def glm5_next(processor: Any, size: Size, canvas: Size) -> Size:
    """GLM-5: an image is made larger only if it has too few pixels for the fewest tokens."""
    cell = (option(processor, "patch_size") * processor.image_processor.merge_size) ** 2
    scale = min(whole / side for whole, side in zip(canvas, size))
    if size[0] * size[1] >= cell * option(processor, "min_image_tokens"):
        scale = min(1.0, scale)
    width, height = (max(1, min(w, floor(s * scale))) for w, s in zip(canvas, size))
    return width, height


def kimi_k25(processor: Any, size: Size, canvas: Size) -> Size:
    """Kimi: an image is made smaller if it has too many patches, and never larger.

    Raises:
        ValueError: another image processor.
    """
    settings = processor.image_processor
    filled, whole = own(settings, "navit_resize")(
        size[1],
        size[0],
        patch_size=option(processor, "patch_size"),
        merge_kernel_size=settings.merge_size,
        max_patches=option(processor, "max_patches"),
        max_size_per_side=option(processor, "size")["max_height"],
    )
    require(whole == canvas[::-1], "image_grid_thw", f"(height, width) of {whole}", canvas[::-1])
    return filled[::-1]


def emu3(views: Views) -> list[Tensor]:
    """Emu3: a grid of codes, its size from `image_sizes`; a token without a place ends each row."""
    pixels, tables = views.processor.downsample_ratio, []
    sizes = torch.as_tensor(views.batch.get("image_sizes", ())).reshape(-1, 2).tolist()
    for (height, width), size in zip(sizes, views.sizes, strict=True):
        # 3 pixels of height are taken for the channels
        upright = (height - width) * (size[1] - size[0]) >= 0
        wanted = f"the shape of an image of {size[0]} x {size[1]}"
        require(upright, "image_sizes", wanted, f"{width} x {height}")
        columns = width // pixels
        grid = patch_grid(height // pixels, columns).unflatten(0, (-1, columns))
        tables.append(with_newlines(grid))
    return tables


def nemotron_h_omni(views: Views) -> list[Tensor]:
    """Nemotron-H-Omni: a grid of merged patches, its size from `image_grid_hw`."""
    merge_size = round(1 / views.processor.image_processor.downsample_ratio)
    grids = torch.as_tensor(views.batch.get("image_grid_hw", ())).reshape(-1, 2).tolist()
    return [patch_grid(height // merge_size, width // merge_size) for height, width in grids]


def _grids(views: Views) -> Iterator[tuple[int, int]]:
    """(rows, columns) of visual tokens of every image."""
    merge_size = views.processor.image_processor.merge_size
    grids = views.batch.get("image_grid_thw", ())
    for time, height, width in torch.as_tensor(grids).reshape(-1, 3).tolist():
        require(time == 1, "image_grid_thw", "still images (t = 1)", f"t = {time}")
        yield height // merge_size, width // merge_size
