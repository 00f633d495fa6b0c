"""Tiny text decoders whose forward does something with its logits, and a batch for them."""

from __future__ import annotations

import torch
import transformers
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from benchmarks.families.zoo.making import build_model

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA = {
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 5,
}
MULTIPLIED = {"logits_scaling": 4.0, "residual_multiplier": 0.5}
DECODERS = {
    "gemma2": lambda: build_model(Gemma2ForCausalLM, Gemma2Config(**TEXT, **GEMMA), 0, "eager"),
    "cohere2": lambda: build_model(
        Cohere2ForCausalLM, Cohere2Config(**TEXT, logit_scale=0.25, sliding_window=5), 0, "sdpa"
    ),
    "granite": lambda: build_model(
        GraniteForCausalLM, GraniteConfig(**TEXT, **MULTIPLIED), 0, "sdpa"
    ),
}


def build_moe(name: str, **settings):
    """A tiny mixture of experts: four experts, two of them for a token.

    Args:
        name: of the class in transformers; its config's name begins alike.
        settings: of the text config.
    """
    kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    more = {"router_aux_loss_coef": 0.7, "output_router_logits": True, "moe_intermediate_size": 16}
    config = kind(**{**TEXT, **experts, **more, **settings})
    return build_model(getattr(transformers, name), config, 0, "sdpa")


def text_batch() -> dict:
    """Rows 4 and 8 of 12 tokens; every key counts as a column."""
    ids = torch.randint(2, 96, (1, 12), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "gk_image": torch.zeros(1, 12, dtype=torch.int32),
        "gk_text_position": torch.tensor([[4, 8, 10]]),
        "gk_side_position": torch.tensor([[4, 8]]),
        "gk_side_set": torch.full((1, 2), -1),
        "gk_side_inside": torch.zeros(1, 0, 12, dtype=torch.bool),
        **every_key_a_column(ids),
    }


def padded_batch() -> dict:
    """Two sequences, the second shorter, with side tokens."""
    first = text_batch()
    batch = {name: torch.cat((x, x)) for name, x in first.items()}
    batch["input_ids"][1, 5:] = batch["input_ids"][1, 4].clone()
    batch["attention_mask"][1, 10:] = 0
    batch["gk_text_position"][1, 2] = -1
    return batch


def every_key_a_column(ids: torch.Tensor) -> dict:
    batch, length = ids.shape
    return {
        "gk_map_position": torch.full((batch, 0), -1),
        "gk_map_token_position": torch.full((batch, 0), -1),
        "gk_map_image": torch.full((batch, 0), -1),
        "gk_map_target": torch.zeros(batch, 0, length, dtype=torch.int32),
        "gk_map_weight": torch.ones(batch, 0),
        "gk_query_position": torch.full((batch, 0, 0), -1),
        "gk_map_columns": torch.arange(length, dtype=torch.int32).expand(batch, -1),
    }
