"""Tiny random models of the families that follow LLaVA and LLaVA-NeXT.

One image becomes a cropped or padded square, or a base view and tiles without their padding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import LlavaNextVideoProcessor, LlavaProcessor, VideoLlavaProcessor

from benchmarks.families.zoo.lookups import pil_images, processor_class, torchvision_images
from benchmarks.families.zoo.making import (
    LLAVA_TEMPLATE,
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    imported,
    tiny_tokenizer,
    tokenizer_with,
    tower,
)
from benchmarks.families.zoo.tiles import CLIP, PINNED, PINPOINTS, llava_next_model
from groundkern.hf.data.processor import without_video

CROP = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
_video_tokenizer = tokenizer_with(video_token="<video>", image_token="<image>")


def _llava_settings(template: str) -> dict[str, Any]:
    """Of processors on a CLIP tower, whose class token the projector does not receive."""
    return {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": template,
    }


# The last layers but one of CLIP, side by side.
vipllava_model = Model(
    "VipLlavaConfig",
    tiny_tokenizer,
    "<image>",
    {"model_type": "llama"},
    CLIP,
    {"vision_feature_layers": [-2, -1], "vision_feature_layer": [-2, -1]},
)


def vipllava_processor(*, padding_side: str = "right"):
    """Short edge to 56 px, centre crop to 56 x 56."""
    return LlavaProcessor(
        pil_images("llava", "Llava", **CROP),
        tiny_tokenizer(padding_side=padding_side),
        **_llava_settings(LLAVA_TEMPLATE),
    )


video_llava_model = Model(
    "VideoLlavaConfig",
    _video_tokenizer,
    "<image>",
    {"model_type": "llama"},
    CLIP,
    {"video_token_id": "<video>"},
)


def video_llava_processor(*, padding_side: str = "right"):
    """As VipLLaVA's, with the family's own image processor, which works on arrays."""
    return without_video(VideoLlavaProcessor)(
        pil_images("video_llava", "VideoLlava", **CROP),
        tokenizer=_video_tokenizer(padding_side),
        **_llava_settings(LLAVA_TEMPLATE),
    )


llava_next_video_model = replace(
    llava_next_model,
    config="LlavaNextVideoConfig",
    tokenizer=_video_tokenizer,
    more=PINNED | {"video_token_id": "<video>"},
)


def _pinned_images(**images):
    return pil_images("llava_next", "LlavaNext", **CROP, image_grid_pinpoints=PINPOINTS, **images)


def llava_next_video_processor(*, padding_side: str = "right", **images):
    """LLaVA-NeXT's images: tiles of 56 px."""
    return without_video(LlavaNextVideoProcessor)(
        image_processor=_pinned_images(**images),
        tokenizer=_video_tokenizer(padding_side),
        **_llava_settings(TILE_TEMPLATE),
    )


# Windows of 4 x 4 patches become 2 x 2 queries; features enter five decoder layers, the first
# of them as the input. No class token.
granite4_vision_model = Model(
    "Granite4VisionConfig",
    tiny_tokenizer,
    "<image>",
    {"model_type": "granite4_vision_text", "num_hidden_layers": 5, "attention_multiplier": 0.25},
    tower("siglip_vision_model", hidden_size=64, num_attention_heads=1),
    PINNED
    | {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-2, 0]],
        "spatial_target_layers": [1, 2, 3, 4],
        "vision_feature_select_strategy": "full",
        "projector_dropout": 0.0,
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
            "use_qformer_text_input": False,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    },
)


def granite4_vision_processor(*, padding_side: str = "right", **images):
    """As LLaVA-NeXT, with a quarter of the tokens."""
    return processor_class("granite4_vision", "Granite4Vision")(
        _pinned_images(**images),
        tiny_tokenizer(padding_side=padding_side),
        **_llava_settings(TILE_TEMPLATE)
        | {
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "downsample_rate": "2/4",
        },
    )


def _timm(build: Model):
    """Makes the model if timm is installed, whose towers the family uses."""

    def model(**settings):
        imported("timm", f"{build.config}'s vision tower needs timm")
        return build(**settings)

    return model


# A convolutional tower of 64 px to a token.
fast_vlm_model = _timm(
    Model(
        "FastVlmConfig",
        tiny_tokenizer,
        "<image>",
        {"model_type": "qwen2"},
        {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 128,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [4, 8, 16, 32, 64],
            },
        },
    )
)


def fast_vlm_processor(*, padding_side: str = "right", **images):
    """A padded square of 256 px."""
    side = 256
    settings = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_pad": True,
    }
    return LlavaProcessor(
        pil_images("llava", "Llava", **settings | images),
        tiny_tokenizer(padding_side=padding_side),
        patch_size=64,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=LLAVA_TEMPLATE,
    )


# The tower's tokens are averaged two by two.
perception_lm_model = _timm(
    Model(
        "PerceptionLMConfig",
        _video_tokenizer,
        "<image>",
        {"model_type": "llama"},
        {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
                "img_size": [TILE, TILE],
                "global_pool": "",
                "use_post_transformer_norm": False,
                "ref_feat_shape": [4, 4],
            },
        },
        {"projector_pooling_ratio": 2, "video_token_id": "<video>"},
    )
)


def perception_lm_processor(*, padding_side: str = "right", **images):
    """A thumbnail, then up to 6 tiles of 56 px."""
    settings = {"tile_size": TILE, "max_num_tiles": 6, **images}
    return processor_class("perception_lm", "PerceptionLM")(
        image_processor=torchvision_images("perception_lm", "PerceptionLM", **settings),
        tokenizer=_video_tokenizer(padding_side),
        patch_size=14,
        pooling_ratio=2,
        chat_template=TILE_TEMPLATE,
    )


FAMILIES = {
    "fast_vlm": Family(fast_vlm_model, fast_vlm_processor),
    "granite4_vision": Family(granite4_vision_model, granite4_vision_processor),
    "llava_next_video": Family(llava_next_video_model, llava_next_video_processor),
    "perception_lm": Family(perception_lm_model, perception_lm_processor),
    "video_llava": Family(video_llava_model, video_llava_processor),
    "vipllava": Family(vipllava_model, vipllava_processor),
}
