"""Tiny random models of the tiled and squashed families, each with a real (Pil) image processor.

The text decoders (Llama, Qwen2, Qwen3, Gemma3, Cohere2)
have 3 layers; images become 4 to 100 visual tokens.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import (
    AyaVisionProcessor,
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    Qwen3VLProcessor,
)

from benchmarks.families.zoo.making import (
    QWEN_TEMPLATE,
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    imported,
    tiny_tokenizer,
    tokenizer_with,
    tower,
)
from groundkern.hf.data.processor import pil_image_processor, without_video

PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 24,
}


# Deepstack into the first two layers, interleaved mrope.
qwen3_vl_model = Model(
    "Qwen3VLConfig",
    tiny_tokenizer,
    "<|image_pad|>",
    {
        "model_type": "qwen3_vl_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
        },
    },
    {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
    {
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
)


def qwen3_vl_processor(*, padding_side: str = "right"):
    """32 px to a visual token."""
    images = pil_image_processor("qwen2_vl", "Qwen2VL")(
        patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=36 * 32 * 32
    )
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    return without_video(Qwen3VLProcessor)(images, tokenizer, chat_template=QWEN_TEMPLATE)


_gemma_tokenizer = tokenizer_with(
    boi_token="<start_of_image>",
    image_token="<image_soft_token>",
    eoi_token="<end_of_image>",
)


# Two sliding layers and a full one, image tokens that see one another, 4 x 4 tokens.
gemma3_model = Model(
    "Gemma3Config",
    _gemma_tokenizer,
    "<image_soft_token>",
    {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, **SLIDING},
    tower("siglip_vision_model", image_size=112),
    {"mm_tokens_per_image": 16},
)


def gemma3_processor(*, padding_side: str = "right", **images):
    """Every image squashed to 112 x 112."""
    return Gemma3Processor(
        pil_image_processor("gemma3", "Gemma3")(size={"height": 112, "width": 112}, **images),
        _gemma_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<start_of_image>"),
        image_seq_length=16,
    )


_idefics_tokenizer = tokenizer_with(
    image_token="<image>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    end_of_utterance_token="<end_of_utterance>",
    **{f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)},
)


# 2 x 2 tokens to a tile.
idefics3_model = Model(
    "Idefics3Config",
    _idefics_tokenizer,
    "<image>",
    {"model_type": "llama"},
    tower("idefics3_vision"),
    {"scale_factor": 2},
)
smolvlm_model = replace(idefics3_model, config="SmolVLMConfig", vision=tower("smolvlm_vision"))


def _idefics_processor(processor_class, image_class, padding_side: str, images: dict):
    settings = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    return processor_class(
        image_class(**{**settings, **images}),
        _idefics_tokenizer(padding_side),
        image_seq_len=4,
        chat_template=TILE_TEMPLATE,
    )


def idefics3_processor(*, padding_side: str = "right", **images):
    """Longest edge to 112 px, tiles of 56 px and a global view."""
    image_class = pil_image_processor("idefics3", "Idefics3")
    return _idefics_processor(Idefics3Processor, image_class, padding_side, images)


def smolvlm_processor(*, padding_side: str = "right", **images):
    """As Idefics3."""
    imported("num2words", "transformers' SmolVLM processor needs num2words")
    smolvlm = imported(
        "transformers.models.smolvlm.processing_smolvlm",
        "this transformers' SmolVLM processor needs torchvision",
    )
    processor_class = without_video(smolvlm.SmolVLMProcessor)
    image_class = pil_image_processor("smolvlm", "SmolVLM")
    return _idefics_processor(processor_class, image_class, padding_side, images)


_internvl_tokenizer = tokenizer_with(
    start_image_token="<img>",
    end_image_token="</img>",
    context_image_token="<IMG_CONTEXT>",
    video_token="<video>",
)


def _got_ocr_images(**settings):
    """Up to 6 tiles of 56 px and a global view."""
    size = {"height": TILE, "width": TILE}
    return pil_image_processor("got_ocr2", "GotOcr2")(size=size, max_patches=6, **settings)


# 2 x 2 tokens to a tile.
internvl_model = Model(
    "InternVLConfig",
    _internvl_tokenizer,
    "<IMG_CONTEXT>",
    {"model_type": "qwen2"},
    tower("internvl_vision", image_size=[TILE, TILE], patch_size=[14, 14]),
    {"image_seq_length": 4, "downsample_ratio": 0.5},
)


def internvl_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 56 px and a thumbnail."""
    return without_video(InternVLProcessor)(
        _got_ocr_images(**images),
        _internvl_tokenizer(padding_side),
        image_seq_length=4,
        chat_template=TILE_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"),
    )


_AYA_TOKENS = ("start_of_img", "end_of_img", "img_patch", "img_line_break")
_aya_tokenizer = tokenizer_with(**{f"{x}_token": f"<|{x.upper()}|>" for x in _AYA_TOKENS})


# A Cohere2 decoder: parallel blocks, LayerNorm, sliding layers; 2 x 2 tokens to a tile.
aya_vision_model = Model(
    "AyaVisionConfig",
    _aya_tokenizer,
    "<|IMG_PATCH|>",
    {"model_type": "cohere2", "logit_scale": 0.25, **SLIDING},
    tower("siglip_vision_model"),
    {"downsample_factor": 2},
)


def aya_vision_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 56 px and a global view."""
    return AyaVisionProcessor(
        _got_ocr_images(**images),
        _aya_tokenizer(padding_side),
        patch_size=14,
        img_size=TILE,
        downsample_factor=2,
        chat_template=TILE_TEMPLATE,
    )


# A base view of 4 x 4 tokens, then tiles without their padding, with newline tokens.
CLIP = tower("clip_vision_model", num_hidden_layers=3, projection_dim=32)
PINNED = {"image_grid_pinpoints": PINPOINTS}
llava_next_model = Model(
    "LlavaNextConfig", tiny_tokenizer, "<image>", {"model_type": "llama"}, CLIP, PINNED
)


def llava_next_processor(*, padding_side: str = "right", **images):
    """Tiles of 56 px."""
    settings = {
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
        "image_grid_pinpoints": PINPOINTS,
    }
    return LlavaNextProcessor(
        pil_image_processor("llava_next", "LlavaNext")(**{**settings, **images}),
        tiny_tokenizer(padding_side=padding_side),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TILE_TEMPLATE,
    )


# As LLaVA-NeXT, on SigLIP.
llava_onevision_model = replace(
    llava_next_model,
    config="LlavaOnevisionConfig",
    text={"model_type": "qwen2"},
    vision=tower("siglip_vision_model"),
    more=PINNED | {"vision_aspect_ratio": "anyres_max_9"},
)


def llava_onevision_processor(*, padding_side: str = "right", **images):
    """Tiles of 56 px."""
    settings = {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": PINPOINTS}
    return without_video(LlavaOnevisionProcessor)(
        pil_image_processor("llava_onevision", "LlavaOnevision")(**{**settings, **images}),
        tiny_tokenizer(padding_side=padding_side),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=TILE_TEMPLATE,
    )


FAMILIES = {
    "qwen3_vl": Family(qwen3_vl_model, qwen3_vl_processor),
    "llava_next": Family(llava_next_model, llava_next_processor),
    "llava_onevision": Family(llava_onevision_model, llava_onevision_processor),
    "gemma3": Family(gemma3_model, gemma3_processor),
    "idefics3": Family(idefics3_model, idefics3_processor),
    "smolvlm": Family(smolvlm_model, smolvlm_processor),
    "internvl": Family(internvl_model, internvl_processor),
    "aya_vision": Family(aya_vision_model, aya_vision_processor),
}
