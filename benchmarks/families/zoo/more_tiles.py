"""Tiny random models of more families that cut an image into tiles on a canvas they choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.families.zoo.lookups import pil_images, processor_class, torchvision_images
from benchmarks.families.zoo.making import (
    QWEN_TEMPLATE,
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    tokenizer_with,
    tower,
)
from benchmarks.families.zoo.tiles import SLIDING, internvl_model

SQUARE = {"height": TILE, "width": TILE}
SAM_SIDE = 64  # pixels of a view of towers that make a token of 16 x 16 of them

_cohere_tokenizer = tokenizer_with(
    boi_token="<|START_OF_IMG|>",
    eoi_token="<|END_OF_IMG|>",
    image_token="<|IMG_PATCH|>",
    img_line_break_token="<|IMG_LINE_BREAK|>",
)

# Cohere2: parallel blocks, LayerNorm, sliding layers; 2 x 2 tokens to a tile.
cohere2_vision_model = Model(
    "Cohere2VisionConfig",
    _cohere_tokenizer,
    "<|IMG_PATCH|>",
    {"model_type": "cohere2", "logit_scale": 0.25, **SLIDING},
    tower("siglip_vision_model"),
    {"downsample_factor": 2, "alignment_intermediate_size": 96},
)


def cohere2_vision_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 56 px and a thumbnail; its `patch_size` are the tokens along a tile."""
    settings = {"size": SQUARE, "max_patches": 6, "patch_size": 2, **images}
    return processor_class("cohere2_vision", "Cohere2Vision")(
        torchvision_images("cohere2_vision", "Cohere2Vision", **settings),
        _cohere_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<|IMG_PATCH|>"),
    )


_compass_tokenizer = tokenizer_with(
    image_token="<|IMAGE_PAD|>",
    video_token="<|VIDEO_PAD|>",
    vision_start_token="<|VISION_START|>",
    vision_end_token="<|VISION_END|>",
)

# Qwen3-VL's tower, deepstack included, on a Cohere decoder.
cohere_compass_model = Model(
    "CohereCompassConfig",
    _compass_tokenizer,
    "<|IMAGE_PAD|>",
    {
        "model_type": "cohere_compass_text",
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            }
        },
    },
    {
        "model_type": "cohere_compass_vision",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
    {
        "video_token_id": "<|VIDEO_PAD|>",
        "vision_start_token_id": "<|VISION_START|>",
        "vision_end_token_id": "<|VISION_END|>",
    },
)


def cohere_compass_processor(*, padding_side: str = "right", **images):
    """28 px to a visual token."""
    settings = {"min_pixels": 28 * 28, "max_pixels": 36 * 28 * 28, **images}
    template = QWEN_TEMPLATE.replace("<|image_pad|>", "<|IMAGE_PAD|>")
    template = template.replace("<|vision_start|>", "<|VISION_START|>")
    return processor_class("cohere_compass", "CohereCompass")(
        pil_images("cohere_compass", "CohereCompass", **settings),
        _compass_tokenizer(padding_side),
        chat_template=template.replace("<|vision_end|>", "<|VISION_END|>"),
    )


_got_tokenizer = tokenizer_with(image_token="<imgpad>", img_start="<img>", img_end="</img>")
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SAM_SIDE,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "initializer_range": 0.02,
}


def _on_sam(build: Model) -> Callable[..., Any]:
    """Makes the model; the tower knows eager attention alone."""

    def model(*, attention: str = "sdpa", **settings):
        return build(attention={"": "eager", "text_config": attention}, **settings)

    return model


# A SAM tower; two convolutions of stride 2 leave 4 x 4 tokens.
got_ocr2_model = Model(
    "GotOcr2Config",
    _got_tokenizer,
    "<imgpad>",
    {"model_type": "qwen2"},
    {"model_type": "got_ocr2_vision", **SAM},
)
pp_chart2table_model = replace(
    got_ocr2_model,
    config="PPChart2TableConfig",
    vision={"model_type": "pp_chart2table_vision", **SAM},
)


def got_ocr2_processor(*, padding_side: str = "right", **images):
    """One square view, or up to 6 tiles of 64 px and a thumbnail."""
    square = {"height": SAM_SIDE, "width": SAM_SIDE}
    processor = processor_class("got_ocr2", "GotOcr2")(
        pil_images("got_ocr2", "GotOcr2", size=square),
        _got_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<img><imgpad></img>"),
    )
    processor.num_image_tokens = 16
    processor.images_kwargs = {**processor.images_kwargs, "max_patches": 6, **images}
    return processor


def pp_chart2table_processor(*, padding_side: str = "right"):
    """One square view, whose 16 visual tokens the chat template writes."""
    square = {"height": SAM_SIDE, "width": SAM_SIDE}
    return processor_class("pp_chart2table", "PPChart2Table")(
        pil_images("pp_chart2table", "PPChart2Table", size=square),
        _got_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", f"<img>{'<imgpad>' * 16}</img>"),
    )


_qianfan_tokenizer = tokenizer_with(
    start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>"
)
qianfan_ocr_model = replace(
    internvl_model,
    config="QianfanOCRConfig",
    tokenizer=_qianfan_tokenizer,
    text={"model_type": "qwen3"},
    vision={
        **internvl_model.vision,
        "model_type": "qianfan_ocr_vision",
        "drop_path_rate": 0.0,
    },
)


def qianfan_ocr_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 56 px and a thumbnail; the template's placeholder is no visual token."""
    return processor_class("qianfan_ocr", "QianfanOCR")(
        pil_images("got_ocr2", "GotOcr2", size=SQUARE, max_patches=6, **images),
        _qianfan_tokenizer(padding_side),
        image_seq_length=4,
        chat_template=TILE_TEMPLATE,
    )


docling_tokenizer = tokenizer_with(
    image_token="<image>",
    fake_image_token="<fake_token_around_image>",
    global_image_token="<global-img>",
    **{f"row_{r}_{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)},
)

# 2 x 2 tokens to a tile, 4 x 4 by option; features of the first tower layer enter the decoder.
granite_docling_model = Model(
    "GraniteDoclingConfig",
    docling_tokenizer,
    "<image>",
    {"model_type": "granite_docling_text", "attention_multiplier": 0.25},
    {
        **tower("granite_docling_vision", image_size=64, patch_size=8),
        "out_hidden_size": 64,
        "scale_factor": 4,
        "deepstack_visual_indexes": [0],
    },
)


def granite_docling_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 64 px and a thumbnail."""
    square = {"height": 64, "width": 64}
    settings = {"size": square, "max_patches": 6, **images}
    return processor_class("granite_docling", "GraniteDocling")(
        pil_images("granite_docling", "GraniteDocling", **settings),
        docling_tokenizer(padding_side),
        image_seq_len=4,
        chat_template=TILE_TEMPLATE,
    )


_LLAMA4 = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
_llama4_tokenizer = tokenizer_with(**{f"{name}_token": f"<|{name}|>" for name in _LLAMA4})

# Two layers of chunked attention and a full one; experts in every second layer.
llama4_model = Model(
    "Llama4Config",
    _llama4_tokenizer,
    "<|patch|>",
    {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 512,
    },
    {
        **tower("llama4_vision_model"),
        "intermediate_size": 128,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    {"boi_token_id": "<|image_start|>", "eoi_token_id": "<|image_end|>"},
)


def llama4_processor(*, padding_side: str = "right", **images):
    """Up to 6 tiles of 56 px, then the whole image."""
    settings = {"size": SQUARE, "max_patches": 6, **images}
    return processor_class("llama4", "Llama4")(
        torchvision_images("llama4", "Llama4", **settings),
        _llama4_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE.replace("<image>", "<|image|>"),
    )


_OVIS = ("IMG_START", "IMG_END", "IMG_GRID", "IMG_COL", "IMG_ROW", "IMG_ATOM")
ovis_tokenizer = tokenizer_with(**{name.lower(): f"<{name}>" for name in _OVIS})

# Tokens are mixtures of a table of visual words, markers are words of it; 2 x 2 to a tile.
ovis2_model = Model(
    "Ovis2Config",
    ovis_tokenizer,
    "<IMG_ATOM>",
    {"model_type": "qwen2"},
    {**tower("ovis2_vision"), "hidden_stride": 2, "vocab_size": 40},
    {"hidden_size": 64, "visual_indicator_token_ids": _OVIS[:5]},
)


def ovis2_processor(*, padding_side: str = "right", **images):
    """The whole image, then up to 6 tiles of 56 px."""
    settings = {"size": SQUARE, "crop_to_patches": True, "max_patches": 6, **images}
    return processor_class("ovis2", "Ovis2")(
        pil_images("ovis2", "Ovis2", **settings),
        ovis_tokenizer(padding_side),
        image_seq_length=4,
        chat_template=TILE_TEMPLATE,
    )


def _ovis2(**settings):
    """The model; its config names the markers by their ids, a list."""
    tokenizer = ovis_tokenizer()
    ids = tokenizer.convert_tokens_to_ids([f"<{name}>" for name in _OVIS[:5]])
    more = {"visual_indicator_token_ids": ids, "vocab_size": len(tokenizer)}
    return replace(ovis2_model, more={**ovis2_model.more, **more})(**settings)


FAMILIES = {
    "cohere2_vision": Family(cohere2_vision_model, cohere2_vision_processor),
    "cohere_compass": Family(cohere_compass_model, cohere_compass_processor),
    "got_ocr2": Family(_on_sam(got_ocr2_model), got_ocr2_processor),
    "granite_docling": Family(granite_docling_model, granite_docling_processor),
    "llama4": Family(llama4_model, llama4_processor),
    "ovis2": Family(_ovis2, ovis2_processor),
    "pp_chart2table": Family(_on_sam(pp_chart2table_model), pp_chart2table_processor),
    "qianfan_ocr": Family(qianfan_ocr_model, qianfan_ocr_processor),
}
