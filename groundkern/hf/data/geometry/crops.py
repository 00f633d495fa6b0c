"""Families that show an image once, in a view of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from groundkern.checks import require
from groundkern.hf.data.geometry.cells import centred, even, grid, strided, without_place
from groundkern.hf.data.geometry.views import Size, square_side
from groundkern.maps import patch_grid

Along = Callable[[int, float, float], Tensor]
"""The cells of a side by (tokens, pixels of a token, pixels in all), as fractions of it."""


def cropped(processor: Any, size: Size) -> Tensor:
    """LLaVA: padded to a square, resized, cropped at the center (each optional), then patches."""
    return _llava(processor, size, _even)


def convolved(processor: Any, size: Size) -> Tensor:
    """FastVLM: as LLaVA, but a token is the output of many convolutions of stride 2.

    It sees far more than its place, which is all that is nearer to its middle than to another's.
    """
    return _llava(processor, size, strided)


def _llava(processor: Any, size: Size, along: Along) -> Tensor:
    rects = cropped_cells(processor.image_processor, size, processor.patch_size, along)
    # a class token that the projector receives comes first and has no place
    extra = processor.num_additional_image_tokens - (
        processor.vision_feature_select_strategy == "default"
    )
    return torch.cat([without_place(max(extra, 0)), rects])


def chameleon(processor: Any, size: Size) -> Tensor:
    """Chameleon: resized, cropped at the center, then a square of codes."""
    side = square_side("image_seq_length", processor.image_seq_length)
    settings = processor.image_processor
    require(settings.do_center_crop, "processor.image_processor.do_center_crop", "True", False)
    return cropped_cells(settings, size, settings.crop_size["width"] // side)


def padded_square(processor: Any, size: Size) -> Tensor:
    """Janus, DeepSeek-VL: the longest edge resized, in the middle of a square, then patches."""
    settings = processor.image_processor
    require(settings.do_pad, "processor.image_processor.do_pad", "True", False)
    side = square_side("num_image_tokens", processor.num_image_tokens)
    resized = size
    if settings.do_resize:  # the hybrid's low resolution is made of the high one
        edge = getattr(settings, "high_res_size", settings.size)["height"]
        delta = edge / max(size)
        width, height = (max(round(length * delta), settings.min_size) for length in size)
        resized = width, height
    return centred(patch_grid(side, side), (max(resized),) * 2, resized)


def raw_patches(processor: Any, size: Size) -> Tensor:
    """Fuyu: made smaller if it is too large, then as many whole patches as cover it."""
    settings = processor.image_processor
    most, patch = settings.size, settings.patch_size
    resized, limits = size, (most["width"], most["height"])
    if settings.do_resize and (size[0] > limits[0] or size[1] > limits[1]):
        scale = min(limits[1] / size[1], limits[0] / size[0])
        resized = int(size[0] * scale), int(size[1] * scale)
    columns, rows = ceil(resized[0] / patch["width"]), ceil(resized[1] / patch["height"])
    covered = columns * patch["width"] / resized[0], rows * patch["height"] / resized[1]
    return patch_grid(rows, columns) * torch.tensor([*covered, *covered], dtype=torch.float64)


def _even(tokens: int, patch: float, pixels: float) -> Tensor:
    return even(tokens)


def cropped_cells(settings: Any, size: Size, patch: int, along: Along = _even) -> Tensor:
    """Patches of a view that may be padded, resized and cropped.

    Args:
        settings: the image or video processor.
        size: (width, height) of the original image, in pixels.
        patch: pixels of a patch's side.
        along: the cells of a side.

    Returns:
        fp64 [n, 4] of the image.
    """
    width, height = size
    side = max(width, height)
    # pixels of the image that is resized, and where the original begins in it
    if getattr(settings, "do_pad", False):
        canvas, origin = (side, side), ((side - width) // 2, (side - height) // 2)
    else:
        canvas, origin = (width, height), (0, 0)
    resized = _resized(settings.size, canvas) if settings.do_resize else canvas
    view, offset = resized, (0, 0)
    if settings.do_center_crop:
        view = (settings.crop_size["width"], settings.crop_size["height"])
        offset = ((resized[0] - view[0]) // 2, (resized[1] - view[1]) // 2)
    columns, rows = view[0] // patch, view[1] // patch
    sides = (columns, rows)
    cells = grid(*(along(tokens, patch, tokens * patch) for tokens in sides))
    pixels = cells * torch.tensor([*sides, *sides]) * patch

    def per_axis(pair: tuple[float, float]) -> Tensor:
        return torch.tensor([*pair, *pair], dtype=torch.float64)

    scale = per_axis((canvas[0] / resized[0], canvas[1] / resized[1]))
    return ((pixels + per_axis(offset)) * scale - per_axis(origin)) / per_axis(size)


def _resized(size: Mapping[str, int], image: Size) -> Size:
    """(width, height) after the resize that `size` asks for."""
    short = size.get("shortest_edge")
    if short is None:
        return size["width"], size["height"]
    width, height = image
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
