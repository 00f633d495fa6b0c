"""Tiny random models of families for pages of text and for images of any size.

They see an image through windows, overlapping crops, a grid with separators, or learned queries.
"""

from __future__ import annotations

import transformers

from benchmarks.families.zoo.lookups import pil_images, processor_class, torchvision_images
from benchmarks.families.zoo.making import TILE_TEMPLATE, Family, Model, tokenizer_with, tower
from benchmarks.families.zoo.more_tiles import SAM
from benchmarks.families.zoo.tiles import SLIDING

_image_tokenizer = tokenizer_with(image_token="<image>")

_STEP = ("im_patch", "im_start", "im_end", "patch_start", "patch_end", "patch_newline")
_step_tokenizer = tokenizer_with(**{f"{name}_token": f"<{name}>" for name in _STEP})

# Two convolutions of stride 2 behind the tower: 28 px to a token. Gated attention.
step3p7_model = Model(
    "Step3p7Config",
    _step_tokenizer,
    "<im_patch>",
    {
        **SLIDING,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
    },
    {
        "hidden_size": 32,
        "mlp_ratio": 1.5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 7,
    },
)


def step3p7_processor(*, padding_side: str = "right", **images):
    """Windows of up to 84 px, then the whole image in 112 px."""
    settings = {
        "size": {"height": 112, "width": 112},
        "patch_size": 84,
        "vision_patch_size": 7,
        **images,
    }
    return processor_class("step3p7", "Step3p7")(
        torchvision_images("step3p7", "Step3p7", **settings),
        _step_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<im_patch>"),
    )


_MOLMO = ("im_patch", "im_col", "im_start", "im_end", "low_res_im_start", "im_low")
_molmo_tokenizer = tokenizer_with(
    image_token="<|image|>",
    video_token="<|video|>",
    frame_start="<frame_start>",
    frame_end="<frame_end>",
    **{f"{name}_mark": f"<{name}>" for name in _MOLMO},
)

# A token attends to the 2 x 2 patches that it is pooled from.
molmo2_model = Model(
    "Molmo2Config",
    _molmo_tokenizer,
    "<im_patch>",
    {"model_type": "molmo2_text", "additional_vocab_size": 0},
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "image_size": [70, 70],
        "patch_size": 14,
    },
    {
        "adapter_config": {
            "vision_feature_layer": [-1, -2],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": 64,
        },
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    },
)


def molmo2_processor(*, padding_side: str = "right", **images):
    """Crops of 5 x 5 patches, of which neighbours share 2."""
    settings = {
        "size": {"height": 70, "width": 70},
        "patch_size": 14,
        "max_crops": 6,
        "overlap_margins": [1, 1],
        **images,
    }
    return processor_class("molmo2", "Molmo2")(
        torchvision_images("molmo2", "Molmo2", **settings),
        tokenizer=_molmo_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<|image|>"),
    )


_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 4,
}

# A SAM tower whose patches 144 learned queries read: those of 768 px, whatever the size.
deepseek_ocr2_model = Model(
    "DeepseekOcr2Config",
    _image_tokenizer,
    "<image>",
    {"model_type": "deepseek_ocr2_text", **_MOE},
    {
        "sam_config": {
            **SAM,
            "image_size": 192,
            "global_attn_indexes": [],
            "downsample_channels": [16, 32],
        },
        "encoder_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    },
)


def deepseek_ocr2_processor(*, padding_side: str = "right", **images):
    """Up to 3 tiles and the whole image, of 192 px each."""
    settings = {
        "size": {"height": 192, "width": 192},
        "tile_size": 192,
        "max_patches": 3,
        **images,
    }
    processor = processor_class("deepseek_ocr2", "DeepseekOcr2")(
        pil_images("deepseek_ocr2", "DeepseekOcr2", **settings),
        _image_tokenizer(padding_side),
        patch_size=4,
        chat_template=TILE_TEMPLATE,
    )
    processor.images_kwargs = {**processor.images_kwargs, "max_patches": 3}
    return processor


# A SAM tower under a CLIP tower; newlines behind every row, a separator behind an image.
unlimited_ocr_model = Model(
    "UnlimitedOcrConfig",
    _image_tokenizer,
    "<image>",
    {"model_type": "unlimited_ocr_text", **_MOE},
    {
        "sam_config": {**SAM, "downsample_channels": [16, 32]},
        "encoder_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    },
)


def unlimited_ocr_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 48 px, and the whole image in a padded square of 64 px."""
    settings = {
        "size": {"height": 64, "width": 64},
        "tile_size": 48,
        "max_patches": 6,
        "maximum_pad_value": 48,
        **images,
    }
    return processor_class("unlimited_ocr", "UnlimitedOcr")(
        torchvision_images("unlimited_ocr", "UnlimitedOcr", **settings),
        _image_tokenizer(padding_side),
        patch_size=4,
        chat_template=TILE_TEMPLATE,
    )


_nemotron_tokenizer = tokenizer_with(
    image_token="<image>",
    video_token="<video>",
    audio_token="<so_embedding>",
    image_start_token="<img>",
    image_end_token="</img>",
)

# A Mamba-2, an attention and an MLP layer.
nemotron_h_omni_model = Model(
    "NemotronH_Omni_Reasoning_V3_Config",
    _nemotron_tokenizer,
    "<image>",
    {
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
    {**tower("radio", patch_size=14), "video_temporal_patch_size": 2},
    {
        "projector_hidden_size": 48,
        "vision_hidden_size": 32,
        "video_token_id": "<video>",
        "audio_token_id": "<so_embedding>",
    },
)


def nemotron_h_omni_processor(*, padding_side: str = "right", **images):
    """28 px to a visual token."""
    settings = {"patch_size": 14, "min_num_patches": 4, "max_num_patches": 64, **images}
    kind = processor_class("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3")
    images = torchvision_images("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3", **settings)
    return kind(
        image_processor=images,
        tokenizer=_nemotron_tokenizer(padding_side),
        feature_extractor=transformers.ParakeetFeatureExtractor(),
        chat_template=TILE_TEMPLATE,
    )


FAMILIES = {
    "deepseek_ocr2": Family(deepseek_ocr2_model, deepseek_ocr2_processor),
    "molmo2": Family(molmo2_model, molmo2_processor),
    "nemotron_h_omni": Family(nemotron_h_omni_model, nemotron_h_omni_processor),
    "step3p7": Family(step3p7_model, step3p7_processor),
    "unlimited_ocr": Family(unlimited_ocr_model, unlimited_ocr_processor),
}
