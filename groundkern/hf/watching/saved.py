"""What a checkpoint needs beside the weights that its format holds, and reading it back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from groundkern.checks import fail
from groundkern.hf.model.support import base_model
from groundkern.hf.watching.finite import whole
from groundkern.hf.watching.plain import finite_or_none

BESIDE = "groundkern_trained.safetensors"
"""Trained parameters and running statistics that an adapter's own file does not hold."""
STATE = "groundkern_trainer.json"
"""The log window that a checkpoint interrupts, and the count of steps that were not finite."""


def beside_adapter(model: nn.Module) -> dict[str, Tensor]:
    """What training changes in a PEFT model outside of its adapters.

    These are parameters that train although no adapter holds them (`klal.head_weight: learned`, a
    projector that was unfrozen) and the running statistics of batch norms.

    Args:
        model: inside PEFT.

    Returns:
        Parameters and buffers by their names in the base model; empty if it is not inside PEFT.
    """
    adapters = getattr(model, "peft_config", None)
    if adapters is None or not hasattr(model, "get_base_model"):
        return {}
    base = base_model(model)
    found: dict[str, Tensor] = {
        name: parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and not _in_adapter(name, adapters)
    }
    for prefix, module in base.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            statistics = module.named_buffers(prefix, recurse=False)
            found |= {k: x for k, x in statistics if not _in_adapter(k, adapters)}
    return found


def _in_adapter(name: str, adapters: Iterable[str]) -> bool:
    """Whether PEFT saves it: `q_proj.lora_A.default.weight`, `modules_to_save.default.weight`."""
    parts = name.split(".")
    return "modules_to_save" in parts or bool(set(parts[-2:]) & set(adapters))


def save_beside_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write what `load_beside_adapter` reads, if there is anything.

    `PeftModel.save_pretrained` writes adapters only; `GroundingTrainer` calls this beside it.

    Args:
        model: inside PEFT.
        folder: where the adapter is saved.
        state: whole weights by name where the model's own are sharded.
        write: False on ranks that only take part in gathering.
    """
    found = {}
    for name, x in beside_adapter(model).items():
        tensor = _named(state, name)
        if tensor is None:
            tensor = whole(x)
        found[name] = tensor.detach().cpu().contiguous().clone()
    if found and write:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(found, Path(folder) / BESIDE, metadata={"format": "pt"})


def _named(state: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    """A tensor of a state dict whose names may have prefixes of wrappers."""
    for key, x in (state or {}).items():
        if key == name or key.endswith(f".{name}"):
            return x
    return None


@torch.no_grad()
def load_beside_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put what `save_beside_adapter` wrote back into a model.

    Args:
        model: inside PEFT, with the same objectives attached and the same parameters trained.
        folder: of the adapter.

    Raises:
        ValueError: other parameters train than those that were saved.
    """
    wanted, path = beside_adapter(model), Path(folder) / BESIDE
    saved = {}
    if path.exists():
        with safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if wanted.keys() != saved.keys():
        lost = sorted(wanted.keys() ^ saved.keys())
        what = "trained outside of the adapters" if lost[0] in wanted else "not trained here"
        fail("resume_from_checkpoint", "the same trained parameters", f"{lost[0]}, {what}")
    for name, x in wanted.items():
        value = saved[name].to(x.device, x.dtype)
        if isinstance(x, DTensor):
            value = distribute_tensor(value, x.device_mesh, x.placements)
        x.copy_(value)


def write_state(folder: str | os.PathLike[str], values: dict[str, Any]) -> None:
    """Write a trainer's state beside a checkpoint; what is not finite becomes null.

    Args:
        folder: of the checkpoint.
        values: plain values.
    """
    text = json.dumps(finite_or_none(values), allow_nan=False)
    Path(folder, STATE).write_text(text + "\n", encoding="utf-8")


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_state` wrote; empty without it.

    Args:
        folder: of a checkpoint.
    """
    path = Path(folder, STATE)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
