"""Tiny random models of families that cannot be trained with regions, and why.

Resamplers (Idefics2, Aria) can be attached, but their visual tokens have no place. The others read
the image in an encoder or by cross-attention, or put it in front of the text inside the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoModelForImageTextToText

from benchmarks.families.zoo.making import (
    TILE,
    TILE_TEMPLATE,
    Family,
    Model,
    build_model,
    decoder_settings,
    named,
    tiny_tokenizer,
    tokenizer_with,
    tower,
)
from groundkern.hf.data.processor import pil_image_processor

LATENTS = 4  # tokens of a resampler

# Decoders of the T5 and BART kind.
T5 = {"d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
}
KOSMOS = {
    "embed_dim": 64,
    "layers": 2,
    "ffn_dim": 96,
    "attention_heads": 4,
    "max_position_embeddings": 256,
}
OPT = {
    "model_type": "opt",
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
}
QFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 32,
    "vocab_size": 64,
}


def _decoder(**settings) -> dict[str, Any]:
    """A text config; those of T5, BART and OPT kind ignore what they do not know."""
    return decoder_settings(tiny_tokenizer(), **settings)


def _tower(**settings) -> dict[str, Any]:
    """A vision config whose type its family knows."""
    settings = {**tower("", **settings)}
    del settings["model_type"]
    return settings


def _model(name: str, settings: Callable[[], dict[str, Any]]) -> Callable[..., Any]:
    """Builds the model of a config from its settings.

    Args:
        name: of the config's class.
        settings: makes them.
    """

    def model(*, seed: int = 0, attention: str = "sdpa", **more) -> Any:
        kind = named(name)
        model_class = AutoModelForImageTextToText._model_mapping[kind]
        config = kind(**{**settings(), **more})
        try:
            return build_model(model_class, config, seed, attention)
        except ValueError:  # a part without that attention, in some transformers
            return build_model(model_class, config, seed, "eager")

    return model


_idefics2_tokenizer = tokenizer_with(
    image_token="<image>",
    image_boundary_token="<fake_token_around_image>",
    end_of_utterance_token="<end_of_utterance>",
)
idefics2_model = Model(
    "Idefics2Config",
    _idefics2_tokenizer,
    "<image>",
    {"model_type": "mistral", "sliding_window": None},
    tower("idefics2_vision"),
    {
        "perceiver_config": {
            "model_type": "idefics2_perceiver",
            "hidden_size": 64,
            "resampler_n_latents": LATENTS,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        }
    },
)


def idefics2_processor(*, padding_side: str = "right", **images):
    """Longest edge to 56 px; 4 latent tokens."""
    settings = {"size": {"shortest_edge": 14, "longest_edge": TILE}}
    return named("Idefics2Processor")(
        pil_image_processor("idefics2", "Idefics2")(**{**settings, **images}),
        _idefics2_tokenizer(padding_side),
        image_seq_len=LATENTS,
        chat_template=TILE_TEMPLATE,
    )


_aria_tokenizer = tokenizer_with(image_token="<image>")
aria_model = Model(
    "AriaConfig",
    _aria_tokenizer,
    "<image>",
    {
        "model_type": "aria_text",
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    },
    tower("idefics3_vision", image_size=490),
    {"projector_patch_to_query_dict": {1225: LATENTS}},
)


def aria_processor(*, padding_side: str = "right", **images):
    """490 px, Aria's smallest view; 4 latent tokens."""
    return named("AriaProcessor")(
        pil_image_processor("aria", "Aria")(**{"max_image_size": 490, **images}),
        _aria_tokenizer(padding_side),
        chat_template=TILE_TEMPLATE,
        size_conversion={490: LATENTS, 980: LATENTS},
    )


def _blip_2(**more) -> dict[str, Any]:
    image = tiny_tokenizer().convert_tokens_to_ids("<image>")
    return {
        "vision_config": _tower(),
        "qformer_config": QFORMER,
        "text_config": _decoder(**OPT),
        "num_query_tokens": LATENTS,
        **more,
        "image_token_index": image,
    }


def _kosmos(**vision) -> dict[str, Any]:
    return {
        "text_config": _decoder(**KOSMOS),
        "vision_config": _tower(**vision),
        "latent_query_num": LATENTS,
    }


def _idefics() -> dict[str, Any]:
    vision = _tower()
    vision["embed_dim"] = vision.pop("hidden_size")
    return {**_decoder(), "vision_config": vision, "additional_vocab_size": 2}


def _mllama() -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "vision_output_dim": 64,
        "image_size": TILE,
        "intermediate_layers_indices": [0],
    }
    text = _decoder(cross_attention_layers=[1], bos_token_id=0)
    return {"text_config": text, "vision_config": vision}


def _florence2() -> dict[str, Any]:
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "window_size": 4,
        "projection_dim": 64,
    }
    return {"text_config": _decoder(model_type="bart", **BART), "vision_config": vision}


def _pix2struct() -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 32,
        "d_ff": 48,
        "d_kv": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return {
        "text_config": {**_decoder(**T5), "decoder_start_token_id": 0},
        "vision_config": vision,
    }


def _pp_formulanet() -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 32,
        "decoder_hidden_size": 64,
    }
    return {"text_config": {**_decoder(), **BART}, "vision_config": vision}


def _vision_encoder_decoder() -> dict[str, Any]:
    decoder = {"model_type": "bart", **_decoder(**BART), "is_decoder": True}
    return {
        "encoder": tower("vit"),
        "decoder": {**decoder, "add_cross_attention": True},
    }


def _evolla() -> dict[str, Any]:
    protein = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    return {
        **_decoder(),
        "protein_encoder_config": protein,
        "aligner_num_add_layers": 1,
        "resampler_depth": 1,
        "resampler_dim_head": 16,
        "resampler_heads": 2,
        "resampler_num_latents": LATENTS,
    }


_VISION_2_5 = {"patch_embed_hidden_size": 32, "head_dim": 16, "max_num_patches": 64}
_SETTINGS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "blip": ("BlipConfig", lambda: {"text_config": _decoder(), "vision_config": _tower()}),
    "blip-2": ("Blip2Config", _blip_2),
    "instructblip": ("InstructBlipConfig", _blip_2),
    "instructblipvideo": ("InstructBlipVideoConfig", _blip_2),
    "kosmos-2": ("Kosmos2Config", _kosmos),
    "kosmos-2.5": ("Kosmos2_5Config", lambda: _kosmos(**_VISION_2_5)),
    "idefics": ("IdeficsConfig", _idefics),
    "mllama": ("MllamaConfig", _mllama),
    "evolla": ("EvollaConfig", _evolla),
    "git": ("GitConfig", lambda: {**_decoder(), "vision_config": _tower()}),
    "florence2": ("Florence2Config", _florence2),
    "pix2struct": ("Pix2StructConfig", _pix2struct),
    "pp_formulanet": ("PPFormulaNetConfig", _pp_formulanet),
    "udop": ("UdopConfig", lambda: {**_decoder(), **T5, "d_model": 64, "image_size": TILE}),
    "vision-encoder-decoder": ("VisionEncoderDecoderConfig", _vision_encoder_decoder),
}

# Their processors need not be built: nothing of them can be collated.
FAMILIES = {
    "idefics2": Family(idefics2_model, idefics2_processor),
    "aria": Family(aria_model, aria_processor),
    **{name: Family(_model(*how), None) for name, how in _SETTINGS.items()},
}
