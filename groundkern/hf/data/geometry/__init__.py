"""Where on the original image each visual token is, one table per processor family.

A table row is `(image, x0, y0, x1, y1)`: the image's index within its sample and a rectangle in
fractions of the original image. It is derived from the processor's own settings, so that a centre
crop, a padded square, tiles (`tiling`) or another resolution need no care by the caller. A part of
an image may have several tokens: one in a tile, one in the global view. A rectangle leaves [0, 1]
if the processor pads, and is (-1, -1, -1, -1) for a visual token without a place (a class token, a
newline).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from groundkern.checks import fail, require
from groundkern.hf.data.geometry import (
    canvases,
    crops,
    grids,
    resized,
    slices,
    tiling,
    windows,
)
from groundkern.hf.data.geometry.views import Rule, Views, of_each

if TYPE_CHECKING:
    from PIL import Image


class Family(NamedTuple):
    """A family whose geometry is known.

    Args:
        rule: finds the places.
        since: the transformers that it needs.
    """

    rule: Rule
    since: str


FAMILIES = {
    "aya_vision": Family(of_each(tiling.aya_vision), "5.20"),
    "chameleon": Family(of_each(crops.chameleon), "5.23"),
    "cohere2_vision": Family(of_each(canvases.cohere2_vision), "5.20"),
    "cohere_compass": Family(grids.stretched, "5.20"),
    "cosmos3_edge": Family(grids.stretched, "5.1"),
    "cosmos3_omni": Family(grids.stretched, "5.1"),
    "deepseek_vl": Family(of_each(crops.padded_square), "5.1"),
    "deepseek_vl_hybrid": Family(of_each(crops.padded_square), "5.1"),
    "dots3_note": Family(grids.stretched, "5.1"),
    "emu3": Family(grids.emu3, "5.20"),
    "ernie4_5_vl_moe": Family(grids.stretched, "5.1"),
    "exaone4_5": Family(grids.stretched, "5.1"),
    "fast_vlm": Family(of_each(crops.convolved), "5.20"),
    "fuyu": Family(of_each(crops.raw_patches), "5.21"),
    "gemma3": Family(of_each(tiling.pan_and_scan), "5.20"),
    "gemma3n": Family(of_each(resized.square), "5.23"),
    "gemma4": Family(resized.gemma4, "5.20"),
    "gemma4_unified": Family(resized.gemma4_unified, "5.20"),
    "glm46v": Family(grids.stretched, "5.1"),
    "glm4v": Family(grids.stretched, "5.1"),
    "glm4v_moe": Family(grids.stretched, "5.1"),
    "glm5_next": Family(grids.cornered(grids.glm5_next), "5.1"),
    "glm_ocr": Family(grids.stretched, "5.1"),
    "glmga": Family(grids.stretched, "5.1"),
    "got_ocr2": Family(canvases.got_ocr2, "5.23"),
    "granite4_vision": Family(tiling.padded, "5.20"),
    "granite_docling": Family(of_each(canvases.granite_docling), "5.20"),
    "hunyuan_vl": Family(grids.hunyuan_vl, "5.1"),
    "hyperclovax_vision_v2": Family(grids.stretched, "5.1"),
    "idefics3": Family(of_each(tiling.split_tiles), "5.20"),
    "inkling2": Family(of_each(resized.inkling2), "5.20"),
    "inkling_mm_model": Family(of_each(resized.inkling), "5.20"),
    "internvl": Family(of_each(tiling.internvl), "5.20"),
    "janus": Family(of_each(crops.padded_square), "5.20"),
    "kimi_k25": Family(grids.cornered(grids.kimi_k25), "5.1"),
    "lfm2_vl": Family(of_each(slices.lfm2_vl), "5.20"),
    "lfm3_vl": Family(grids.stretched, "5.20"),
    "lighton_ocr": Family(resized.rows, "5.1"),
    "llama4": Family(of_each(canvases.llama4), "5.20"),
    "llava": Family(resized.llava, "5.1"),
    "llava_next": Family(tiling.padded, "5.1"),
    "llava_next_video": Family(tiling.padded, "5.1"),
    "llava_onevision": Family(tiling.padded, "5.1"),
    "minicpm_ocr": Family(slices.whole_and_slices, "5.20"),
    "minicpmv4_6": Family(slices.whole_and_slices, "5.20"),
    "minicpmv4_7": Family(slices.whole_and_slices, "5.20"),
    "minimax_m3_vl": Family(grids.stretched, "5.20"),
    "mistral3": Family(resized.rows, "5.20"),
    "mistral_large4": Family(resized.rows, "5.20"),
    "molmo2": Family(of_each(windows.molmo2), "5.20"),
    "muse_glimmer": Family(grids.stretched, "5.20"),
    "muse_spark": Family(grids.stretched, "5.20"),
    "nemotron_h_omni": Family(grids.nemotron_h_omni, "5.20"),
    "ovis2": Family(of_each(canvases.ovis2), "5.20"),
    "paddleocr_vl": Family(grids.stretched, "5.1"),
    "paligemma": Family(of_each(resized.square), "5.20"),
    "perception_lm": Family(of_each(canvases.perception_lm), "5.1"),
    "qianfan_ocr": Family(of_each(tiling.internvl), "5.20"),
    "qwen2_5_omni_thinker": Family(grids.stretched, "5.1"),
    "qwen2_5_vl": Family(grids.stretched, "5.1"),
    "qwen2_vl": Family(grids.stretched, "5.1"),
    "qwen3_5": Family(grids.stretched, "5.1"),
    "qwen3_5_moe": Family(grids.stretched, "5.1"),
    "qwen3_omni_moe_thinker": Family(grids.stretched, "5.1"),
    "qwen3_vl": Family(grids.stretched, "5.1"),
    "qwen3_vl_moe": Family(grids.stretched, "5.1"),
    "qwen4_exp": Family(grids.stretched, "5.1"),
    "shieldgemma2": Family(of_each(tiling.pan_and_scan), "5.20"),
    "smolvlm": Family(of_each(tiling.split_tiles), "5.21"),
    "step3p7": Family(of_each(windows.step3p7), "5.20"),
    "unlimited_ocr": Family(of_each(canvases.unlimited_ocr), "5.20"),
    "video_llama_3": Family(grids.stretched, "5.1"),
    "video_llava": Family(of_each(crops.cropped), "5.20"),
    "vipllava": Family(of_each(crops.cropped), "5.1"),
}
"""Values of `config.model_type` whose image geometry is known.

If an image becomes more than its visual tokens (markers, rows of tiles), the processor must report
what it became: `text_replacement_offsets`.
"""
_RESAMPLER = "its resampler mixes the whole image into every visual token"
_CROSS_ATTENTION = "its text sees the image by cross-attention, not as tokens"
_ENCODER = "it is an encoder and a decoder, and its image is in the encoder"
NO_PLACE = {
    **dict.fromkeys(("aria", "idefics2"), _RESAMPLER),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _RESAMPLER),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), _RESAMPLER),
    **dict.fromkeys(("blip", "idefics", "mllama"), _CROSS_ATTENTION),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "udop"), _ENCODER),
    "vision-encoder-decoder": _ENCODER,
    "t5gemma2": _ENCODER,
    "deepseek_ocr2": "learned queries read its whole view, as a resampler",
    "diffusion_gemma": "its answers are not predicted token by token, but denoised in blocks",
    "mistral4": "it is a text model",
    "pi0": "its answers are a robot's actions",
    "pp_chart2table": "its chat template writes every visual token, so no placeholder says where",
    "git": "its image is put before the text inside the model, without tokens of the sequence",
    "evolla": "it reads proteins, not images",
}
"""Values of `config.model_type` whose images cannot be supervised in principle, and why."""
Geometry = Callable[[Sequence[Sequence["Image.Image"]], Mapping[str, Any]], list[Tensor]]
"""`image_geometry` of one processor and config: (images, batch) -> fp64 [C, 5] of each sample."""
TRANSFORMERS = Version(transformers.__version__)


def check_family(kind: str) -> None:
    """Refuse a family whose image geometry is not known with this transformers.

    Args:
        kind: the `config.model_type`.

    Raises:
        ValueError: a family whose images cannot be supervised (NO_PLACE says why), an unknown one,
            or one whose processor reports enough only in a later transformers.
    """
    if kind in NO_PLACE:
        wanted = "a family whose answers see visual tokens with a place in the image"
        fail("config.model_type", wanted, f"{kind!r}: {NO_PLACE[kind]}")
    if kind not in FAMILIES:
        wanted = "a family whose image geometry is known (docs/models/families.md)"
        fail("config.model_type", wanted, f"{kind!r}, which `MeasuredGeometry` may measure")
    since = FAMILIES[kind].since
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
    views = Views(processor, config, images, batch)
    tables = FAMILIES[config.model_type].rule(views)
    wanted = sum(map(len, images))
    require(len(tables) == wanted, "batch", f"visual tokens of {wanted} images", f"{len(tables)}")
    each = iter(tables)
    return [_numbered([next(each) for _ in sample]) for sample in images]


def _numbered(tables: list[Tensor]) -> Tensor:
    """Put each rectangle's image index in front: [n, 5]."""
    numbered = [torch.zeros(0, 5, dtype=torch.float64)]
    for image, rects in enumerate(tables):
        numbered.append(torch.cat([rects.new_full((rects.shape[0], 1), image), rects], 1))
    return torch.cat(numbered)
