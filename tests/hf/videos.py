"""Families whose videos are known: tiny models, processors with a video part, and drawn videos.

Where torchvision is installed (`make families-test`) the video parts are the families' own;
elsewhere Qwen's is the demo's, and LLaVA's puts each frame through the family's image processor.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

import pytest
import torch
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.video_utils import make_batched_metadata, make_batched_videos

from benchmarks.families.zoo import llavas, qwens, tiles
from benchmarks.families.zoo.lookups import pil_images
from benchmarks.families.zoo.making import TILE
from groundkern.hf import GroundedExample, Video
from groundkern.hf.data.geometry.videos import check_videos
from groundkern.trainer.demo.videos import PilVideoProcessor, with_pil_videos
from tests.hf.families import FAMILIES as FIRST

OWN = find_spec("torchvision") is not None
ALL = FIRST | tiles.FAMILIES | qwens.FAMILIES | llavas.FAMILIES
CELLS = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}
_CROP = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
_SQUARE = {"size": {"height": TILE, "width": TILE}}
_QWENS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
NAMES = (*_QWENS, "llava_onevision", "llava_next_video")


class _EachFrame(PilVideoProcessor):
    """Frames through an image processor, one after the other: [videos, frames, 3, H, W]."""

    model_input_names: ClassVar = ["pixel_values_videos"]

    def __init__(self, images: Any, **settings: Any) -> None:
        super().__init__()
        self._images = images
        vars(self).update(do_resize=True, do_center_crop="crop_size" in settings, **settings)

    def __call__(self, videos, *, video_metadata=None, return_tensors=None, **_) -> BatchFeature:
        videos = make_batched_videos(videos)
        make_batched_metadata(videos, video_metadata)
        frames = [self._images(list(v), return_tensors="pt")["pixel_values"] for v in videos]
        return BatchFeature({"pixel_values_videos": torch.stack(frames)})


def model(name: str, **settings: Any) -> Any:
    """A family's tiny model, which knows the video token."""
    made = ALL[name].model(**settings)
    token = "<video>" if name == "llava_next_video" else "<|video_pad|>"
    tokenizer = processor(name).tokenizer
    made.config.video_token_id = tokenizer.convert_tokens_to_ids(token)
    return made


def _served(name: str) -> None:
    """Skip the test if this transformers is too old for a family's videos."""
    try:
        check_videos(name, [Video((), ())])
    except ValueError as error:
        pytest.skip(str(error))


def processor(name: str, *, own: bool = OWN, **options: Any) -> Any:
    """A family's processor with a video part; `own`: the family's own, on torchvision."""
    _served(name)
    plain = ALL[name].processor(**options)
    if name in _QWENS:
        return _qwen(name, plain, own=own)
    return _llava(name, plain, own=own)


def _qwen(name: str, plain: Any, *, own: bool) -> Any:
    kind, video = (getattr(transformers, each, None) for each in _QWENS[name])
    cell = CELLS[name]
    patch = {"patch_size": cell // 2, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": cell * cell, "longest_edge": 36 * cell * cell}
    if own:
        part = video(size=pixels, **patch)
    else:
        kind = with_pil_videos(kind)
        part = PilVideoProcessor(min_pixels=cell * cell, max_pixels=36 * cell * cell, **patch)
    old, new = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|>")
    template = _with_videos(plain.chat_template, old, f"{new}<|vision_end|>")
    return kind(plain.image_processor, plain.tokenizer, part, chat_template=template)


def _llava(name: str, plain: Any, *, own: bool) -> Any:
    onevision = name == "llava_onevision"
    kind = "LlavaOnevision" if onevision else "LlavaNextVideo"
    settings = _SQUARE if onevision else _CROP
    if own:
        suffix = "VideoProcessor" if onevision else "VideoVideoProcessor"
        part = getattr(transformers, kind.removesuffix("Video") + suffix)(**settings)
        made = getattr(transformers, f"{kind}Processor")
    else:
        resized = {"do_center_crop": False, "do_pad": False} if onevision else {}
        part = _EachFrame(pil_images("llava", "Llava", **settings, **resized), **settings)
        made = with_pil_videos(getattr(transformers, f"{kind}Processor"))
    token = "<|video_pad|>" if onevision else "<video>"
    names = ("num_image_tokens", "patch_size", "vision_feature_select_strategy")
    names += ("vision_aspect_ratio", "num_additional_image_tokens")
    kept = {each: getattr(plain, each) for each in names if hasattr(plain, each)}
    return made(
        image_processor=plain.image_processor,
        tokenizer=plain.tokenizer,
        video_processor=part,
        chat_template=_with_videos(plain.chat_template, "<image>", token),
        video_token=token,
        **kept,
    )


def _with_videos(template: str, image: str, video: str) -> str:
    old = f"part['type'] == 'image' %}}{image}"
    assert old in template
    return template.replace(old, f"{old}{{% elif part['type'] == 'video' %}}{video}")


def noise(frames: int, size: tuple[int, int], *, step: float = 0.5, start: float = 0.0) -> Video:
    """Frames of noise that differ, `step` seconds apart."""
    width, height = size
    generator = torch.Generator().manual_seed(frames * width + height)
    values = torch.randint(0, 256, (frames, height, width, 3), generator=generator)
    images = tuple(Image.fromarray(frame.to(torch.uint8).numpy()) for frame in values)
    return Video(images, tuple(start + step * i for i in range(frames)))


def asked(
    images: tuple = (), videos: tuple = (), regions: tuple = (), answer: str = "the red patch"
) -> GroundedExample:
    """A question about images and videos, and its answer."""
    parts = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "Where is it?"}]}
    messages = [question, {"role": "assistant", "content": answer}]
    return GroundedExample(images, messages, regions=regions, videos=videos)
