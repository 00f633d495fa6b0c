"""Where on the original image each visual token is, one table per processor family.

A table row is `(image, x0, y0, x1, y1)`: the image's index within its sample and a rectangle in
fractions of the original image. It is derived from the processor's own settings, so that a centre
crop, a padded square, tiles (`tiling`) or another resolution need no care by the caller. A part of
an image may have several tokens: one in a tile, one in the global view. A rectangle leaves [0, 1]
if the processor pads, and is (-1, -1, -1, -1) for a visual token without a place (a class token, a
newline).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data import tiling
from groundkern.maps import patch_grid

if TYPE_CHECKING:
    from PIL import Image

FAMILIES = {
    "aya_vision": "5.20",
    "gemma3": "5.20",
    "idefics3": "5.20",
    "internvl": "5.20",
    "llava": "5.1",
    "llava_next": "5.1",
    "llava_onevision": "5.1",
    "qwen2_5_vl": "5.1",
    "qwen3_vl": "5.1",
    "smolvlm": "5.20",
}
"""Values of `config.model_type` whose image geometry is known, and the transformers they need.

If an image becomes more than its visual tokens (markers, rows of tiles), the processor must report
what it became: `text_replacement_offsets`.
"""
TRANSFORMERS = Version(transformers.__version__)


def check_family(kind: str) -> None:
    """Refuse a family whose image geometry is not known with this transformers.

    Args:
        kind: the `config.model_type`.

    Raises:
        ValueError: an unknown family, or one whose processor reports enough only in a later
            transformers.
    """
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        fail("config.model_type", f"a family whose image geometry is known: {known}", repr(kind))
    since = FAMILIES[kind]
    if Version(since) > TRANSFORMERS:
        wanted = f"transformers >= {since}, whose processor tells what an image became"
        fail("config.model_type", wanted, f"{kind!r} with transformers {TRANSFORMERS}")


def image_geometry(
    processor: Any,
    config: Any,
    images: Sequence[Sequence[Image.Image]],
    batch: Mapping[str, Any],
) -> list[Tensor]:
    """The place of every visual token of every sample.

    Args:
        processor: the model's processor.
        config: the model's config; its `model_type` names the family.
        images: the original images of each sample.
        batch: what the processor returned for all of them (Qwen: `image_grid_thw`).

    Returns:
        fp64 [C, 5] for each sample: `(image, x0, y0, x1, y1)` in fractions of the image, in the
        order of the visual tokens in the sequence.

    Raises:
        ValueError: a family whose geometry is not known (`check_family`), or a grid that does not
            fit the images.

    Source: the image processors of transformers.
    """
    check_family(config.model_type)
    if config.model_type in ("qwen2_5_vl", "qwen3_vl"):
        grids = batch.get("image_grid_thw", ())
        tables = _stretched(grids, processor.image_processor.merge_size)
    else:
        tables = [
            _of_image(processor, config, image.size, alone=len(sample) == 1)
            for sample in images
            for image in sample
        ]
    wanted = sum(map(len, images))
    require(len(tables) == wanted, "batch", f"visual tokens of {wanted} images", f"{len(tables)}")
    tables = iter(tables)
    return [_numbered([next(tables) for _ in sample]) for sample in images]


def _of_image(processor: Any, config: Any, size: tuple[int, int], *, alone: bool) -> Tensor:
    """[n, 4] of one image whose visual tokens follow from its size (width, height)."""
    match config.model_type:
        case "llava":
            return _cropped(processor, size)
        case "llava_next" | "llava_onevision":
            return tiling.padded_tiles(processor, config, size, alone=alone)
        case "gemma3":
            return tiling.pan_and_scan(processor, size)
        case "idefics3" | "smolvlm":
            return tiling.split_tiles(processor, size)
        case "internvl":
            return tiling.closest_canvas(processor, size, isqrt(processor.image_seq_length))
        case _:
            return tiling.closest_canvas(
                processor, size, processor.img_size // processor.patch_size
            )


def _numbered(tables: list[Tensor]) -> Tensor:
    """Put each rectangle's image index in front: [n, 5]."""
    numbered = [torch.zeros(0, 5, dtype=torch.float64)]
    for image, rects in enumerate(tables):
        numbered.append(torch.cat([rects.new_full((rects.shape[0], 1), image), rects], 1))
    return torch.cat(numbered)


def _stretched(grids: Any, merge_size: int) -> list[Tensor]:
    """Qwen: the whole image is stretched over a grid of merged patches."""
    tables = []
    for time, height, width in torch.as_tensor(grids).reshape(-1, 3).tolist():
        require(time == 1, "image_grid_thw", "still images (t = 1)", f"t = {time}")
        tables.append(patch_grid(height // merge_size, width // merge_size))
    return tables


def _cropped(processor: Any, size: tuple[int, int]) -> Tensor:
    """LLaVA: padded to a square, resized, cropped at the center (each optional), then patches."""
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
    pixels = patch_grid(rows, columns) * torch.tensor([columns, rows, columns, rows]) * patch

    def per_axis(pair: tuple[float, float]) -> Tensor:
        return torch.tensor([*pair, *pair], dtype=torch.float64)

    scale = per_axis((canvas[0] / resized[0], canvas[1] / resized[1]))
    rects = ((pixels + per_axis(offset)) * scale - per_axis(origin)) / per_axis(size)
    # a class token that the projector receives comes first and has no place
    extra = processor.num_additional_image_tokens - (
        processor.vision_feature_select_strategy == "default"
    )
    return torch.cat([rects.new_full((max(extra, 0), 4), -1.0), rects])


def _resized(size: Mapping[str, int], image: tuple[int, int]) -> tuple[int, int]:
    """(width, height) after the resize that `size` asks for."""
    short = size.get("shortest_edge")
    if short is None:
        return size["width"], size["height"]
    width, height = image
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
