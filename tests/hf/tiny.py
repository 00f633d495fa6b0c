"""Tiny random Qwen2.5-VL and LLaVA-1.5 models with processors: no hub, no torchvision, seconds.

Weights are scaled up after initialisation: otherwise attention is flat and tests see nothing.
"""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from groundkern.hf.data.processor import pil_image_processor, without_video

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
)

CORPUS = (
    "Where is the red patch? The red patch is in row 2, column 5 of the grid.",
    "How much coal was mined in 1854? The chart shows 65 million tons, more than in 1801.",
    "user assistant system You are a helpful assistant. Read the word under the box.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "must be in want of a wife. Call me Ishmael. The total is 0 1 2 3 4 5 6 7 8 9 percent.",
)

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# LLaVA-1.5 on the hub: "USER: <image>\n... ASSISTANT: ...", images first.
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def _trained_bpe() -> str:
    """A byte-level BPE of 512 entries trained on CORPUS, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, eos: str = "<|im_end|>", padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the Qwen and LLaVA special tokens; any text survives a round trip."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        eos_token=eos,
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side=padding_side,
    )


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


def decoder_settings(tokenizer: PreTrainedTokenizerFast, **settings) -> dict:
    """A text config: hidden 64, 3 layers, 4 query heads on 2 key heads of 16."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **settings,
    }


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


def build_model(model_class, config, seed: int, attention: str):
    """A model in eval mode with sharp attention, non-zero biases and uneven norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:  # Gemma3's projector starts at zero
                    parameter.mul_(8.0) if parameter.any() else parameter.normal_(std=0.16)
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
