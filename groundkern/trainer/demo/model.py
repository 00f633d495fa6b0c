"""A small Qwen2.5-VL built from its config, with its own tokenizer and processor: no hub access."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from groundkern.hf.data.processor import pil_image_processor, without_video
from groundkern.trainer.demo.videos import PilVideoProcessor, with_pil_videos

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
# Qwen's own split: every digit is a token of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], *, size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `size` tokens on the corpus, split as Qwen splits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *PADS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=[*SPECIAL[1:], *PADS],
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast, *, videos: bool = False
) -> Qwen2_5_VLProcessor:
    """28 px to a visual token, up to 256 visual tokens to an image; videos only if asked for.

    Two frames of a video are one temporal patch, of as many visual tokens as an image has.
    """
    pixels = {"min_pixels": 28 * 28, "max_pixels": 256 * 28 * 28}
    images = pil_image_processor("qwen2_vl", "Qwen2VL")(**pixels)
    if videos:
        parts = (images, tokenizer, PilVideoProcessor(**pixels))
        return with_pil_videos(Qwen2_5_VLProcessor)(*parts, chat_template=TEMPLATE)
    return without_video(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=TEMPLATE)


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of 4 text layers, 128 wide, and a vision tower of 1 layer, 64 wide."""
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL, *PADS)}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def save_model(folder: Path, corpus: Iterable[str], *, seed: int = 0) -> int:
    """Write weights, config, tokenizer and processor as any model's folder has them.

    Args:
        folder: made if missing; what `model.path` of the trainer's config names.
        corpus: texts the tokenizer is trained on.
        seed: of the weights.

    Returns:
        The number of parameters.
    """
    processor = build_processor(build_tokenizer(corpus))
    model = build_model(processor.tokenizer, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.num_parameters()
