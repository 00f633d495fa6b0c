"""The model and the processor that a `Config` names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, set_seed

from groundkern.hf import add_tokens, attach, load_processor
from groundkern.trainer.config import Config, ConfigError, Lora
from groundkern.trainer.wording import cut

ADAPTER = "adapter_config.json"
VISION_TOWERS = ("visual", "vision_tower", "vision_model")


def load_model(config: Config) -> tuple[torch.nn.Module, Any]:
    """Load what a config names, with parameters frozen and adapters added as it says.

    Args:
        config: validated settings.

    Returns:
        The model and its processor.

    Raises:
        ConfigError: the model or the processor cannot be loaded.
    """
    settings = config.model
    model, processor = open_model(
        settings.path,
        attn_implementation=settings.attn_implementation,
        dtype=settings.dtype,
        image_options=settings.image_options,
    )
    tokens = added_tokens(config)
    try:
        ids = add_tokens(model, processor.tokenizer, tokens)
    except ValueError as error:
        raise ConfigError(f"`model.add_tokens`: {error}") from None
    if settings.freeze_vision:
        for tower in _vision_towers(model):
            tower.requires_grad_(False)
    if settings.lora is not None:
        set_seed(config.training.seed)  # adapters start at random
        frozen = settings.freeze_vision
        model = _with_adapters(model, settings.lora, freeze_vision=frozen, tokens=ids)
    return model, processor


def added_tokens(config: Config) -> list[str]:
    """The tokens that a run adds, or finds, and trains: those of the model and the anchor."""
    anchor = config.supervision.anchor_token
    return list(dict.fromkeys((*config.model.add_tokens, *([anchor] if anchor else []))))


def open_model(
    path: str,
    *,
    attn_implementation: str | None,
    dtype: str,
    processor: str | None = None,
    image_options: Mapping[str, Any] | None = None,
) -> tuple[torch.nn.Module, Any]:
    """Load a model and its processor.

    Args:
        path: a model folder or hub name.
        attn_implementation: as in transformers; None: what it chooses for the model.
        dtype: the name of a torch dtype.
        processor: the folder or hub name of the processor; None: the model's.
        image_options: other settings of its images (`load_processor`).

    Raises:
        ConfigError: the model or the processor cannot be loaded.
    """
    if not Path(path).exists():
        parent = Path(path).parent
        if path.count("/") != 1 or path.startswith((".", "/")):
            raise ConfigError(f"`model.path`: expected a model folder, got {path} (not there)")
        if parent.is_dir():  # else a slip costs the minutes in which the hub is asked for it
            why = f"not there, but {parent} is a folder here, so it is no name on the hub"
            raise ConfigError(f"`model.path`: expected a model folder, got {path} ({why})")
    try:
        loaded = load_processor(processor or path, image_options=image_options)
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            attn_implementation=attn_implementation,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"`model.path`: {path} cannot be loaded: {reason}") from None
    return model, loaded


def open_adapter(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Put a PEFT adapter on a model.

    Args:
        model: of `open_model`.
        path: the adapter's folder.

    Returns:
        The PEFT model around `model`.

    Raises:
        ConfigError: not an adapter, one of another model, or one that changes no weights.
    """
    if not (path / ADAPTER).is_file():
        raise ConfigError(f"`adapter`: expected a folder with {ADAPTER}, got {path}")
    from peft import PeftConfig, PeftModel

    try:
        if PeftConfig.from_pretrained(str(path)).is_prompt_learning:
            raise ConfigError(f"`adapter`: expected one inside the weights, got prompts in {path}")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(path))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, UserWarning) as error:
        reason = cut(" ".join(str(error).split()), 300)
        raise ConfigError(f"`adapter`: {path} does not fit the model: {reason}") from None


def attach_objectives(model: torch.nn.Module, config: Config, processor: Any) -> None:
    """Attach the objectives that a config turns on, and no others.

    Args:
        model: to be trained.
        config: validated settings.
        processor: of the model.

    Raises:
        ConfigError: a teacher that cannot be loaded, or has another tokenizer.
        ValueError: an objective that the model cannot serve.
    """
    attach(model, **dict(config.objectives), teacher=_teacher(config, processor))


def _teacher(config: Config, processor: Any) -> torch.nn.Module | None:
    """The model of `model.teacher`, if there is one."""
    settings = config.model
    if settings.teacher is None:
        return None
    same = {"attn_implementation": settings.attn_implementation, "dtype": settings.dtype}
    teacher, own = open_model(settings.teacher, **same)
    words = [getattr(each, "tokenizer", each).get_vocab() for each in (processor, own)]
    if words[0] != words[1]:
        wanted = "a model with the tokenizer of `model.path`"
        raise ConfigError(f"`model.teacher`: expected {wanted}, got {settings.teacher}")
    return teacher


def _vision_towers(model: torch.nn.Module) -> list[torch.nn.Module]:
    named = model.named_modules()
    return [module for name, module in named if name.rpartition(".")[2] in VISION_TOWERS]


def _embeddings(model: torch.nn.Module, tokens: list[int]) -> dict[str, list[int]]:
    """Which rows of which embeddings PEFT is to train; a tied head follows by itself."""
    parts = [model.get_input_embeddings()]
    if model.get_output_embeddings().weight is not parts[0].weight:
        parts.append(model.get_output_embeddings())
    return {name.rpartition(".")[2]: tokens for name, m in model.named_modules() if m in parts}


def _with_adapters(
    model: torch.nn.Module, lora: Lora, *, freeze_vision: bool, tokens: list[int]
) -> torch.nn.Module:
    """The model inside PEFT, whose embeddings of `tokens` train in place of none."""
    from peft import LoraConfig, get_peft_model

    towers = rf".*\b({'|'.join(VISION_TOWERS)})\b.*"
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            exclude_modules=towers if freeze_vision else None,
            trainable_token_indices=_embeddings(model, tokens) if tokens else None,
        ),
    )
