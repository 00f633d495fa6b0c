"""What `--model` and `--adapter` name, and what tells one model from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from groundkern.hf import add_tokens
from groundkern.hf.data.anchors import add_to_tokenizer
from groundkern.trainer import durable
from groundkern.trainer.config import ConfigError
from groundkern.trainer.loading import ADAPTER, open_adapter, open_model
from groundkern.trainer.progress import progress
from groundkern.trainer.run_folder import MODEL, RECORD

_CONFIG = "config.json"
_KINDS = (".safetensors", ".json", ".jinja", ".model", ".txt")  # files that shape an answer
_OTHER = (RECORD, "trainer_state.json")
_SHOWN_FROM = 2**30  # bytes from which hashing them has a bar


@dataclass(frozen=True)
class Named:
    """Where everything of a model is.

    Args:
        weights: a folder or hub name with config and weights.
        processor: likewise, of the processor.
        adapter: the folder of a PEFT adapter, if there is one.
        tokens: those that the run that trained it added to the processor's.
    """

    weights: str
    processor: str
    adapter: Path | None
    tokens: tuple[str, ...] = ()

    def load(self, *, dtype: str, attn_implementation: str) -> tuple[torch.nn.Module, Any]:
        """The model, on the CPU and in evaluation mode, and its processor.

        Raises:
            ConfigError: they cannot be loaded.
        """
        model, processor = open_model(
            self.weights,
            attn_implementation=attn_implementation,
            dtype=dtype,
            processor=self.processor,
        )
        if self.adapter is not None:
            add_tokens(model, processor.tokenizer, self.tokens)
            model = open_adapter(model, self.adapter)
        add_to_tokenizer(processor.tokenizer, self.tokens)
        return model.eval(), processor

    def identity(self) -> dict[str, str]:
        """What an evaluation of this very model agrees on: sha256 of the files that shape answers,
        or a hub name with its commit."""
        found = {"weights": _digest_of(self.weights), "processor": _digest_of(self.processor)}
        if self.adapter is not None:
            found["adapter"] = _digest_of(str(self.adapter))
        return found


def named(model: str, adapter: str | None) -> Named:
    """What the words of a command line name.

    Args:
        model: a model folder or hub name, a folder of an adapter that names its base model, a
            checkpoint of a run, or the output folder of a finished run.
        adapter: the folder of a PEFT adapter, or None.

    Raises:
        ConfigError: a run that has not finished, no adapter, or two of them.
    """
    path = Path(model)
    if adapter is not None and not (Path(adapter) / ADAPTER).is_file():
        raise ConfigError(f"--adapter: expected a folder with {ADAPTER}, got {adapter}")
    if (path / RECORD).is_file() and (path / MODEL).is_dir():
        path = path / MODEL  # a finished run
    elif not (path / _CONFIG).exists() and any(path.glob("checkpoint-*")):
        raise ConfigError(
            f"--model: expected a model or a finished run, got {model}, which has only checkpoints "
            "so far; one of these will do"
        )
    where = str(path) if path.exists() else model
    if (path / _CONFIG).is_file() or not (path / ADAPTER).is_file():
        found = None if adapter is None else Path(adapter)
        return Named(where, _processor_of(path, where), found, _added_tokens(found or path))
    if adapter is not None:
        raise ConfigError(f"--adapter: expected none beside {model}, which is an adapter itself")
    base = _field(path / ADAPTER, "base_model_name_or_path")
    if base is None:
        raise ConfigError(
            f"--model: expected a model, got {model}, an adapter that does not say of which; give "
            f"--model BASE --adapter {model}"
        )
    return Named(base, base, path, _added_tokens(path))


def _added_tokens(path: Path) -> tuple[str, ...]:
    """The tokens that the run added which left a folder: its checkpoint, or its model."""
    record = next((p / RECORD for p in (path, path.parent) if (p / RECORD).is_file()), None)
    if record is None:
        return ()
    try:
        config = durable.read_json(record)["config"]
        anchor = config["supervision"].get("anchor_token")
        return (*config["model"].get("add_tokens", ()), *([anchor] if anchor else []))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return ()  # no record of a run


def _processor_of(path: Path, where: str) -> str:
    """The folder itself; for a checkpoint, which has none, that of the model it started from."""
    record = path / RECORD
    if record.is_file() and not (path / "tokenizer_config.json").exists():
        return _field(record, "config", "model", "path") or where
    return where


def _field(path: Path, *names: str) -> str | None:
    """A text within a JSON file; None if it is not there."""
    try:
        value: Any = durable.read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


def _digest_of(where: str) -> str:
    folder = Path(where)
    if not folder.is_dir():
        if where.count("/") != 1 or where.startswith("."):  # no hub name
            return where
        try:
            commit = getattr(AutoConfig.from_pretrained(where), "_commit_hash", None)
        except (OSError, ValueError):  # loading it says why
            commit = None
        return f"{where} {commit or ''}".strip()
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _KINDS and path.name not in _OTHER and path.is_file()
    )
    total = sum(path.stat().st_size for path in files)
    hashes = {}
    title = f"read {folder.name}"
    with progress(title, total=total, unit="B", shown=total >= _SHOWN_FROM) as bar:
        for path in files:
            hashes[path.name] = durable.digest(path, bar.update)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
