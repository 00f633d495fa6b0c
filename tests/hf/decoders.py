"""Tiny text decoders of the real classes whose layers are not all full attention."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from benchmarks.families.zoo.making import build_model

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LINEAR, FULL = "linear_attention", "full_attention"
SLIDING, CHUNKED = "sliding_attention", "chunked_attention"
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
PER_LAYER = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

# By name: the config's class, the kinds of its layers, its settings.
DECODERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", (LINEAR, FULL, LINEAR, FULL), DELTA_NET),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        (LINEAR, FULL),
        {
            **DELTA_NET,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "lfm2": ("Lfm2Config", ("conv", FULL, "conv", FULL), {}),
    "nemotron_h": (
        "NemotronHConfig",
        (LINEAR, FULL, "mlp", FULL),
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    "granite": (
        "GraniteMoeHybridConfig",
        (LINEAR, FULL, LINEAR),
        {
            **MAMBA,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
        },
    ),
    # attention beside Mamba in every layer
    "falcon_h1": ("FalconH1Config", (), {**MAMBA, "mamba_d_ssm": 128, "num_hidden_layers": 2}),
    "llama4": (
        "Llama4TextConfig",
        (CHUNKED, FULL, CHUNKED, FULL),
        {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 2},
    ),
    "gpt_oss": ("GptOssConfig", (SLIDING, FULL), {"sliding_window": 8, **EXPERTS}),
    "gemma3n": (
        "Gemma3nTextConfig",
        (SLIDING, FULL, SLIDING, FULL),
        {
            **PER_LAYER,
            "num_kv_shared_layers": 2,
            "sliding_window": 8,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": None,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        (SLIDING, FULL, SLIDING, SLIDING, FULL),
        {**PER_LAYER, "num_kv_shared_layers": 2, "sliding_window": 8, "global_head_dim": 32},
    ),
    "minimax_m3": (
        "MiniMaxM3VLTextConfig",
        (FULL, "minimax_m3_sparse", FULL),
        {
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rotary_dim": 8,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 32,
        },
    ),
    "jamba": (
        "JambaConfig",
        (),
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_d_state": 8,
            "mamba_expand": 1,
        },
    ),
}


def tiny_decoder(name: str, *, attention: str = "eager") -> Any:
    """A decoder with its head; skips the test if this transformers has no such class."""
    config_name, kinds, settings = DECODERS[name]
    config_class = getattr(transformers, config_name, None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    layers = {"layer_types": list(kinds), "num_hidden_layers": len(kinds)} if kinds else {}
    if name == "nemotron_h":
        layers = {"layers_block_type": list(kinds)}
    config = config_class(**{**TEXT, **layers, **settings})
    model_class = transformers.AutoModelForCausalLM._model_mapping[config_class]
    return build_model(model_class, config, 0, attention)
