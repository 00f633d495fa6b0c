"""Tiny random models with slices of an image, with hybrid decoders, and with padded cells.

Most of their image processors have no Pil variant, so that they need torchvision.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.families.zoo.making import (
    QWEN_TEMPLATE,
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    build_model,
    decoder_settings,
    tiny_tokenizer,
    tokenizer_with,
    tower,
)
from benchmarks.families.zoo.rows import gemma_tokenizer, known, with_torchvision
from groundkern.hf.data.processor import pil_image_processor, without_video

# Tiles of 2 x 2 tokens and a thumbnail; two convolutions and an attention layer.
_lfm2_tokenizer = tokenizer_with(
    image_token="<image>",
    image_start_token="<|image_start|>",
    image_end_token="<|image_end|>",
    image_thumbnail_token="<|img_thumbnail|>",
    **{f"tile_{r}_{c}": f"<|img_row_{r}_col_{c}|>" for r in (1, 2, 3) for c in (1, 2, 3)},
)
_NAFLEX = {k: v for k, v in tower("siglip2_vision_model").items() if k != "image_size"}
lfm2_vl_model = Model(
    "Lfm2VlConfig",
    _lfm2_tokenizer,
    "<image>",
    {"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention"]},
    {**_NAFLEX, "num_patches": 16},
    {"projector_hidden_size": 48},
)


def lfm2_vl_processor(*, padding_side: str = "right", **images):
    """Up to 4 tiles of 56 px."""
    settings = {
        "encoder_patch_size": 14,
        "tile_size": TILE,
        "max_tiles": 4,
        "min_image_tokens": 2,
        "max_image_tokens": 6,
        **images,
    }
    return known("Lfm2VlProcessor")(
        with_torchvision("Lfm2VlImageProcessor")(**settings),
        _lfm2_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE,
    )


# Qwen's grid over a tower with convolutions; a hybrid decoder with gated attention.
lfm3_vl_model = Model(
    "Lfm3VlConfig",
    tiny_tokenizer,
    "<|image_pad|>",
    {"model_type": "lfm3", "layer_types": ["conv", "sliding_attention", "full_attention"]},
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "patch_size": 14,
    },
    {
        "projector_hidden_size": 48,
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
)


def lfm3_vl_processor(*, padding_side: str = "right"):
    """28 px to a visual token."""
    images = pil_image_processor("qwen2_vl", "Qwen2VL")(min_pixels=28 * 28, max_pixels=64 * 28 * 28)
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    processor_class = without_video(known("Lfm3VlProcessor"))
    return processor_class(images, tokenizer, chat_template=QWEN_TEMPLATE)


# The whole image, then slices of a large one; Qwen3.5's decoder, with linear attention.
_minicpm_tokenizer = tokenizer_with(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    image_start_token="<image>",
    image_end_token="</image>",
    slice_start_token="<slice>",
    slice_end_token="</slice>",
    image_id_start_token="<image_id>",
    image_id_end_token="</image_id>",
)
MINICPM_TEMPLATE = TILE_TEMPLATE.replace("<image>", "<|image_pad|>")
QWEN35 = {
    "model_type": "qwen3_5_text",
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
    },
}
minicpmv4_6_model = Model(
    "MiniCPMV4_6Config",
    _minicpm_tokenizer,
    "<|image_pad|>",
    QWEN35,
    tower("minicpmv4_6_vision", num_hidden_layers=3, image_size=112),
    {"insert_layer_id": 1, "video_token_id": "<|video_pad|>"},
)
minicpmv4_7_model = replace(
    minicpmv4_6_model,
    config="MiniCPMV4_7Config",
    vision=tower("minicpmv4_7_vision", num_hidden_layers=3, image_size=112),
    more={
        "insert_layer_id": 1,
        "video_token_id": "<|video_pad|>",
        **{
            f"{name}_id": _minicpm_tokenizer().convert_tokens_to_ids(text)
            for name, text in {
                "image_start": "<image>",
                "image_end": "</image>",
                "slice_start": "<slice>",
                "slice_end": "</slice>",
                "newline": "\u010a",  # the line break of a byte-level BPE
            }.items()
        },
    },
)
minicpm_ocr_model = replace(
    minicpmv4_6_model,
    config="MiniCPMOcrConfig",
    vision=tower("minicpm_ocr_vision", num_hidden_layers=3, image_size=112),
)


def _minicpm_processor(name: str, images: Any, padding_side: str):
    """The constructor reads two settings of a video part, which the image part has too."""
    plain = without_video(known(name))
    processor_class = type(plain.__name__, (plain,), {"video_processor": images})
    return processor_class(
        image_processor=images,
        tokenizer=_minicpm_tokenizer(padding_side),
        chat_template=MINICPM_TEMPLATE,
    )


_SLICES = {"scale_resolution": 112, "max_slice_nums": 4}


def minicpmv4_6_processor(*, padding_side: str = "right", **images):
    """Up to 4 slices of 2 x 2 tokens, which cover 56 px each."""
    made = pil_image_processor("minicpmv4_6", "MiniCPMV4_6")(**_SLICES, **images)
    return _minicpm_processor("MiniCPMV4_6Processor", made, padding_side)


def minicpmv4_7_processor(*, padding_side: str = "right", **images):
    """As version 4.6."""
    made = pil_image_processor("minicpmv4_6", "MiniCPMV4_6")(**_SLICES, **images)
    return _minicpm_processor("MiniCPMV4_7Processor", made, padding_side)


def minicpm_ocr_processor(*, padding_side: str = "right", **images):
    """Tokens of 28 px."""
    made = with_torchvision("MiniCPMOcrImageProcessor")(**_SLICES, **images)
    return _minicpm_processor("MiniCPMOcrProcessor", made, padding_side)


# The image in its own resolution, cut into cells; relative positions, convolutions.
_inkling_tokenizer = tokenizer_with(
    image_token="<|unused_200054|>",
    audio_token="<|unused_200053|>",
    image_bos="<|content_image|>",
    audio_bos="<|content_audio_input|>",
)
INKLING_TEMPLATE = TILE_TEMPLATE.replace("<image>", "<|content_image|><|unused_200054|>")
_HYBRID = {
    "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    "sliding_window_size": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 4,
    "rel_extent": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
inkling_model = Model(
    "InklingConfig",
    _inkling_tokenizer,
    "<|unused_200054|>",
    {**_HYBRID, "n_shared_experts": 1, "logits_mup_width_multiplier": 1.0},
    {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 12},
    {
        "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16},
        "audio_token_id": "<|unused_200053|>",
        "image_bos_token_id": "<|content_image|>",
        "audio_bos_token_id": "<|content_audio_input|>",
    },
)
inkling2_model = replace(
    inkling_model,
    config="Inkling2Config",
    text={**_HYBRID, "unpadded_vocab_size": 500},
    vision={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 10,
        "posemb_grid_size": 8,
        "projection_hidden_dim": 48,
        "text_hidden_size": 64,
    },
    more={},
)


def inkling_processor(*, padding_side: str = "right", **images):
    """Cells of 12 px, the last of a row in part or whole of padding."""
    made = with_torchvision("InklingImageProcessor")(size={"height": 12, "width": 12}, **images)
    return known("InklingProcessor")(
        known("InklingFeatureExtractor")(),
        made,
        _inkling_tokenizer(padding_side),
        chat_template=INKLING_TEMPLATE,
    )


def inkling2_processor(*, padding_side: str = "right"):
    """Cells of 20 px."""
    made = with_torchvision("Inkling2ImageProcessor")(size={"height": 20, "width": 20})
    return known("Inkling2Processor")(
        made, _inkling_tokenizer(padding_side), chat_template=INKLING_TEMPLATE
    )


# Qwen-like grids; a scale and a softcap on the logits, layers without RoPE.
_muse_tokenizer = tokenizer_with(
    image_token="<|patch|>",
    image_start="<|image_start|>",
    image_end="<|image_end|>",
    video_token="<|video|>",
    audio_token="<|audio|>",
)
MUSE_TEMPLATE = TILE_TEMPLATE.replace("<image>", "<|patch|>")
_MUSE_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
}
muse_glimmer_model = Model(
    "MuseGlimmerConfig",
    _muse_tokenizer,
    "<|patch|>",
    {"sliding_window": 24},
    _MUSE_VISION,
    {"out_hidden_size": 128, "projector_hidden_size": 48, "video_token_id": "<|video|>"},
)
muse_spark_model = replace(
    muse_glimmer_model,
    config="MuseSparkConfig",
    text={
        "sliding_window": 24,
        "moe_hidden_size": 32,
        "moe_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    more={
        **muse_glimmer_model.more,
        "audio_token_id": "<|audio|>",
        "audio_config": {
            "patch_sizes": [4],
            "hidden_sizes": [16],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 64,
        },
    },
)


def _muse_images():
    return with_torchvision("MuseGlimmerImageProcessor")(max_image_tokens=64)


def muse_glimmer_processor(*, padding_side: str = "right"):
    """28 px to a visual token."""
    return without_video(known("MuseGlimmerProcessor"))(
        image_processor=_muse_images(),
        tokenizer=_muse_tokenizer(padding_side),
        chat_template=MUSE_TEMPLATE,
    )


def muse_spark_processor(*, padding_side: str = "right"):
    """As Muse Glimmer."""
    return without_video(known("MuseSparkProcessor"))(
        image_processor=_muse_images(),
        tokenizer=_muse_tokenizer(padding_side),
        feature_extractor=known("MuseSparkFeatureExtractor")(),
        chat_template=MUSE_TEMPLATE,
    )


def t5gemma2_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """An encoder that sees the images, and a decoder."""
    tokenizer = gemma_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    settings = decoder_settings(tokenizer, head_dim=16, query_pre_attn_scalar=16, **text)
    ids = {
        "image_token_index": token("<image_soft_token>"),
        "boi_token_index": token("<start_of_image>"),
        "eoi_token_index": token("<end_of_image>"),
    }
    encoder = {
        "text_config": settings,
        "vision_config": tower("siglip_vision_model", image_size=112),
        "mm_tokens_per_image": 16,
        **ids,
    }
    config = known("T5Gemma2Config")(
        encoder=encoder, decoder=settings, image_token_index=token("<image_soft_token>")
    )
    model_class = known("T5Gemma2ForConditionalGeneration")
    return build_model(model_class, config, seed, attention)


def pi0_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """PaliGemma beside a small decoder of a robot's actions."""
    settings = decoder_settings(tiny_tokenizer(), head_dim=16, model_type="gemma", **text)
    vlm = {
        "text_config": settings,
        "vision_config": tower("siglip_vision_model"),
        "image_token_index": tiny_tokenizer().convert_tokens_to_ids("<image>"),
        "projection_dim": 64,
        "hidden_size": 64,
        "model_type": "paligemma",
    }
    config = known("PI0Config")(vlm_config=vlm, dit_config=settings)
    return build_model(known("PI0ForConditionalGeneration"), config, seed, attention)


FAMILIES = {
    "pi0": Family(pi0_model, None),  # writes actions of a robot and no text
    "t5gemma2": Family(t5gemma2_model, None),  # images and answers are in sequences of their own
    "inkling2": Family(partial(inkling2_model, attention="eager"), inkling2_processor),
    "inkling_mm_model": Family(inkling_model, inkling_processor),
    "lfm2_vl": Family(lfm2_vl_model, lfm2_vl_processor),
    "lfm3_vl": Family(lfm3_vl_model, lfm3_vl_processor),
    "minicpm_ocr": Family(minicpm_ocr_model, minicpm_ocr_processor),
    "minicpmv4_6": Family(minicpmv4_6_model, minicpmv4_6_processor),
    "minicpmv4_7": Family(minicpmv4_7_model, minicpmv4_7_processor),
    "muse_glimmer": Family(muse_glimmer_model, muse_glimmer_processor),
    "muse_spark": Family(muse_spark_model, muse_spark_processor),
}
