"""DeepSpeed's checkpoints on another number of ranks, or on one process without it.

DeepSpeed itself continues on the number of ranks that saved. Its universal checkpoint, one file for
each parameter, goes to any number; it holds the state of Adam's kind only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundkern.checks import fail

MOMENTS = ("exp_avg", "exp_avg_sq")  # all that a universal checkpoint has beside the weights
UNIVERSAL = "latest_universal"


def steps_in(folder: str | os.PathLike) -> list[Path]:
    """The folders that DeepSpeed wrote in a checkpoint, the newest last."""
    return sorted(Path(folder).glob("global_step*"))


def ranks_of(folder: str | os.PathLike) -> int:
    """The number of ranks that saved a checkpoint.

    Args:
        folder: of a checkpoint of DeepSpeed.
    """
    return len(list(_state(folder).glob("*zero_pp_rank_*_optim_states.pt")))


def _state(folder: str | os.PathLike) -> Path:
    return Path(folder, Path(folder, "latest").read_text().strip())


def weights(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by name, put together; frozen ones where they were saved.

    Args:
        folder: of a checkpoint of DeepSpeed.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder))


def convert(folder: str | os.PathLike, target: Path) -> None:
    """Write a folder that DeepSpeed, told to load a universal checkpoint, continues from.

    It has links to the checkpoint's own files.

    Args:
        folder: of a checkpoint of DeepSpeed.
        target: is made anew.

    Raises:
        ValueError: an optimizer that is not of Adam's kind.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    source = _state(folder)
    universal = target / f"{source.name}_universal"
    _refuse_other_optimizer(source)
    words = ("--input_folder", str(source.resolve()), "--output_folder", str(universal.resolve()))
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        fail("resume_from_checkpoint", "one that ds_to_universal converts", f"{source}: {said}")
    for path in Path(folder).iterdir():
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())
    (target / UNIVERSAL).write_text(universal.name)


def _refuse_other_optimizer(source: Path) -> None:
    file = min(source.glob("*_optim_states.pt"))
    state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    inner = state["optimizer_state_dict"]["optimizer_state_dict"]["state"]
    found = {name for each in inner.values() for name in each} - {"step"}
    if found != set(MOMENTS):
        wanted = "the same number of ranks, since DeepSpeed converts the state of Adam only"
        got = ", ".join(sorted(found)) or "none"
        fail("resume_from_checkpoint", wanted, f"another one, and the state {got}")


def load_universal(plugin: Any, *, on: bool) -> None:
    """Tell an engine that is yet to be made what kind of checkpoint it loads.

    Args:
        plugin: accelerate's DeepSpeedPlugin.
        on: whether it is a universal one.
    """
    settings = plugin.deepspeed_config.setdefault("checkpoint", {})
    settings["load_universal"] = on


def mend(engine: Any, groups: list[Mapping[str, Any]]) -> None:
    """Undo what loading a universal checkpoint does to a ZeRO-3 optimizer beyond its state.

    All parameters share one tensor of steps then, which each of them counts up, and every group
    has the settings of the first, its weight decay too.

    Args:
        engine: DeepSpeed's, which loaded.
        groups: the settings of the optimizer's groups as they were made; empty: of one group.
    """
    engine._config.load_universal_checkpoint = False
    inner = engine.optimizer.optimizer
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    if groups:
        for group, made in zip(inner.param_groups, groups, strict=True):
            group.update(made)


@torch.no_grad()
def put(model: nn.Module, folder: str | os.PathLike, *, first: bool) -> None:
    """Load the trained weights of a checkpoint into a model that ZeRO-3 may have sharded.

    Args:
        model: on every rank.
        folder: of a checkpoint of DeepSpeed.
        first: whether this is the first rank, which reads for all where parameters are sharded.
    """
    from deepspeed.zero import GatheredParameters

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    whole = [name for name, p in trained if not hasattr(p, "ds_id")]
    saved = weights(folder) if first or whole else {}
    for name, p in trained:
        sharded = hasattr(p, "ds_id")
        if name not in saved and (first or not sharded):
            fail("resume_from_checkpoint", "every trained parameter", f"none named {name}")
        with GatheredParameters([p], modifier_rank=0, enabled=sharded):
            if first or not sharded:
                p.copy_(saved[name])


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, converted: str | os.PathLike
) -> None:
    """Load the state of Adam into torch's own optimizer.

    Args:
        model: whole.
        optimizer: Adam or AdamW of its parameters.
        converted: the folder that `convert` made.
    """
    parts = Path(converted, Path(converted, UNIVERSAL).read_text(), "zero")
    common = torch.load(parts / "optimizer_state.pt", map_location="cpu", weights_only=False)
    common = common["optimizer_state_dict"]
    step, rate = common["state"][0]["step"], common["param_groups"][0]["lr"]
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        optimizer.state[p] = {"step": torch.as_tensor(step, dtype=torch.float32).clone()}
        for moment in MOMENTS:
            value = torch.load(parts / name / f"{moment}.pt", map_location="cpu", weights_only=True)
            value = value["param"] if isinstance(value, dict) else value
            optimizer.state[p][moment] = value.view_as(p).to(p)
    for group in optimizer.param_groups:
        group["lr"] = rate
