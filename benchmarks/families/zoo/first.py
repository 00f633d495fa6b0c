"""Qwen2.5-VL and LLaVA-1.5, the models that most tests use."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from benchmarks.families.zoo.making import (
    LLAVA_TEMPLATE,
    QWEN_TEMPLATE,
    Family,
    build_model,
    decoder_settings,
    tiny_tokenizer,
)
from groundkern.hf.data.processor import pil_image_processor, without_video


def tiny_qwen_processor(*, padding_side: str = "right") -> Qwen2_5_VLProcessor:
    """28 px to a visual token, 1 to 64 visual tokens to an image, no video part."""
    return without_video(Qwen2_5_VLProcessor)(
        image_processor=pil_image_processor("qwen2_vl", "Qwen2VL")(
            min_pixels=28 * 28, max_pixels=64 * 28 * 28
        ),
        tokenizer=tiny_tokenizer(padding_side=padding_side),
        chat_template=QWEN_TEMPLATE,
    )


def tiny_llava_processor(*, padding_side: str = "right") -> LlavaProcessor:
    """Short edge to 56 px, centre crop to 56 x 56, 4 x 4 visual tokens."""
    return LlavaProcessor(
        image_processor=pil_image_processor("llava", "Llava")(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=tiny_tokenizer(eos="<|endoftext|>", padding_side=padding_side),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


def tiny_qwen_model(
    *, seed: int = 0, attention: str = "sdpa", tied: bool = False, **text
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2 decoder; `text` overrides its config."""
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    settings = {"rope_parameters": rope, "tie_word_embeddings": tied, **text}
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=decoder_settings(tokenizer, **settings),
        vision_config=vision_config,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    return build_model(Qwen2_5_VLForConditionalGeneration, config, seed, attention)


def tiny_llava_model(
    *, seed: int = 0, attention: str = "sdpa", **text
) -> LlavaForConditionalGeneration:
    """A Llama decoder; CLIP on 56 x 56 images."""
    tokenizer = tiny_tokenizer(eos="<|endoftext|>")
    vision_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        projection_dim=32,
    )
    config = LlavaConfig(
        text_config=LlamaConfig(**decoder_settings(tokenizer, **text)),
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return build_model(LlavaForConditionalGeneration, config, seed, attention)


FAMILIES = {
    "qwen2_5_vl": Family(tiny_qwen_model, tiny_qwen_processor),
    "llava": Family(tiny_llava_model, tiny_llava_processor),
}
