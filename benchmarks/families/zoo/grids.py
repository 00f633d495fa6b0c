"""Families with an image processor of their own that lays a grid over an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.families.zoo.making import (
    QWEN_TEMPLATE,
    Family,
    Model,
    imported,
    named,
    tiny_tokenizer,
    tokenizer_with,
    tower,
)
from benchmarks.families.zoo.qwens import MROPE, PARTIAL, VISION_IDS, vit
from groundkern.hf.data.processor import pil_image_processor, without_video

QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TORCHVISION = "this family's only image processor in transformers needs torchvision"


def _pil(family: str, name: str) -> Callable[..., Any]:
    """The maker of a family's image processor that needs no torchvision."""

    def make(**settings: Any) -> Any:
        imported(f"transformers.models.{family}", f"this transformers has no {family}")
        return pil_image_processor(family, name)(**settings)

    return make


def _torchvision(family: str, name: str) -> Callable[..., Any]:
    """The maker of an image processor that exists with torchvision alone."""

    def make(**settings: Any) -> Any:
        imported("torchvision", TORCHVISION)
        module = imported(f"transformers.models.{family}.image_processing_{family}", TORCHVISION)
        return getattr(module, f"{name}ImageProcessor")(**settings)

    return make


def processor_of(
    name: str,
    images: Callable[..., Any],
    tokenizer: Callable[..., Any],
    image: str,
    **settings: Any,
) -> Callable[..., Any]:
    """Makes a family's processor.

    Args:
        name: of the processor's class.
        images: makes its image processor.
        tokenizer: makes the tokenizer.
        image: what the chat template writes for an image.
        **settings: of the image processor.
    """

    def processor(*, padding_side: str = "right", **more: Any) -> Any:
        return without_video(named(name))(
            image_processor=images(**{**settings, **more}),
            tokenizer=tokenizer(padding_side=padding_side),
            chat_template=QWEN_TEMPLATE.replace(QWEN_IMAGE, image),
        )

    return processor


def _pixels(cell: int, frames: int = 1) -> dict[str, dict[str, int]]:
    """1 to 36 visual tokens of `cell` pixels a side to an image."""
    least = frames * cell * cell
    return {"size": {"shortest_edge": least, "longest_edge": 36 * least}}


_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}
_glm_tokenizer = tokenizer_with(**_GLM_TOKENS)
_GLM_IDS = {f"{name}_id": token for name, token in _GLM_TOKENS.items() if name != "image_token"}
_GLM_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def glm(config: str, text: dict[str, Any], vision: str, **more: Any) -> Model:
    """A model with GLM's tokens and a vision tower of its kind."""
    seeing = vit(vision, image_size=56, **more)
    return Model(config, _glm_tokenizer, "<|image|>", text, seeing, _GLM_IDS)


def glm_processor(name: str, images: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """A processor with GLM's tokens; 1 to 36 tokens of 28 px, unless `settings` say more."""
    settings = settings or _pixels(28, frames=2)
    return processor_of(name, images, _glm_tokenizer, _GLM_IMAGE, **settings)


_glm4v_text = {"model_type": "glm4v_text", "rope_parameters": {**PARTIAL}}
glm4v_model = glm("Glm4vConfig", _glm4v_text, "glm4v_vision")
glm46v_model = glm("Glm46VConfig", _glm4v_text, "glm4v_vision")
glmga_model = glm("GlmgaConfig", _glm4v_text, "glm4v_vision")
glm4v_moe_model = glm(
    "Glm4vMoeConfig",
    {"model_type": "glm4v_moe_text", "rope_parameters": PARTIAL, **_GLM_EXPERTS},
    "glm4v_moe_vision",
)
glm_ocr_model = glm(
    "GlmOcrConfig", {"model_type": "glm_ocr_text", "rope_parameters": MROPE}, "glm_ocr_vision"
)
# Linear layers and one of latent attention whose indexer picks keys; several residual streams.
glm5_next_model = glm(
    "Glm5NextConfig",
    {
        "model_type": "glm5_next_text",
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "index_topk": 16,
        "index_kpool": 4,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "hc_mult": 2,
    },
    "glm5_next_vision",
    projection_intermediate_size=48,
)

_ernie_tokenizer = tokenizer_with(
    image_token="<|IMAGE_PLACEHOLDER|>",
    image_start_token="<|IMAGE_START|>",
    image_end_token="<|IMAGE_END|>",
    video_token="<|VIDEO_PLACEHOLDER|>",
    video_start_token="<|VIDEO_START|>",
    video_end_token="<|VIDEO_END|>",
)
# Separate experts for text and image tokens, which `moe_mm_token_type_ids` tells apart.
ernie_model = Model(
    "Ernie4_5_VLMoeConfig",
    _ernie_tokenizer,
    "<|IMAGE_PLACEHOLDER|>",
    {
        "model_type": "ernie4_5_vl_moe_text",
        "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [32, 16],
        "moe_num_experts": 4,
        "moe_k": 2,
    },
    {
        "model_type": "ernie4_5_vl_moe_vision",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
    },
    {
        "image_start_token_id": "<|IMAGE_START|>",
        "image_end_token_id": "<|IMAGE_END|>",
        "video_token_id": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token_id": "<|VIDEO_START|>",
        "video_end_token_id": "<|VIDEO_END|>",
    },
)

video_llama_model = Model(
    "VideoLlama3Config",
    tiny_tokenizer,
    "<|image_pad|>",
    {"model_type": "qwen2"},
    tower("video_llama_3_vision"),
    {"video_token_id": "<|video_pad|>"},
)

_paddle_tokenizer = tokenizer_with(
    image_token="<|IMAGE_PLACEHOLDER|>", start="<|IMAGE_START|>", end="<|IMAGE_END|>"
)
paddle_model = Model(
    "PaddleOCRVLConfig",
    _paddle_tokenizer,
    "<|IMAGE_PLACEHOLDER|>",
    {"model_type": "paddleocr_vl_text", "rope_parameters": MROPE},
    tower("paddleocr_vl_vision"),
    {
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|IMAGE_START|>",
        "vision_end_token_id": "<|IMAGE_END|>",
    },
)

_hunyuan_tokenizer = tokenizer_with(
    image_token="<|img|>", image_start_token="<|img_start|>", image_end_token="<|img_end|>"
)
# A base of RoPE that is raised once; positions by token, column, row and image.
hunyuan_model = Model(
    "HunYuanVLConfig",
    _hunyuan_tokenizer,
    "<|img|>",
    {
        "model_type": "hunyuan_vl_text",
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "alpha": 1000.0,
            "factor": 1.0,
            "mrope_section": [2, 2, 2, 2],
        },
    },
    tower("hunyuan_vl_vision", patch_size=16, out_hidden_size=64, max_image_size=192),
)

kimi_model = Model(
    "Kimi_K25Config",
    tiny_tokenizer,
    "<|image_pad|>",
    {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
    },
    {**VISION_IDS, "projection_hidden_size": 32},
)

cosmos3_edge_model = Model(
    "Cosmos3EdgeConfig",
    tiny_tokenizer,
    "<|image_pad|>",
    {"model_type": "cosmos3_edge_text", "rope_parameters": MROPE},
    tower("cosmos3_edge_vision", patch_size=16, num_patches=16),
    {**VISION_IDS, "projector_hidden_size": 48},
)

MINIMAX_IMAGE, MINIMAX_VIDEO = "]<]image[>[", "]<]video[>["
_minimax_tokenizer = tokenizer_with(
    image=MINIMAX_IMAGE,
    video=MINIMAX_VIDEO,
    start="]<]start of image[>[",
    end="]<]end of image[>[",
)
# The second layer sees blocks of keys that an indexer picks.
minimax_model = Model(
    "MiniMaxM3VLConfig",
    _minimax_tokenizer,
    MINIMAX_IMAGE,
    {
        "model_type": "minimax_m3_vl_text",
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "intermediate_size": 32,
        "rotary_dim": 8,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 2,
    },
    tower("minimax_m3_vl_vision"),
    {"video_token_id": MINIMAX_VIDEO, "projector_hidden_size": 48},
)

_glm4v_images = _pil("glm4v", "Glm4v")
FAMILIES = {
    "glm4v": Family(glm4v_model, glm_processor("Glm4vProcessor", _glm4v_images)),
    "glm4v_moe": Family(glm4v_moe_model, glm_processor("Glm4vProcessor", _glm4v_images)),
    "glm46v": Family(glm46v_model, glm_processor("Glm46VProcessor", _pil("glm46v", "Glm46V"))),
    "glm_ocr": Family(glm_ocr_model, glm_processor("Glm46VProcessor", _pil("glm46v", "Glm46V"))),
    "glmga": Family(glmga_model, glm_processor("Glm46VProcessor", _pil("glmga", "Glmga"))),
    "glm5_next": Family(
        glm5_next_model,
        glm_processor(
            "Glm5NextProcessor",
            _pil("glm5_next", "Glm5Next"),
            min_image_tokens=4,
            max_image_tokens=36,
        ),
    ),
    "ernie4_5_vl_moe": Family(
        ernie_model,
        processor_of(
            "Ernie4_5_VLMoeProcessor",
            _pil("ernie4_5_vl_moe", "Ernie4_5_VLMoe"),
            _ernie_tokenizer,
            "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            **_pixels(28),
        ),
    ),
    "video_llama_3": Family(
        video_llama_model,
        processor_of(
            "VideoLlama3Processor",
            _pil("video_llama_3", "VideoLlama3"),
            tiny_tokenizer,
            QWEN_IMAGE,
            **_pixels(14),
        ),
    ),
    "paddleocr_vl": Family(
        paddle_model,
        processor_of(
            "PaddleOCRVLProcessor",
            _pil("paddleocr_vl", "PaddleOCRVL"),
            _paddle_tokenizer,
            "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            **_pixels(28),
        ),
    ),
    "hunyuan_vl": Family(
        hunyuan_model,
        processor_of(
            "HunYuanVLProcessor",
            _pil("hunyuan_vl", "HunYuanVL"),
            _hunyuan_tokenizer,
            "<|img_start|><|img|><|img_end|>",
            **_pixels(32),
        ),
    ),
    "kimi_k25": Family(
        kimi_model,
        processor_of(
            "Kimi_K25Processor",
            _torchvision("kimi_k25", "Kimi_K25"),
            tokenizer_with(image_token="<|image_pad|>", video_token="<|video_pad|>"),
            QWEN_IMAGE,
            max_patches=144,
            size={"max_height": 512, "max_width": 512},
        ),
    ),
    "cosmos3_edge": Family(
        cosmos3_edge_model,
        processor_of(
            "Cosmos3EdgeProcessor",
            _pil("cosmos3_edge", "Cosmos3Edge"),
            tiny_tokenizer,
            QWEN_IMAGE,
            **_pixels(32),
        ),
    ),
    "minimax_m3_vl": Family(
        minimax_model,
        processor_of(
            "MiniMaxM3VLProcessor",
            _torchvision("minimax_m3_vl", "MiniMaxM3VL"),
            _minimax_tokenizer,
            MINIMAX_IMAGE,
            **_pixels(28),
        ),
    ),
}
