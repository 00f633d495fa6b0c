"""Families that show an image once, in a view of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from groundkern.hf.data.geometry.cells import even, grid, strided
from groundkern.hf.data.geometry.views import Size


def cropped(processor: Any, size: Size) -> Tensor:
    """LLaVA: padded to a square, resized, cropped at the center (each optional), then patches."""
    return _cropped(processor, size, lambda tokens, patch, pixels: even(tokens))


def convolved(processor: Any, size: Size) -> Tensor:
    """FastVLM: as LLaVA, but a token is the output of many convolutions of stride 2.

    It sees far more than its place, which is all that is nearer to its middle than to another's.
    """
    return _cropped(processor, size, strided)


def _cropped(processor: Any, size: Size, along: Callable[[int, float, float], Tensor]) -> Tensor:
    """The tokens of a crop; `along` makes the cells of a side: (tokens, pixels of one, pixels)."""
    settings = processor.image_processor
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
    patch = processor.patch_size
    columns, rows = view[0] // patch, view[1] // patch
    sides = (columns, rows)
    cells = grid(*(along(tokens, patch, tokens * patch) for tokens in sides))
    pixels = cells * torch.tensor([*sides, *sides]) * patch

    def per_axis(pair: tuple[float, float]) -> Tensor:
        return torch.tensor([*pair, *pair], dtype=torch.float64)

    scale = per_axis((canvas[0] / resized[0], canvas[1] / resized[1]))
    rects = ((pixels + per_axis(offset)) * scale - per_axis(origin)) / per_axis(size)
    # a class token that the projector receives comes first and has no place
    extra = processor.num_additional_image_tokens - (
        processor.vision_feature_select_strategy == "default"
    )
    return torch.cat([rects.new_full((max(extra, 0), 4), -1.0), rects])


def _resized(size: Mapping[str, int], image: Size) -> Size:
    """(width, height) after the resize that `size` asks for."""
    short = size.get("shortest_edge")
    if short is None:
        return size["width"], size["height"]
    width, height = image
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
