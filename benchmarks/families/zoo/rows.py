"""Tiny random models of the Gemma, Mistral and Pixtral families: one grid per image.

PaliGemma and Gemma3n squash it to a square, Gemma4 keeps its ratio in pools of patches, and
Pixtral's processor ends each row of the grid with a break token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.families.zoo.making import (
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    Unavailable,
    build_model,
    decoder_settings,
    imported,
    tokenizer_with,
    tower,
)
from benchmarks.families.zoo.tiles import SLIDING, gemma3_model, gemma3_processor
from groundkern.hf.data.processor import pil_image_processor, without_video

FULL_LAST = {**SLIDING, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}


def known(name: str) -> Any:
    """A class of transformers.

    Raises:
        Unavailable: this transformers is older than the class, or needs more packages for it.
    """
    try:
        found = getattr(transformers, name, None)
    except ImportError as error:
        why = f"transformers {transformers.__version__} needs torchvision for its {name}"
        raise Unavailable(why) from error
    if found is None:
        raise Unavailable(f"transformers {transformers.__version__} has no {name}")
    return found


def with_torchvision(name: str) -> Any:
    """An image processor of transformers that has no Pil variant.

    Raises:
        Unavailable: without torchvision, or this transformers is older.
    """
    imported("torchvision", f"transformers' {name} needs torchvision")
    return known(name)


def optional_tower(model_type: str) -> dict[str, Any]:
    """A vision config without an image size of its own."""
    return {key: value for key, value in tower(model_type).items() if key != "image_size"}


# PaliGemma: a prefix that sees itself whole, on Gemma; 4 x 4 tokens.
_paligemma_tokenizer = tokenizer_with(image_token="<image>", bos_token="<bos>")


def _paligemma_vocabulary(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """With the 1152 tokens of places that the processor adds."""
    tokenizer = _paligemma_tokenizer(padding_side)
    tokenizer.add_tokens(
        [f"<loc{i:0>4}>" for i in range(1024)] + [f"<seg{i:0>3}>" for i in range(128)]
    )
    return tokenizer


# on the hub the prompt ends in a line break and the answer in the end of the text
PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}"
    "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)

paligemma_model = Model(
    "PaliGemmaConfig",
    _paligemma_vocabulary,
    "<image>",
    {"model_type": "gemma"},
    tower("siglip_vision_model"),
    {"projection_dim": 64, "hidden_size": 64},
)


def _siglip_images(tokens: int):
    """Every image squashed to 56 x 56."""
    images = pil_image_processor("siglip", "Siglip")(size={"height": TILE, "width": TILE})
    images.image_seq_length = tokens
    return images


def paligemma_processor(*, padding_side: str = "right"):
    """4 x 4 tokens; the processor puts the first token behind the images."""
    return known("PaliGemmaProcessor")(
        _siglip_images(16), _paligemma_tokenizer(padding_side), chat_template=PALIGEMMA_TEMPLATE
    )


_GEMMA_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}
gemma_tokenizer = tokenizer_with(**_GEMMA_TOKENS)
GEMMA_TEMPLATE = TILE_TEMPLATE.replace("<image>", "<image_soft_token>")


def _tower_of_patches() -> type:
    """Takes the place of timm's MobileNetV5 in Gemma3n: patches of 14 pixels as a map."""

    class PatchConfig(known("Gemma3nVisionConfig")):
        model_type = "patches_in_the_place_of_timm"

    class Patches(transformers.PreTrainedModel):
        config_class = PatchConfig
        _supports_sdpa = True

        def __init__(self, config: PatchConfig) -> None:
            super().__init__(config)
            self.patches = nn.Conv2d(3, config.hidden_size, 14, 14)
            self.post_init()

        def forward(
            self, pixel_values: torch.Tensor, do_pooling: bool, return_dict: bool
        ) -> BaseModelOutputWithPooling:
            return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values))

    AutoModel.register(PatchConfig, Patches, exist_ok=True)
    return PatchConfig


def gemma3n_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """AltUp streams, per-layer inputs, a layer that shares the keys of another; 4 x 4 tokens."""
    tokenizer = gemma_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    size = len(tokenizer)
    settings = {
        "head_dim": 16,
        "vocab_size": size,
        "vocab_size_per_layer_input": size,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 24,
        **text,
    }
    # behind the text's ids come those of the towers, as on the hub
    audio = {"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
    audio |= {"vocab_size": 2, "vocab_offset": size + 2, "sscp_conv_channel_size": [8, 4]}
    config = known("Gemma3nConfig")(
        text_config=decoder_settings(tokenizer, **settings),
        vision_config=_tower_of_patches()(hidden_size=32, vocab_size=2, vocab_offset=size),
        audio_config=audio,
        vision_soft_tokens_per_image=16,
        image_token_id=token("<image_soft_token>"),
        audio_token_id=token("<audio_soft_token>"),
        boi_token_id=token("<start_of_image>"),
        eoi_token_id=token("<end_of_image>"),
        boa_token_id=token("<start_of_audio>"),
        eoa_token_id=token("<end_of_audio>"),
        tie_word_embeddings=False,
    )
    return build_model(
        AutoModelForImageTextToText._model_mapping[type(config)], config, seed, attention
    )


def gemma3n_processor(*, padding_side: str = "right"):
    """4 x 4 tokens."""
    return known("Gemma3nProcessor")(
        known("Gemma3nAudioFeatureExtractor")(),
        _siglip_images(16),
        gemma_tokenizer(padding_side),
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=16,
    )


# Gemma4: per-layer inputs, wider heads in the full layers; patches of 4 pixels in pools of 3 x 3.
_GEMMA4_TEXT = {
    "model_type": "gemma4_text",
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 1000,
    "use_bidirectional_attention": "vision",
    **FULL_LAST,
}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 256,
}
_GEMMA4_IDS = {
    "boi_token_id": "<start_of_image>",
    "eoi_token_id": "<end_of_image>",
    "audio_token_id": "<audio_soft_token>",
}
gemma4_model = Model(
    "Gemma4Config",
    gemma_tokenizer,
    "<image_soft_token>",
    _GEMMA4_TEXT,
    _GEMMA4_VISION,
    {**_GEMMA4_IDS, "audio_config": None},
)
gemma4_unified_model = replace(
    gemma4_model,
    config="Gemma4UnifiedConfig",
    text={**_GEMMA4_TEXT, "model_type": "gemma4_unified_text"},
    vision={"patch_size": 4, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 80},
)
diffusion_gemma_model = replace(
    gemma4_model,
    config="DiffusionGemmaConfig",
    text={
        **_GEMMA4_TEXT,
        "model_type": "diffusion_gemma_text",
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    more={"boi_token_id": "<start_of_image>", "eoi_token_id": "<end_of_image>"},
)


def _gemma4_processor(name: str, images: Any, padding_side: str):
    return without_video(known(name))(
        known(name.replace("Processor", "AudioFeatureExtractor"))(),
        images,
        gemma_tokenizer(padding_side),
        chat_template=GEMMA_TEMPLATE,
    )


def gemma4_processor(*, padding_side: str = "right"):
    """At most 70 tokens of 12 x 12 pixels."""
    images = pil_image_processor("gemma4", "Gemma4")(patch_size=4, max_soft_tokens=70)
    return _gemma4_processor("Gemma4Processor", images, padding_side)


def gemma4_unified_processor(*, padding_side: str = "right"):
    """As Gemma4, with patches merged by the processor."""
    images = with_torchvision("Gemma4UnifiedImageProcessor")(patch_size=4, max_soft_tokens=70)
    return _gemma4_processor("Gemma4UnifiedProcessor", images, padding_side)


# Pixtral's towers: patches of 14 pixels, merged 2 x 2 in all but LLaVA.
_PIXTRAL_TOKENS = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
_pixtral_tokenizer = tokenizer_with(**_PIXTRAL_TOKENS)
PIXTRAL_TEMPLATE = TILE_TEMPLATE.replace("<image>", "[IMG]")
_PIXTRAL = tower("pixtral", image_size=168, head_dim=16)
_EXPERTS = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
mistral3_model = Model(
    "Mistral3Config", _pixtral_tokenizer, "[IMG]", {"model_type": "mistral"}, _PIXTRAL
)
# Latent attention that picks keys by an index, experts, a softcap on the logits.
mistral_large4_model = replace(
    mistral3_model,
    config="MistralLarge4Config",
    text={
        "model_type": "mistral_large4_text",
        **_EXPERTS,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 8,
    },
)
lighton_ocr_model = replace(mistral3_model, config="LightOnOcrConfig", text={"model_type": "qwen3"})
llava_pixtral_model = replace(
    mistral3_model,
    config="LlavaConfig",
    more={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
)


def mistral4_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """A decoder alone: with images it is Mistral3's."""
    settings = decoder_settings(_pixtral_tokenizer(), **_EXPERTS, **text)
    config = known("Mistral4Config")(**settings)
    return build_model(known("Mistral4ForCausalLM"), config, seed, attention)


def _pixtral_processor_class() -> type:
    """transformers' own. Its module takes one function of the module of the image processor that
    needs torchvision; the Pil variant's module has the same one."""
    folder = "transformers.models.pixtral."
    stand_in = folder + "image_processing_pixtral"
    if find_spec("torchvision") is None and find_spec(folder + "image_processing_pil_pixtral"):
        sys.modules[stand_in] = import_module(folder + "image_processing_pil_pixtral")
    try:
        return import_module(folder + "processing_pixtral").PixtralProcessor
    finally:
        if find_spec("torchvision") is None:
            sys.modules.pop(stand_in, None)


def _pixtral_processor(merge: int) -> Callable[..., Any]:
    def processor(*, padding_side: str = "right"):
        images = pil_image_processor("pixtral", "Pixtral")(
            size={"longest_edge": 168}, patch_size={"height": 14, "width": 14}
        )
        return _pixtral_processor_class()(
            images,
            _pixtral_tokenizer(padding_side),
            patch_size=14,
            spatial_merge_size=merge,
            chat_template=PIXTRAL_TEMPLATE,
        )

    return processor


def lighton_ocr_processor(*, padding_side: str = "right"):
    """The longest edge to 168 px, 28 px to a token; no break tokens."""
    images = pil_image_processor("pixtral", "Pixtral")(
        size={"longest_edge": 168}, patch_size={"height": 14, "width": 14}
    )
    return known("LightOnOcrProcessor")(
        images, _pixtral_tokenizer(padding_side), chat_template=PIXTRAL_TEMPLATE
    )


shieldgemma2_model = replace(gemma3_model, config="ShieldGemma2Config")

FAMILIES = {
    # it denoises answers block by block, beside the sequence that the collator lays out
    "diffusion_gemma": Family(diffusion_gemma_model, None),
    "gemma3n": Family(gemma3n_model, gemma3n_processor),
    "gemma4": Family(gemma4_model, gemma4_processor),
    "gemma4_unified": Family(gemma4_unified_model, gemma4_unified_processor),
    "lighton_ocr": Family(lighton_ocr_model, lighton_ocr_processor),
    "llava:pixtral": Family(llava_pixtral_model, _pixtral_processor(1)),
    "mistral3": Family(mistral3_model, _pixtral_processor(2)),
    "mistral4": Family(mistral4_model, None),  # text alone
    "mistral_large4": Family(mistral_large4_model, _pixtral_processor(2)),
    "paligemma": Family(paligemma_model, paligemma_processor),
    # its own processor writes one prompt per policy in the place of the texts it is given
    "shieldgemma2": Family(shieldgemma2_model, gemma3_processor),
}
