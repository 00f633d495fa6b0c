"""Families that show images through Qwen2-VL's own image processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import processing_utils

from benchmarks.families.zoo.making import (
    QWEN_TEMPLATE,
    Family,
    Model,
    Unavailable,
    named,
    tiny_tokenizer,
    tokenizer_with,
)
from groundkern.hf.data.processor import pil_image_processor, without_video

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
INTERLEAVED = {**MROPE, "mrope_section": [4, 2, 2]}
PARTIAL = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION_IDS = {
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# a linear layer and one of full attention after it
HYBRID = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "rope_parameters": PARTIAL,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def vit(model_type: str, **settings) -> dict[str, Any]:
    """A vision config of the Qwen kind: hidden 32, 2 layers, 2 x 2 patches to a token."""
    return {
        "model_type": model_type,
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **settings,
    }


def windowed(model_type: str, **settings) -> dict[str, Any]:
    """A vision config like Qwen2.5-VL's: windows of 112 px, then a layer that sees everything."""
    return vit(model_type, window_size=112, fullatt_block_indexes=[1], **settings)


def learned(model_type: str, **settings) -> dict[str, Any]:
    """A vision config like Qwen3-VL's: patches of 16 px, learned positions."""
    return vit(model_type, patch_size=16, num_position_embeddings=64, **settings)


def processor_of(
    name: str,
    tokenizer: Callable[..., Any] = tiny_tokenizer,
    template: str = QWEN_TEMPLATE,
    *,
    patch: int = 14,
    frames: int = 2,
    ears: str = "",
) -> Callable[..., Any]:
    """Makes a family's processor around Qwen2-VL's images: 1 to 36 visual tokens to an image.

    Args:
        name: of the processor's class.
        tokenizer: makes the tokenizer.
        template: the chat template.
        patch: pixels of a patch's side.
        frames: how often an image is repeated along time.
        ears: the class of the sound part that the processor insists on; nothing uses it.
    """

    def processor(*, padding_side: str = "right", **images) -> Any:
        cell = (2 * patch) ** 2
        settings = {"patch_size": patch, "temporal_patch_size": frames}
        settings |= {"min_pixels": cell, "max_pixels": 36 * cell, **images}
        parts = {"feature_extractor": named(ears)()} if ears else {}
        return without_video(named(name))(
            image_processor=pil_image_processor("qwen2_vl", "Qwen2VL")(**settings),
            tokenizer=tokenizer(padding_side=padding_side),
            chat_template=template,
            **parts,
        )

    return processor


def omni_processor(name: str, patch: int = 14) -> Callable[..., Any]:
    """Makes an omni model's processor, with ears that nothing uses."""
    make = processor_of(name, _omni_tokenizer, patch=patch, ears="WhisperFeatureExtractor")

    def processor(**settings: Any) -> Any:
        if not hasattr(processing_utils, "OmniModalProcessorMixin"):
            raise Unavailable("this transformers' omni processors need torchvision for videos")
        return make(**settings)

    return processor


_omni_tokenizer = tokenizer_with(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    audio_token="<|AUDIO|>",
    vision_bos_token="<|vision_start|>",
    vision_eos_token="<|vision_end|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)
OMNI = {
    "video_token_id": "<|video_pad|>",
    "audio_token_id": "<|AUDIO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "vision_start_token_id": "<|vision_start|>",
}
EARS = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "d_model": 32,
    "output_dim": 64,
}


def qwen(config: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Model:
    """A model with the tokens of Qwen's vision-language models."""
    return Model(config, tiny_tokenizer, "<|image_pad|>", text, vision, {**VISION_IDS, **more})


qwen2_vl_model = qwen(
    "Qwen2VLConfig",
    {"model_type": "qwen2_vl_text", "rope_parameters": MROPE},
    {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
)
qwen3_vl_moe_model = qwen(
    "Qwen3VLMoeConfig",
    {"model_type": "qwen3_vl_moe_text", "rope_parameters": INTERLEAVED, **EXPERTS},
    learned("qwen3_vl_moe_vision", deepstack_visual_indexes=[0, 1]),
)
qwen3_5_model = qwen(
    "Qwen3_5Config", {"model_type": "qwen3_5_text", **HYBRID}, learned("qwen3_5_vision")
)
qwen3_5_moe_model = qwen(
    "Qwen3_5MoeConfig",
    {
        "model_type": "qwen3_5_moe_text",
        "shared_expert_intermediate_size": 32,
        **HYBRID,
        **EXPERTS,
    },
    learned("qwen3_5_moe_vision"),
)
# Several residual streams; an indexer that picks keys in the layers of full attention.
qwen4_exp_model = qwen(
    "Qwen4ExpConfig",
    {
        "model_type": "qwen4_exp_text",
        "shared_expert_intermediate_size": 32,
        "hc_count": 2,
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        **HYBRID,
        **EXPERTS,
    },
    learned("qwen4_exp_vision"),
)
qwen2_5_omni_model = Model(
    "Qwen2_5OmniThinkerConfig",
    _omni_tokenizer,
    "<|image_pad|>",
    {"model_type": "qwen2_5_omni_text", "rope_parameters": MROPE},
    windowed("qwen2_5_omni_vision_encoder"),
    {**OMNI, "audio_end_token_id": "<|audio_eos|>", "audio_config": EARS},
)
qwen3_omni_moe_model = Model(
    "Qwen3OmniMoeThinkerConfig",
    _omni_tokenizer,
    "<|image_pad|>",
    {"model_type": "qwen3_omni_moe_text", "rope_parameters": INTERLEAVED, **EXPERTS},
    learned("qwen3_omni_moe_vision_encoder", deepstack_visual_indexes=[0, 1]),
    {**OMNI, "audio_config": EARS | {"downsample_hidden_size": 8}},
)
# Two sliding layers and a full one, norms after the branches.
exaone4_5_model = Model(
    "Exaone4_5_Config",
    tiny_tokenizer,
    "<|image_pad|>",
    {"model_type": "exaone4", "sliding_window": 24, "sliding_window_pattern": 3},
    windowed("exaone4_5_vision", num_key_value_heads=1),
    {"video_token_id": "<|video_pad|>"},
)
# Multiplied residual branches and logits.
hyperclovax_model = Model(
    "HyperCLOVAXVisionV2Config",
    tiny_tokenizer,
    "<|image_pad|>",
    {"model_type": "hyperclovax", "residual_multiplier": 0.7, "logits_scaling": 0.5},
    windowed("qwen2_5_vl_vision"),
    {"video_token_id": "<|video_pad|>"},
)
cosmos3_omni_model = qwen(
    "Cosmos3OmniConfig",
    {"model_type": "qwen3_vl_text", "rope_parameters": INTERLEAVED},
    learned("qwen3_vl_vision", deepstack_visual_indexes=[0, 1]),
)

_dots_tokenizer = tokenizer_with(
    image_token="<|imgpad|>", video_token="<|video_pad|>", audio_token="<|audio_comp_pad|>"
)
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
# Latent attention: a sliding layer between two whose indexer picks keys.
dots3_note_model = Model(
    "Dots3NoteConfig",
    _dots_tokenizer,
    "<|imgpad|>",
    {
        "model_type": "dots3_note_text",
        "num_key_value_heads": 4,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "index_topk": 16,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "sliding_window": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "shared_experts_intermediate_size": 32,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        **_LATENT,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 32,
        **{f"swa_{name}": size for name, size in _LATENT.items()},
    },
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "adapter_in_dim": 32,
        "adapter_out_dim": 64,
    },
    {
        "video_token_id": "<|video_pad|>",
        "audio_token_id": "<|audio_comp_pad|>",
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 8,
            "adapter_input_size": 32,
            "adapter_out_dim": 64,
        },
    },
)

_qwen3 = processor_of("Qwen3VLProcessor", patch=16)
FAMILIES = {
    "qwen2_vl": Family(qwen2_vl_model, processor_of("Qwen2VLProcessor")),
    "qwen3_vl_moe": Family(qwen3_vl_moe_model, _qwen3),
    "qwen3_5": Family(qwen3_5_model, _qwen3),
    "qwen3_5_moe": Family(qwen3_5_moe_model, _qwen3),
    "qwen4_exp": Family(qwen4_exp_model, _qwen3),
    "qwen2_5_omni_thinker": Family(qwen2_5_omni_model, omni_processor("Qwen2_5OmniProcessor")),
    "qwen3_omni_moe_thinker": Family(
        qwen3_omni_moe_model, omni_processor("Qwen3OmniMoeProcessor", patch=16)
    ),
    "exaone4_5": Family(exaone4_5_model, processor_of("Exaone4_5_Processor")),
    "hyperclovax_vision_v2": Family(
        hyperclovax_model, processor_of("HyperCLOVAXVisionV2Processor")
    ),
    "cosmos3_omni": Family(cosmos3_omni_model, _qwen3),
    "dots3_note": Family(
        dots3_note_model,
        processor_of(
            "Dots3NoteProcessor",
            _dots_tokenizer,
            QWEN_TEMPLATE.replace("<|image_pad|>", "<|imgpad|>"),
            frames=1,
            ears="Dots3NoteFeatureExtractor",
        ),
    ),
}
