"""Measured tables on disk: a safetensors file each, named by a hash of what it was measured on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from groundkern.hf.data.geometry.views import Size
from groundkern.hf.measuring.extents import Table

FORMAT = 1  # of the files, and the way of measuring
PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def config_key(config: Any) -> str:
    """A config without its text part as one text, which `settings_key` is given.

    Args:
        config: the model's.
    """
    model = {k: v for k, v in config.to_dict().items() if k not in ("text_config", "_name_or_path")}
    return json.dumps(model, sort_keys=True, default=str)


def settings_key(processor: Any, config: str) -> str:
    """A hash of what the places of visual tokens follow from, except for the images' sizes.

    Args:
        processor: the model's; its tokenizer and chat template do not matter.
        config: of `config_key`.

    Returns:
        Hexadecimal digits.
    """
    parts = {}
    for name, value in vars(processor).items():
        if name in ("chat_template", "tokenizer"):
            continue
        if isinstance(value, PLAIN):
            parts[name] = value
        elif hasattr(value, "to_dict"):
            parts[name] = [type(value).__name__, value.to_dict()]
    beside = getattr(processor, "valid_processor_kwargs", None)  # before transformers 5.21
    every = [FORMAT, transformers.__version__, type(processor).__name__]
    every += [parts, getattr(beside, "_defaults", {}), config]
    text = json.dumps(every, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Kept:
    """A folder of tables.

    Args:
        folder: made when the first table is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def find(self, settings: str, sizes: Sequence[Size]) -> Table | None:
        """The table that was kept, None if there is none or its file is not whole."""
        try:
            kept = load(self._path(settings, sizes).read_bytes())
            places, error = kept["places"], kept["error"]
            whole = torch.equal(kept["digest"], _digest(places, error))
        except (OSError, SafetensorError, KeyError):
            return None
        return Table(places, error.item()) if whole else None

    def keep(self, settings: str, sizes: Sequence[Size], table: Table) -> None:
        """Write a table so that no other process ever reads a part of it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path, error = self._path(settings, sizes), torch.tensor([table.error]).double()
        places = table.places.contiguous()
        data = save({"places": places, "error": error, "digest": _digest(places, error)})
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    def _path(self, settings: str, sizes: Sequence[Size]) -> Path:
        named = json.dumps([settings, list(map(list, sizes))])
        return self._folder / f"{hashlib.sha256(named.encode()).hexdigest()}.safetensors"


def _digest(*tensors: Tensor) -> Tensor:
    """uint8 [32]: the sha256 of some tensors' shapes and bytes."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{list(x.shape)}".encode() + x.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
