"""The models of the study: the demo's Qwen2.5-VL in several sizes, for pictures of half the side.

A visual token is 14 px here (patches of 7, merged 2 x 2) and one frame, so that a drawing of 70 px
has as many visual tokens as the demo's of 140 px and an eighth of the numbers, and a second of a
clip is a step in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from groundkern.hf.data.processor import pil_image_processor
from groundkern.trainer.demo.model import build_model, build_tokenizer
from groundkern.trainer.demo.videos import PilVideoProcessor, with_pil_videos

PATCH, MERGE = 7, 2
TOKEN = PATCH * MERGE  # pixels of a visual token's side
TEMPLATE = (  # no more than an answer needs: tokens are what a step costs
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|im_start|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
_HEAD = 32  # of every head, as the demo's rotary sections want
SIZES = {  # text width, layers, feed-forward; vision width
    "quick": (64, 1, 64, 32),  # learns nothing
    "350k": (64, 3, 128, 32),
    "1m": (128, 4, 256, 64),
    "3m": (192, 6, 512, 96),
    "10m": (320, 8, 1024, 128),
}


def build_processor(corpus: Iterable[str]) -> Qwen2_5_VLProcessor:
    """A processor of 14 px to a visual token, with a tokenizer trained on the corpus."""
    settings = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 1,
        "min_pixels": TOKEN**2,
        "max_pixels": 1024 * TOKEN**2,
    }
    images = pil_image_processor("qwen2_vl", "Qwen2VL")(**settings)
    parts = (images, build_tokenizer(corpus), PilVideoProcessor(**settings))
    return with_pil_videos(Qwen2_5_VLProcessor)(*parts, chat_template=TEMPLATE)


def build(processor: Any, size: str, *, seed: int) -> nn.Module:
    """An untrained model of one of SIZES, whose patches are embedded by one matrix product."""
    hidden, layers, wide, vision = SIZES[size]
    base = build_model(processor.tokenizer).config.to_dict()
    base["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // _HEAD,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * layers,
    }
    base["vision_config"] |= {
        "hidden_size": vision,
        "intermediate_size": 2 * vision,
        "num_heads": vision // _HEAD,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "window_size": 8 * TOKEN,
        "tokens_per_second": 2,  # positions in time that a second of a clip takes
    }
    config = Qwen2_5_VLConfig.from_dict(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    embed_by_product(model)
    return model


def embed_by_product(model: nn.Module) -> None:
    """Embed patches by a matrix product: a convolution whose stride is its kernel is slower.

    Args:
        model: a Qwen2.5-VL; its weights and their names stay.
    """
    embed = model.model.visual.patch_embed

    def forward(pixels: Tensor) -> Tensor:  # [patches, C T P P] -> [patches, width]
        return F.linear(pixels, embed.proj.weight.flatten(1))

    embed.forward = forward
