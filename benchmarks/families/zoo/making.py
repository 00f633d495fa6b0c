"""What tiny random models and processors are made with: no hub, no torchvision, seconds.

Weights are scaled up after initialisation: otherwise attention is flat and tests see nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

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


TILE = 56  # pixels of a tile's side
TILE_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")


class Unavailable(Exception):
    """Why a family cannot be built with the installed packages, as one sentence."""


def imported(name: str, why: str) -> ModuleType:
    """A module that a family's processor needs.

    Raises:
        Unavailable: with `why`, if it cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(why) from error


def named(name: str) -> type:
    """A class of transformers.

    Raises:
        Unavailable: this transformers has none of that name.
    """
    found = getattr(transformers, name, None)
    if found is None:
        raise Unavailable(f"transformers {transformers.__version__} has no {name}")
    return found


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


@dataclass(frozen=True)
class Family:
    """How to build a family's model (keywords: seed, attention, text settings) and processor.

    Both raise `Unavailable` with the reason if the installed packages do not do. A family without
    a processor that can be built has None.
    """

    model: Callable[..., Any]
    processor: Callable[..., Any] | None


@dataclass(frozen=True)
class Model:
    """Builds a family's model, as `tiny_qwen_model` does its own.

    Args:
        config: the name of the config's class in transformers.
        tokenizer: makes the tokenizer.
        image_token: the visual tokens' text.
        text: settings of the decoder, `model_type` included.
        vision: settings of the vision tower.
        more: settings of the whole.
    """

    config: str
    tokenizer: Callable[..., PreTrainedTokenizerFast]
    image_token: str
    text: dict[str, Any]
    vision: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *, seed: int = 0, attention: str = "sdpa", **text) -> Any:
        kind = named(self.config)
        tokenizer = self.tokenizer()
        token = tokenizer.convert_tokens_to_ids
        ids = {k: token(v) if k.endswith("_token_id") else v for k, v in self.more.items()}
        config = kind(
            text_config=decoder_settings(tokenizer, **{"head_dim": 16, **self.text, **text}),
            vision_config=self.vision,
            image_token_id=token(self.image_token),
            tie_word_embeddings=False,
            **ids,
        )
        model_class = AutoModelForImageTextToText._model_mapping.get(kind, None)
        if model_class is None:
            raise Unavailable(f"transformers {transformers.__version__} has no model for {kind}")
        return build_model(model_class, config, seed, attention)


def tower(model_type: str, **settings) -> dict[str, Any]:
    """A vision config: hidden 32, 2 layers, 56 x 56 pixels in patches of 14."""
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 14,
        **settings,
    }


def tokenizer_with(**named: str) -> Callable[..., PreTrainedTokenizerFast]:
    """Makes the tiny tokenizer with more special tokens, which a processor looks up by name."""

    def make(padding_side: str = "right") -> PreTrainedTokenizerFast:
        plain = tiny_tokenizer()
        return PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            eos_token=plain.eos_token,
            pad_token=plain.pad_token,
            extra_special_tokens={**{t: t for t in plain.extra_special_tokens}, **named},
            padding_side=padding_side,
        )

    return make
