"""The form of a checkpoint, by who sharded the weights; reading FSDP's and ZeRO's as a whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from groundkern.checks import fail
from groundkern.hf.watching import zero
from groundkern.hf.watching.saved import load_beside_adapter

Form = Literal["whole", "FSDP", "DeepSpeed"]
MODEL, OPTIMIZER = "pytorch_model_fsdp", "optimizer"  # as accelerate names them


def form_of(folder: str | os.PathLike[str]) -> Form:
    """Who wrote a checkpoint: FSDP, DeepSpeed, or a process that held everything.

    Args:
        folder: of a checkpoint.
    """
    if any(Path(folder, f"{MODEL}{end}").exists() for end in (".bin", "_0")):
        return "FSDP"
    return "DeepSpeed" if zero.steps_in(folder) else "whole"


def refuse_other_form(folder: str | os.PathLike[str], own: Form) -> None:
    """Refuse to continue where nothing reads the form; one process, and DDP, read all of them.

    Args:
        folder: of a checkpoint.
        own: the form that this run writes.

    Raises:
        ValueError: FSDP or DeepSpeed, and a checkpoint of another form.
    """
    saved = form_of(folder)
    if own not in ("whole", saved):
        wanted = f"a checkpoint of {own}, or a run without sharding, which reads all"
        fail("resume_from_checkpoint", wanted, f"one of {_WRITERS[saved]} in {folder}")


_WRITERS = {"whole": "a run without sharding", "FSDP": "FSDP", "DeepSpeed": "DeepSpeed"}


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the weights of FSDP's or DeepSpeed's checkpoint into a model that is whole.

    Args:
        model: as it was trained, also inside PEFT.
        folder: of the checkpoint.

    Raises:
        ValueError: the checkpoint lacks a parameter that trains, or has another one.
    """
    if form_of(folder) == "DeepSpeed":
        put(model, zero.weights(folder))
    else:
        put(model, _fsdp(folder, MODEL))
        load_beside_adapter(model, folder)  # of adapters FSDP saves nothing else


@torch.no_grad()
def put(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model.

    Args:
        model: whole on this process.
        saved: by name; adapters may be named as PEFT saves them, without the adapter's own name.

    Raises:
        ValueError: a parameter that trains is not there.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if any(name not in saved for name in trained) and hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict
        from peft.utils import get_peft_model_state_dict

        lost = sorted(get_peft_model_state_dict(model).keys() - saved.keys())
        set_peft_model_state_dict(model, dict(saved))
    else:
        lost = [name for name in trained if name not in saved]
        model.load_state_dict(saved, strict=False)
    if lost:
        fail("resume_from_checkpoint", "every trained parameter", f"none named {lost[0]}")


def load_fsdp_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | os.PathLike
) -> None:
    """Load the state of FSDP's optimizer into one that is whole.

    Args:
        model: whose parameters it trains.
        optimizer: torch's own.
        folder: of the checkpoint.
    """
    state = _fsdp(folder, OPTIMIZER)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _fsdp(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What FSDP saved under a name: one file, or shards that torch puts together."""
    file, shards = Path(folder, f"{name}.bin"), Path(folder, f"{name}_0")
    if file.exists():
        return torch.load(file, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as made:
        dcp_to_torch_save(shards, Path(made, "whole"))
        found = torch.load(Path(made, "whole"), map_location="cpu", weights_only=True)
    return found[next(iter(found))]  # under "model" or "optimizer"
