"""Tiny random models of families on padded squares, on discrete codes, and with raw patches.

Janus and DeepSeek-VL see a padded square; Emu3 and Chameleon read images as codes of a vocabulary;
Fuyu has no vision tower. The resamplers of Idefics2 and Aria are in `refused`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers

from benchmarks.families.zoo.making import (
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    build_model,
    decoder_settings,
    named,
    tokenizer_with,
    tower,
)
from groundkern.hf.data.processor import pil_image_processor

CODES = 64  # entries of a codebook
SIDE = 8  # visual tokens along a padded square
SQUARE = {"size": {"height": TILE, "width": TILE}, "min_size": 14}

_square_tokenizer = tokenizer_with(
    image_token="<image_placeholder>",
    boi_token="<begin_of_image>",
    eoi_token="<end_of_image>",
)
_SQUARE_TEMPLATE = TILE_TEMPLATE.replace("<image>", "<image_placeholder>")


def _vq(**settings) -> dict[str, Any]:
    """A VQ encoder of 8 px to a code; its group norms want 32 channels."""
    return {
        "embed_dim": 8,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 1,
        **settings,
    }


# 8 x 8 tokens on a padded square.
janus_model = Model(
    "JanusConfig",
    _square_tokenizer,
    "<image_placeholder>",
    {"model_type": "llama"},
    {
        **tower("janus_vision_model", patch_size=TILE // SIDE, projection_dim=64),
        "mlp_ratio": 1.5,
        "num_image_tokens": SIDE**2,
    },
    {"vq_config": _vq(num_embeddings=CODES, projection_dim=64, image_token_embed_dim=64)},
)


def janus_processor(*, padding_side: str = "right", **images):
    """Every image on a padded square of 56 px."""
    return named("JanusProcessor")(
        pil_image_processor("janus", "Janus")(**{**SQUARE, **images}),
        _square_tokenizer(padding_side),
        chat_template=_SQUARE_TEMPLATE,
        num_image_tokens=SIDE**2,
    )


# 8 x 8 tokens on a padded square.
deepseek_vl_model = replace(
    janus_model,
    config="DeepseekVLConfig",
    vision=tower("siglip_vision_model", patch_size=TILE // SIDE, vision_use_head=False),
    more={},
)
# The same, and a SAM tower of 8 x 8 patches, enlarged to 32 x 32 and shrunk again.
deepseek_vl_hybrid_model = replace(
    deepseek_vl_model,
    config="DeepseekVLHybridConfig",
    more={
        "high_res_vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 8,
            "image_size": 2 * TILE,
            "patch_size": 14,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
        }
    },
)


def deepseek_vl_processor(*, padding_side: str = "right", **images):
    """Every image on a padded square of 56 px."""
    return named("DeepseekVLProcessor")(
        pil_image_processor("deepseek_vl", "DeepseekVL")(**{**SQUARE, **images}),
        _square_tokenizer(padding_side),
        chat_template=_SQUARE_TEMPLATE,
        num_image_tokens=SIDE**2,
    )


def deepseek_vl_hybrid_processor(*, padding_side: str = "right", **images):
    """Every image on a padded square of 112 px, and that again at 56 px."""
    high = {"high_res_size": {"height": 2 * TILE, "width": 2 * TILE}}
    return named("DeepseekVLHybridProcessor")(
        pil_image_processor("deepseek_vl_hybrid", "DeepseekVLHybrid")(
            **{**SQUARE, **high, **images}
        ),
        _square_tokenizer(padding_side),
        chat_template=_SQUARE_TEMPLATE,
        num_image_tokens=SIDE**2,
    )


_EMU_CODES = [f"<|visual token {code:06d}|>" for code in range(CODES)]
_emu3_tokenizer = tokenizer_with(
    image_token="<image>",
    boi_token="<|image start|>",
    eoi_token="<|image end|>",
    image_wrapper_token="<|image token|>",
    eof_token="<|extra_201|>",
    eol_token="<|extra_200|>",
    bos_token="<|extra_203|>",
    **{code: code for code in _EMU_CODES},
)


def emu3_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """A Llama-like decoder on codes of 8 px."""
    tokenizer = _emu3_tokenizer()
    vq = _vq(
        codebook_size=CODES,
        temporal_downsample_factor=2,
        attn_resolutions=[3],
        hidden_size=32,
        num_attention_heads=2,
    )
    settings = {"bos_token_id": tokenizer.bos_token_id, "attention_dropout": 0.0, **text}
    config = named("Emu3Config")(
        text_config=decoder_settings(tokenizer, **settings),
        vq_config=vq,
        vocabulary_map=tokenizer.get_vocab(),
        tie_word_embeddings=False,
    )
    return build_model(transformers.Emu3ForConditionalGeneration, config, seed, attention)


def emu3_processor(*, padding_side: str = "right", **images):
    """8 px to a visual token, 12 to 48 of them."""
    settings = {"min_pixels": 12 * 64, "max_pixels": 48 * 64}
    return named("Emu3Processor")(
        pil_image_processor("emu3", "Emu3")(**{**settings, **images}),
        _emu3_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE,
    )


def _code_name(code: int) -> str:
    """Chameleon's name of an image token: its digits as letters."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in f"{code}") + "Z"


_chameleon_tokenizer = tokenizer_with(
    image_token="<image>",
    boi_token="<racm3:break>",
    eoi_token="<eoss>",
    sep_token="<reserved08706>",
    **{_code_name(code): _code_name(code) for code in range(CODES)},
)


def chameleon_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """A decoder of its own on 7 x 7 codes of 8 px, with q/k norms."""
    tokenizer = _chameleon_tokenizer()
    config = named("ChameleonConfig")(
        **decoder_settings(tokenizer, **text),
        vq_config=_vq(num_embeddings=CODES, resolution=TILE),
        vocabulary_map=tokenizer.get_vocab(),
    )
    return build_model(transformers.ChameleonForConditionalGeneration, config, seed, attention)


def chameleon_processor(*, padding_side: str = "right", **images):
    """Short edge to 56 px, centre crop to 56 x 56."""
    settings = {
        "size": {"shortest_edge": TILE},
        "crop_size": {"height": TILE, "width": TILE},
    }
    processor = named("ChameleonProcessor")(
        pil_image_processor("chameleon", "Chameleon")(**{**settings, **images}),
        _chameleon_tokenizer(padding_side),
        image_seq_length=7 * 7,
    )
    processor.chat_template = TILE_TEMPLATE
    processor.return_for_text_completion = True  # else it ends every chat with a separator
    return processor


_fuyu_tokenizer = tokenizer_with(
    image_token="|SPEAKER|", newline_token="|NEWLINE|", bos_token="<s>", answer_token="<0x04>"
)


def fuyu_model(*, seed: int = 0, attention: str = "sdpa", **text):
    """A Persimmon decoder that takes patches of 14 px as they are."""
    tokenizer = _fuyu_tokenizer()
    settings = decoder_settings(tokenizer, **text)
    del settings["num_key_value_heads"]
    config = named("FuyuConfig")(
        text_config={"model_type": "persimmon", **settings, "qk_layernorm": True},
        patch_size=14,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
        tie_word_embeddings=False,
    )
    return build_model(transformers.FuyuForCausalLM, config, seed, attention)


def fuyu_processor(*, padding_side: str = "right", **images):
    """At most 112 x 168 px, in patches of 14."""
    settings = {
        "size": {"height": 2 * TILE, "width": 3 * TILE},
        "patch_size": {"height": 14, "width": 14},
    }
    return named("FuyuProcessor")(
        pil_image_processor("fuyu", "Fuyu")(**{**settings, **images}),
        _fuyu_tokenizer(padding_side),
    )


FAMILIES = {
    "janus": Family(janus_model, janus_processor),
    "deepseek_vl": Family(deepseek_vl_model, deepseek_vl_processor),
    "deepseek_vl_hybrid": Family(deepseek_vl_hybrid_model, deepseek_vl_hybrid_processor),
    "emu3": Family(emu3_model, emu3_processor),
    "chameleon": Family(chameleon_model, chameleon_processor),
    "fuyu": Family(fuyu_model, fuyu_processor),
}
